"""The report's sections: Markdown, and the pictures that it shows."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmkv_cli.config import MixConfig, dump_toml
from rmkv_cli.evaluation.beside import Beside
from rmkv_cli.evaluation.harness_report import HarnessReport
from rmkv_cli.evaluation.kept import DocumentsReport
from rmkv_cli.evaluation.measure import Report
from rmkv_cli.markdown import code, escape, span, table
from rmkv_cli.progress import plural
from rmkv_cli.report.data import data_table
from rmkv_cli.report.differences import common_toml, differences
from rmkv_cli.report.figures import cost_tables, figures_table
from rmkv_cli.report.pictures import Picture, curves, heat_map, positions
from rmkv_cli.report.run import Run

MOST_SAMPLES = 6
MOST_PROMPT = 500  # characters of the end of a prompt
MOST_BAD = 20


@dataclass(frozen=True)
class Section:
    """A part of the report under its heading."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the parts of the report of a run, or of the comparison of several."""
    return [
        Section("Figures", figures_table(runs)),
        _curves(runs),
        _by_position(runs),
        _memory(runs),
        _tasks(runs),
        _benchmarks(runs),
        Section("Samples", "\n\n".join(_samples(runs))),
        *([Section("Answers", "\n\n".join(_answers(runs)))] if any(run.answers() for run in runs) else []),
        Section("Parameters and FLOPs", cost_tables(runs)),
        Section("Data", "\n\n".join(_data(runs))),
        Section("Config", _config(runs)),
        Section("To reproduce", "\n\n".join(_commands(runs))),
    ]


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what a reader must know before the figures, as Markdown."""
    if len({run.tokenizer_hash for run in runs}) > 1:
        yield (
            "**The runs have different tokenizers.** Their losses in nats a token are not comparable; bits per byte of "
            "the same texts are."
        )
    if len({run.data_hash for run in runs}) > 1:
        yield "**The runs have different data.** Losses on different held-out documents are not comparable."
    for run in runs:
        name = escape(run.name)
        if run.data is None:
            yield f"{name}: its data are not where they were; whether they are those of other runs cannot be told."
        if run.config.model.memory.carry == "layers":
            yield f"{name}: is not causal (memory.carry = 'layers'), so its losses are no language model's."
        if run.damaged:
            yield f"{name}: {run.damaged:,} lines of metrics.jsonl are damaged, and left out."
        if not run.records:
            yield f"{name}: has not taken a step yet that it wrote down."
        elif run.records[-1]["tokens"] < run.config.train.tokens:
            yield (
                f"{name}: has read {run.records[-1]['tokens']:,} of {run.config.train.tokens:,} tokens; if it was "
                f"stopped, it goes on with {_command('train', '--resume', '--run', run.folder)}."
            )
        if bad := run.bad_steps():
            told = [f"{record['step']:,} ({escape(str(record['bad_step']))})" for record in bad[:MOST_BAD]]
            more = f", and {len(bad) - MOST_BAD:,} more" if len(bad) > MOST_BAD else ""
            yield f"{name}: passed over step {', '.join(told)}{more}."


def _curves(runs: Sequence[Run]) -> Section:
    drawn = curves(runs)
    if not drawn:
        return Section("Curves", "No step is written down yet: see `train.log_every`.")
    text = "\n".join(picture.markdown for picture in drawn)
    if not any(run.points("loss", "validation") for run in runs):
        text += "\n\nThere is no validation yet: see `train.eval_every`, and `validation` in the mix."
    return Section("Curves", text, drawn)


def _found(runs: Sequence[Run]) -> dict[str, tuple[int, DocumentsReport]]:
    """Return the evaluations on documents by what they are called here, each with its step."""
    return {
        run.name if name == "validation" else f"{run.name}, {name}": found
        for run in runs
        for name, found in run.documents().items()
    }


def _by_position(runs: Sequence[Run]) -> Section:
    found = _found(runs)
    if not found:
        return Section("Loss by position", _missing(runs, "--data"))
    reports: dict[str, Report | Beside] = {}
    for name, (_, report) in found.items():
        reports[name] = report
        if report.beside:
            reports[f"{name}: {report.beside.name}"] = report.beside
    parts = {name: {part.first: part for part in its.by_position} for name, its in reports.items()}
    firsts = sorted({first for its in parts.values() for first in its})
    rows = [
        [f"from {first:,}", *(f"{its[first].loss:.4f}" if first in its else "" for its in parts.values())]
        for first in firsts
    ]
    picture = positions(
        {name: [((part.first + part.last) / 2, part.loss) for part in its.values()] for name, its in parts.items()}
    )
    read = "; ".join(
        f"{escape(name)}: step {step:,}, {_share(its.tokens, its.available_tokens)} tokens"
        for name, (step, its) in found.items()
    )
    text = f"On documents from their beginnings, by the token's position. {read}.\n\n{picture.markdown}\n\n"
    rows.append(
        ["bits per byte", *(f"{its.bits_per_byte:.4f}" if its.bits_per_byte else "" for its in reports.values())]
    )
    return Section("Loss by position", text + table(["position", *reports], rows), [picture])


def _memory(runs: Sequence[Run]) -> Section:
    found = {name: its for name, its in _found(runs).items() if its[1].memory}
    effects = {name: report.memory for name, (_, report) in found.items() if report.memory}
    if not effects:
        return Section("Memory", _missing(runs, "--data"))
    rows = [
        ["carried, as always", *(f"{effect.carried:.4f}" for effect in effects.values())],
        ["reset at every segment", *(f"{effect.reset:.4f}" for effect in effects.values())],
        ["another document's", *(f"{effect.swapped:.4f}" for effect in effects.values())],
        ["reset costs", *(f"{effect.reset_cost:+.4f}" for effect in effects.values())],
        ["another's costs", *(f"{effect.swapped_cost:+.4f}" for effect in effects.values())],
        ["tokens compared", *(f"{effect.tokens:,}" for effect in effects.values())],
    ]
    text = "Loss in nats a token over what comes after each document's first segment, with its memory and without:"
    steps = "; ".join(f"{escape(name)}: step {step:,}" for name, (step, _) in found.items())
    return Section("Memory", f"{text}\n\n{steps}.\n\n{table(['memory', *effects], rows)}")


def _tasks(runs: Sequence[Run]) -> Section:
    drawn: list[Picture] = []
    lines = ["Accuracy, asked after so many segments of noise."]
    for run in runs:
        for name, (step, report) in run.tasks().items():
            whose = f"{run.name}, {name}"
            drawn.append(heat_map(f"task-{len(drawn) + 1}", whose, report))
            about = (
                f"{escape(whose)}, step {step:,}: {plural(report.examples, 'document')} per cell, seed {report.seed}."
            )
            lines += [about, drawn[-1].markdown]
    if not drawn:
        return Section("Tasks", _missing(runs, "--task", "recall"))
    return Section("Tasks", "\n\n".join(lines), drawn)


def _benchmarks(runs: Sequence[Run]) -> Section:
    kept = [(run, e.step, e.report) for run in runs for e in run.evaluations.values()]
    found = [(run, step, report) for run, step, report in kept if isinstance(report, HarnessReport)]
    if not found:
        return Section("Benchmarks", _missing(runs, "--harness", "hellaswag,piqa"))
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
        text += "\n\n\\* Asked with `--limit`, not of all documents: no scores to publish."
    return Section("Benchmarks", text)


def _samples(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what a run wrote over time, or several at their ends."""
    for run in runs:
        told = run.samples()
        if len(runs) > 1:
            yield f"**{escape(run.name)}**"
            told = told[-1:]
        if not told:
            command = _command("generate", "--model", run.folder, "--prompt", "Once upon a time")
            yield f"No validation has written a sample. {command} writes a text."
            continue
        yield "The beginning of a held-out document:"
        yield code(str(told[-1]["sample"].get("prompt")), "text")
        for record in _over_time(told):
            yield f"Continued after {record['tokens']:,} tokens, step {record['step']:,}:"
            yield code(str(record["sample"].get("text")), "text")
        if len(told) > MOST_SAMPLES:
            yield f"metrics.jsonl has all {len(told):,} of them."


def _over_time(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most MOST_SAMPLES of the records, evenly spaced from the first to the last."""
    last = len(records) - 1
    return [records[i] for i in sorted({round(last * j / (MOST_SAMPLES - 1)) for j in range(MOST_SAMPLES)}) if records]


def _answers(runs: Sequence[Run]) -> Iterator[str]:
    """Yield answers of each run to exercises, over its course."""
    for run in runs:
        found = run.answers()
        if len(runs) > 1 and found:
            yield f"**{escape(run.name)}**"
        for record in _over_time(found):
            answer, level = record["rollout"], escape(str(record.get("level")))
            yield f"Step {record['step']:,}, {level}, score {answer.get('score')}:"
            yield code(f"{str(answer.get('prompt'))[-MOST_PROMPT:]}\n\n{answer.get('answer')}", "text")


def _data(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what each of the data is, once."""
    for digest in dict.fromkeys(run.data_hash for run in runs):
        of = [run for run in runs if run.data_hash == digest]
        whose = f"**{escape(', '.join(run.name for run in of))}**" if len(runs) > 1 else "The data"
        data, train = of[0].data, of[0].config.train
        if train.rollouts.tasks and train.data is None:
            yield f"{whose}: the run's own answers to exercises, those of `train.rollouts` in its config."
            continue
        if data is None:
            yield f"{whose}: not there any more, in {span(train.data or str(of[0].folder))}."
            continue
        if isinstance(data, MixConfig):
            tokenizer = span(str(of[0].tokenizer_hash))
            yield f"{whose}: streamed, SHA-256 of the mix {span(str(digest))}, tokenizer {tokenizer}."
        else:
            splits = "; ".join(
                f"{n}: {plural(s.documents, 'document')}, {plural(s.tokens, 'token')}" for n, s in data.splits.items()
            )
            yield (
                f"{whose}: prepared in {span(str(train.data))}, seed {data.seed}, SHA-256 of its manifest.json "
                f"{span(str(digest))}, tokenizer of {data.vocab_size:,} tokens {span(data.tokenizer_hash)}. {splits}."
            )
        yield data_table(data)
        yield "Its mix.toml, whose files are relative to the folder in which it lies:"
        yield code(dump_toml(data if isinstance(data, MixConfig) else data.mix).strip(), "toml")


def _config(runs: Sequence[Run]) -> str:
    configs = [run.config for run in runs]
    if len(runs) == 1:
        return code(dump_toml(configs[0]).strip(), "toml")
    rows = differences(configs)
    differ = table(["key", *(run.name for run in runs)], rows) if rows else "In nothing."
    return f"Where they differ:\n\n{differ}\n\nWhat they share:\n\n{code(common_toml(configs), 'toml')}"


def _commands(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if len(runs) > 1:
            yield f"**{escape(run.name)}**"
        lines, train = [], run.config.train
        if train.data is not None:
            mixing = _line("data", "mix", "mix.toml", "--tokenizer", run.folder / "tokenizer.json", "--out", train.data)
            lines.append(f"{mixing}  # where the data are gone: of the mix that Data tells")
        lines.append(_line("train", "--config", run.folder / "config.toml", "--run", f"{run.folder}-again"))
        lines += [evaluation.command for evaluation in run.evaluations.values()]
        lines.append(_line("report", run.folder))
        yield code("\n".join(f"$ {line}" for line in lines), "console")


def _missing(runs: Sequence[Run], *option: str) -> str:
    """Return what would add a section that no run has anything for."""
    lines = []
    for run in runs:
        data = [run.config.train.data or run.folder / "held-out"] if option == ("--data",) else []
        lines.append(f"$ {_line('eval', '--model', run.folder, *option, *data)}")
    commands = "\n".join(lines)
    return f"Not measured yet; this adds it to the next report:\n\n{code(commands, 'console')}"


def _line(*words: object) -> str:
    return shlex.join(["rmkv", *map(str, words)])


def _command(*words: object) -> str:
    return span(_line(*words))


def _share(tokens: int, available: int | None) -> str:
    """Return the number of tokens read, out of `available`, if that is known."""
    if tokens == available:
        return f"all {tokens:,}"
    return f"{tokens:,}" if available is None else f"{tokens:,} of {available:,}"
