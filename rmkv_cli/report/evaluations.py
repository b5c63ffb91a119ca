"""The report's sections about evaluations: scores, loss by position, the memory's effect, tasks and benchmarks."""

from collections.abc import Sequence

from rmkv_cli.evaluation.beside import Beside
from rmkv_cli.evaluation.harness_report import HarnessReport
from rmkv_cli.evaluation.kept import DocumentsReport
from rmkv_cli.evaluation.measure import PositionLoss, Score
from rmkv_cli.markdown import escape, table
from rmkv_cli.progress import plural
from rmkv_cli.report.pictures import Picture, heat_map, positions
from rmkv_cli.report.run import Run
from rmkv_cli.report.section import Section, not_measured


def final_evaluation(runs: Sequence[Run]) -> Section:
    """Return the scores on the held-out documents, by source, and those of all other evaluations on documents."""
    found = {run.name: evaluation for run in runs if (evaluation := run.final_evaluation())}
    reports = {name: report for name, (_, report) in found.items()}
    blocks = _final_scores(found, len(runs) > 1) if found else [not_measured(runs, "--data")]
    shown: list[DocumentsReport | Beside | None] = [*reports.values()]
    shown += [report.beside for report in reports.values() if len(runs) == 1]
    others = {
        model: (step, its)
        for name, (step, report) in _evaluations(runs).items()
        for model, its in _models(name, report)
        if not any(its is other for other in shown)
    }
    return Section("Final evaluation", "\n\n".join([*blocks, *([_other_scores(others)] if others else [])]))


def _final_scores(found: dict[str, tuple[int, DocumentsReport]], several: bool) -> list[str]:
    """Return the Markdown of the final evaluations: of one run a table by source, of several tables side by side."""
    scopes = [
        f"{f'{escape(name)}: ' * several}step {step:,}, {_share(its.tokens, its.available_tokens)} tokens"
        for name, (step, its) in found.items()
    ]
    reports = {name: report for name, (_, report) in found.items()}
    counted = sorted({report.ngram.training_bytes for report in reports.values() if report.ngram})
    sizes = " or ".join(f"{size:,}" for size in counted)
    return [
        f"On held-out documents: {'; '.join(scopes)}. Losses are in nats per token.",
        *(_compared_scores(reports) if several else [_scores(*reports.values())]),
        *([f"The n-gram was counted on {sizes} bytes of the training text."] if counted else []),
    ]


def _scores(report: DocumentsReport) -> str:
    rows = [_score_row(name, score) for name, score in report.by_source.items()]
    if len(rows) != 1:
        rows.append(_score_row("all", report))
    if report.ngram:
        rows.append([_ngram(report), _bits(report.ngram.bits_per_byte), "", "", "", ""])
    if (other := report.beside) is not None:
        scores = _bits(other.bits_per_byte), f"{other.loss:.4f}", ""
        rows.append([other.name, *scores, f"{other.tokens:,}", f"{other.documents:,}"])
    return table(["source", "bits per byte", "loss", "perplexity", "tokens", "documents"], rows)


def _score_row(name: str, score: Score) -> list[str]:
    scores = _bits(score.bits_per_byte), f"{score.loss:.4f}", f"{score.perplexity:,.2f}"
    return [name, *scores, f"{score.tokens:,}", f"{score.documents:,}"]


def _compared_scores(reports: dict[str, DocumentsReport]) -> list[str]:
    """Return a table of bits per byte and one of losses, with a row for each source and a column for each run."""
    sources = list(dict.fromkeys(name for report in reports.values() for name in report.by_source))
    scores = {name: [report.by_source.get(name) for report in reports.values()] for name in sources}
    if len(sources) > 1:
        scores["all"] = list(reports.values())
    losses = [[name, *(f"{its.loss:.4f}" if its else "" for its in of)] for name, of in scores.items()]
    bits = [[name, *(_bits(its.bits_per_byte if its else None) for its in of)] for name, of in scores.items()]
    if ngram := next((_ngram(report) for report in reports.values() if report.ngram), None):
        of = [report.ngram for report in reports.values()]
        bits.append([ngram, *(_bits(its.bits_per_byte if its else None) for its in of)])
    bits = [row for row in bits if any(row[1:])]
    heads = {**({"bits per byte": bits} if bits else {}), "loss, nats per token": losses}
    return [table([head, *reports], rows) for head, rows in heads.items()]


def _other_scores(found: dict[str, tuple[int, DocumentsReport | Beside]]) -> str:
    rows = [
        [name, _bits(its.bits_per_byte), f"{its.loss:.4f}", f"{its.tokens:,}", f"{its.documents:,}", f"{step:,}"]
        for name, (step, its) in found.items()
    ]
    return table(["other evaluations", "bits per byte", "loss", "tokens", "documents", "step"], rows)


def _models(name: str, report: DocumentsReport) -> list[tuple[str, DocumentsReport | Beside]]:
    """Return an evaluation and the comparison with another model, if any, each with its name."""
    beside = [(f"{name}: {report.beside.name}", report.beside)] if report.beside else []
    return [(name, report), *beside]


def _ngram(report: DocumentsReport) -> str:
    assert report.ngram
    return f"order-{report.ngram.order} byte n-gram"


def _bits(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.4f}"


def loss_by_position(runs: Sequence[Run]) -> Section:
    """Return the loss by position: within long documents, or over all where an earlier version evaluated."""
    title = "Loss by position"
    found = _evaluations(runs)
    if not found:
        return Section(title, not_measured(runs, "--data"))
    losses: dict[str, list[PositionLoss]] = {}
    notes = []
    for name, (step, report) in found.items():
        for line, its in _models(name, report):
            losses[line] = its.long_documents.by_position if its.long_documents else its.by_position
            notes.append(f"- {escape(line)}, step {step:,}: {_documents(its)}")
    parts = {name: {part.first: part for part in its} for name, its in losses.items()}
    firsts = sorted({first for its in parts.values() for first in its})
    rows = [
        [f"from {first:,}", *(f"{its[first].loss:.4f}" if first in its else "" for its in parts.values())]
        for first in firsts
    ]
    picture = positions(
        {name: [((part.first + part.last) / 2, part.loss) for part in its] for name, its in losses.items()}
    )
    text = "Loss in nats per token by a token's position in its document. Each line covers:\n\n" + "\n".join(notes)
    return Section(title, f"{text}\n\n{picture.markdown}\n\n{table(['position', *losses], rows)}", [picture])


def _documents(report: DocumentsReport | Beside) -> str:
    if long := report.long_documents:
        return (
            f"the same {plural(long.documents, 'document')}, of at least {long.min_tokens:,} tokens, at every position"
        )
    return "all documents, the short ones only as far as they reach, so positions are not comparable with each other"


def memory(runs: Sequence[Run]) -> Section:
    """Return the losses with the memory carried, reset, and swapped."""
    found = {name: (step, its.memory) for name, (step, its) in _evaluations(runs).items() if its.memory}
    if not found:
        return Section("Memory", not_measured(runs, "--data"))
    effects = [effect for _, effect in found.values()]
    rows = [
        ["carried", *(f"{effect.carried:.4f}" for effect in effects)],
        ["reset at every segment", *(f"{effect.reset:.4f}" for effect in effects)],
        ["another document's", *(f"{effect.swapped:.4f}" for effect in effects)],
        ["cost of resetting", *(f"{effect.reset_cost:+.4f}" for effect in effects)],
        ["cost of another document's", *(f"{effect.swapped_cost:+.4f}" for effect in effects)],
        ["tokens compared", *(f"{effect.tokens:,}" for effect in effects)],
    ]
    text = "Loss in nats per token beyond each document's first segment, by what the memory contains:"
    steps = "; ".join(f"{escape(name)}: step {step:,}" for name, (step, _) in found.items())
    return Section("Memory", f"{text}\n\n{steps}.\n\n{table(['memory', *found], rows)}")


def tasks(runs: Sequence[Run]) -> Section:
    """Return the heat maps of the accuracy in tasks."""
    drawn: list[Picture] = []
    lines = ["Accuracy by difficulty and by the number of segments of noise before the question."]
    for run in runs:
        for name, (step, report) in run.tasks().items():
            measured = f"{run.name}, {name}"
            drawn.append(heat_map(f"task-{len(drawn) + 1}", measured, report))
            cells = f"{plural(report.examples, 'document')} per cell, seed {report.seed}"
            lines += [f"{escape(measured)}, step {step:,}: {cells}.", drawn[-1].markdown]
    if not drawn:
        return Section("Tasks", not_measured(runs, "--task", "recall"))
    return Section("Tasks", "\n\n".join(lines), drawn)


def benchmarks(runs: Sequence[Run]) -> Section:
    """Return the scores in tasks of lm-evaluation-harness."""
    kept = [(run, e.step, e.report) for run in runs for e in run.evaluations.values()]
    found = [(run, step, report) for run, step, report in kept if isinstance(report, HarnessReport)]
    if not found:
        return Section("Benchmarks", not_measured(runs, "--harness", "hellaswag,piqa"))
    rows = [
        [
            run.name,
            f"{step:,}",
            s.task,
            "" if s.num_fewshot is None else str(s.num_fewshot),
            f"{s.documents:,}{'' if report.limit is None else '*'}",
            s.metric if s.filter == "none" else f"{s.metric} ({s.filter})",
            f"{s.value:.4f}",
            "" if s.standard_error is None else f"{s.standard_error:.4f}",
        ]
        for run, step, report in found
        for s in report.scores
    ]
    text = table(["run", "step", "task", "n-shot", "documents", "metric", "value", "standard error"], rows)
    if any(report.limit is not None for _, _, report in found):
        text += "\n\n\\* With `--limit`, a score covers only the first documents of a task; do not publish it."
    return Section("Benchmarks", text)


def _evaluations(runs: Sequence[Run]) -> dict[str, tuple[int, DocumentsReport]]:
    """Return the evaluations on documents by run and name, each with its step."""
    return {
        run.name if name == "validation" else f"{run.name}, {name}": evaluation
        for run in runs
        for name, evaluation in run.documents().items()
    }


def _share(tokens: int, available: int | None) -> str:
    """Return the number of tokens read, out of `available`, if that is known."""
    if tokens == available:
        return f"all {tokens:,}"
    return f"{tokens:,}" if available is None else f"{tokens:,} of {available:,}"
