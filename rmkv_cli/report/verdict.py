"""The verdict on a run: the few sentences that the report opens with, each from what was measured."""

from collections.abc import Iterator
from statistics import fmean

from rmkv_cli.config import MixConfig
from rmkv_cli.evaluation.measure import LongDocuments
from rmkv_cli.evaluation.memory import MemoryEffect
from rmkv_cli.evaluation.tasks import TaskReport
from rmkv_cli.markdown import escape, span
from rmkv_cli.model.cost import count_by_part
from rmkv_cli.progress import plural
from rmkv_cli.report.run import Run

MOST_SOURCES = 4
MOST_TASKS = 2


def verdict(run: Run) -> str:
    """Return a few sentences, as Markdown: the training, the rewards, the score, the memory's effect, and the tasks.

    A sentence whose figures were not measured is left out. Without tasks, the last one is about long documents.
    """
    return " ".join([_training(run), *_rewards(run), *_measured(run)])


def _training(run: Run) -> str:
    train = run.config.train
    parameters = sum(count_by_part(run.config.model).values())
    name = f"**{escape(run.name)}** is an RMKV model of {parameters:,} parameters"
    origin = f" that started from {span(train.from_model)}" if train.from_model else ""
    if not run.records:
        return f"{name}{origin}; it has not been trained yet."
    steps, tokens = plural(run.records[-1]["step"], "step"), run.records[-1]["tokens"]
    read = f"{tokens:,}" if tokens >= train.tokens else f"{tokens:,} of {train.tokens:,} planned"
    teacher = f", with {span(train.teacher.model)} as its teacher" if train.teacher.model else ""
    return f"{name}{origin}, trained for {steps} on {read} tokens{_sources(run)}{teacher}."


def _sources(run: Run) -> str:
    """Return the largest sources of what a run read, each with its share of the tokens."""
    train = run.config.train
    if train.rollouts.tasks:
        return " of its own answers to exercises"
    if run.data is None:
        return ""
    if isinstance(run.data, MixConfig):
        weights = {source.name: source.weight for source in run.data.sources}
    else:
        weights = {source.name: source.achieved for source in run.data.sources}
    largest = sorted(weights, key=lambda name: -weights[name])[:MOST_SOURCES]
    shares = [f"{escape(name)} ({weights[name] / sum(weights.values()):.0%})" for name in largest]
    others = len(weights) - len(largest)
    return f" from {_list([*shares, *([plural(others, 'other source')] if others else [])])}"


def _rewards(run: Run) -> Iterator[str]:
    """Compare the beginning and the end of reinforcement, as means over many steps: one has only a few answers."""
    if len(run.points("reward")) < 2:
        return
    (score, last_score), (solved, last_solved) = _ends(run, "reward"), _ends(run, "solved")
    yield (
        f"From the first to the last tenth of its steps, the mean score of its answers goes from {score:.3f} to "
        f"{last_score:.3f}, and the share of exercises with at least one right answer from {solved:.0%} to "
        f"{last_solved:.0%}."
    )


def _ends(run: Run, key: str) -> tuple[float, float]:
    """Return the means of a figure over the first and the last tenth of the records, at least one each."""
    values = [value for _, value in run.points(key)]
    tenth = max(1, len(values) // 10)
    return fmean(values[:tenth]), fmean(values[-tenth:])


def _measured(run: Run) -> Iterator[str]:
    final = run.final_evaluation()
    if run.config.model.memory.carry == "segments":
        yield from _score(run)
    if final and final[1].memory:
        yield _memory(final[1].memory)
    tasks = [report for _, report in run.tasks().values()][:MOST_TASKS]
    if tasks:
        yield f"It answers {_list([_accuracy(report) for report in tasks])}."
    elif final and (long := final[1].long_documents) and len(long.by_position) > 1:
        yield _long(long)


def _score(run: Run) -> Iterator[str]:
    final = run.final_evaluation()
    if final is None:
        loss, bits = run.points("loss", "validation"), run.points("bits_per_byte", "validation")
        if loss:
            in_bits = f", {bits[-1][1]:.3f} bits per byte" if bits else ""
            yield f"At its last validation the loss is {loss[-1][1]:.3f} nats per token{in_bits}."
        return
    step, report = final
    documents = plural(report.documents, "held-out document")
    if report.bits_per_byte is None:
        yield f"On {documents} its loss is {report.loss:.3f} nats per token (step {step:,})."
        return
    comparison = ""
    if report.ngram:
        better = 1 - report.bits_per_byte / report.ngram.bits_per_byte
        comparison = f", {abs(better):.0%} {'better' if better >= 0 else 'worse'} than an order-{report.ngram.order} "
        comparison += f"byte n-gram ({report.ngram.bits_per_byte:.3f})"
    if report.beside:
        comparison += f"; {escape(report.beside.name)} scores {report.beside.bits_per_byte:.3f}"
    yield f"On {documents} it scores {report.bits_per_byte:.3f} bits per byte (step {step:,}){comparison}."


def _memory(effect: MemoryEffect) -> str:
    carried, reset, swapped = (f"{loss:.3f}" for loss in (effect.carried, effect.reset, effect.swapped))
    beyond = "Beyond the first segment of a document the memory"
    if float(reset) > float(carried):
        found = f"{beyond} lowers the loss to {carried} nats per token, from {reset} when it is reset at every segment"
    else:
        found = f"{beyond} does not lower the loss: {carried} nats per token, {reset} when it is reset at every segment"
    return f"{found}; with another document's memory it is {swapped}."


def _accuracy(report: TaskReport) -> str:
    """Return the share of right answers after the least and the most noise, over all rows."""
    accuracy = {}
    for segments in sorted({cell.segments for cell in report.cells}):
        cells = [cell for cell in report.cells if cell.segments == segments]
        accuracy[segments] = sum(cell.right for cell in cells) / sum(cell.answers for cell in cells)
    nearest, farthest = min(accuracy), max(accuracy)
    found = f"{accuracy[nearest]:.0%} of {report.task['kind']} questions right after {_noise(nearest)}"
    return found if nearest == farthest else f"{found} and {accuracy[farthest]:.0%} after {farthest:,}"


def _noise(segments: int) -> str:
    return f"{plural(segments, 'segment')} of noise"


def _long(long: LongDocuments) -> str:
    first, last = long.by_position[0], long.by_position[-1]
    change = "falls" if last.loss < first.loss else "rises"
    ends = [f"{part.loss:.3f} at positions {part.first:,} to {part.last:,}" for part in (first, last)]
    documents = f"the {plural(long.documents, 'document')} of at least {long.min_tokens:,} tokens"
    return f"Within {documents}, its loss {change} from {ends[0]} to {ends[1]}."


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
