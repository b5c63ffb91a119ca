"""The report's notes and sections, apart from those about evaluations."""

from collections.abc import Iterator, Sequence
from typing import Any

from rmkv_cli.config import MixConfig, dump_toml
from rmkv_cli.markdown import code, escape, span, table
from rmkv_cli.progress import plural
from rmkv_cli.report.curves import curves
from rmkv_cli.report.data import data_table
from rmkv_cli.report.differences import common_toml, differences
from rmkv_cli.report.evaluations import benchmarks, final_evaluation, loss_by_position, memory, tasks
from rmkv_cli.report.figures import cost_tables, figures_table
from rmkv_cli.report.run import Run
from rmkv_cli.report.section import Section, command, command_line

MOST_SAMPLES = 6
MOST_PROMPT = 500  # characters of the end of a prompt
MOST_BAD_STEPS = 20


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the sections of the report of a run, or of the comparison of several."""
    return [
        final_evaluation(runs),
        _curves(runs),
        loss_by_position(runs),
        memory(runs),
        tasks(runs),
        benchmarks(runs),
        Section("Figures", figures_table(runs)),
        Section("Samples", "\n\n".join(_samples(runs))),
        *([Section("Answers", "\n\n".join(_answers(runs)))] if any(run.answers() for run in runs) else []),
        Section("Parameters and FLOPs", cost_tables(runs)),
        Section("Data", "\n\n".join(_data(runs))),
        Section("Config", _config(runs)),
        Section("To reproduce", "\n\n".join(_commands(runs))),
    ]


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield warnings to read before the figures, as Markdown."""
    if len({run.tokenizer_hash for run in runs}) > 1:
        yield (
            "**The runs have different tokenizers.** Their losses in nats per token are not comparable; bits per byte "
            "of the same texts are."
        )
    if len({run.data_hash for run in runs}) > 1:
        yield "**The runs have different data.** Losses on different held-out documents are not comparable."
    for run in runs:
        name = escape(run.name)
        if run.data is None:
            yield f"{name}: its data no longer exist, so they cannot be compared with the data of other runs."
        if run.config.model.memory.carry == "layers":
            yield f"{name}: is not causal (memory.carry = 'layers'), so its losses are not those of a language model."
        if run.damaged:
            yield f"{name}: {run.damaged:,} lines of metrics.jsonl are damaged and were left out."
        if not run.records:
            yield f"{name}: has not recorded a step yet."
        elif run.records[-1]["tokens"] < run.config.train.tokens:
            yield (
                f"{name}: has read {run.records[-1]['tokens']:,} of {run.config.train.tokens:,} tokens. If it has "
                f"stopped, resume it with {command('train', '--resume', '--run', run.folder)}."
            )
        if bad := run.bad_steps():
            shown = [f"{record['step']:,} ({escape(str(record['bad_step']))})" for record in bad[:MOST_BAD_STEPS]]
            more = f", and {len(bad) - MOST_BAD_STEPS:,} more" if len(bad) > MOST_BAD_STEPS else ""
            yield f"{name}: skipped step {', '.join(shown)}{more}."


def _curves(runs: Sequence[Run]) -> Section:
    drawn = curves(runs)
    if not drawn:
        return Section("Curves", "No step has been recorded yet; `train.log_every` sets how often steps are.")
    text = "\n".join(picture.markdown for picture in drawn)
    if not any(run.points("loss", "validation") for run in runs):
        text += "\n\nThere has been no validation yet: see `train.eval_every`, and `validation` in the mix."
    return Section("Curves", text, drawn)


def _samples(runs: Sequence[Run]) -> Iterator[str]:
    """Yield samples of one run over time, or the last of each of several."""
    for run in runs:
        samples = run.samples()
        if len(runs) > 1:
            yield f"**{escape(run.name)}**"
            samples = samples[-1:]
        if not samples:
            yield (
                "No validation has written a sample. To generate a text: "
                f"{command('generate', '--model', run.folder, '--prompt', 'Once upon a time')}."
            )
            continue
        yield "The beginning of a held-out document:"
        yield code(str(samples[-1]["sample"].get("prompt")), "text")
        for record in _over_time(samples):
            yield f"Continued after {record['tokens']:,} tokens, step {record['step']:,}:"
            yield code(str(record["sample"].get("text")), "text")
        if len(samples) > MOST_SAMPLES:
            yield f"metrics.jsonl contains all {len(samples):,} of them."


def _over_time(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most MOST_SAMPLES of the records, evenly spaced from the first to the last."""
    last = len(records) - 1
    return [records[i] for i in sorted({round(last * j / (MOST_SAMPLES - 1)) for j in range(MOST_SAMPLES)}) if records]


def _answers(runs: Sequence[Run]) -> Iterator[str]:
    """Yield answers of each run to exercises, over the course of its training."""
    for run in runs:
        answers = run.answers()
        if len(runs) > 1 and answers:
            yield f"**{escape(run.name)}**"
        for record in _over_time(answers):
            answer, level = record["rollout"], escape(str(record.get("level")))
            yield f"Step {record['step']:,}, {level}, score {answer.get('score')}:"
            yield code(f"{str(answer.get('prompt'))[-MOST_PROMPT:]}\n\n{answer.get('answer')}", "text")


def _data(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a description of each data set, once for all runs that read it."""
    for digest in dict.fromkeys(run.data_hash for run in runs):
        readers = [run for run in runs if run.data_hash == digest]
        subject = f"**{escape(', '.join(run.name for run in readers))}**" if len(runs) > 1 else "The data"
        data, train = readers[0].data, readers[0].config.train
        if train.rollouts.tasks and train.data is None:
            yield f"{subject}: the run's own answers to the exercises in `train.rollouts` of its config."
            continue
        if data is None:
            yield f"{subject}: no longer in {span(train.data or str(readers[0].folder))}."
            continue
        if isinstance(data, MixConfig):
            tokenizer = span(str(readers[0].tokenizer_hash))
            yield f"{subject}: streamed; SHA-256 of the mix {span(str(digest))}, tokenizer {tokenizer}."
        else:
            splits = "; ".join(
                f"{n}: {plural(s.documents, 'document')}, {plural(s.tokens, 'token')}" for n, s in data.splits.items()
            )
            yield (
                f"{subject}: prepared in {span(str(train.data))} with seed {data.seed}; SHA-256 of manifest.json "
                f"{span(str(digest))}, tokenizer of {data.vocab_size:,} tokens {span(data.tokenizer_hash)}. {splits}."
            )
        yield data_table(data)
        yield "Its mix.toml, with file names relative to its folder:"
        yield code(dump_toml(data if isinstance(data, MixConfig) else data.mix).strip(), "toml")


def _config(runs: Sequence[Run]) -> str:
    configs = [run.config for run in runs]
    if len(runs) == 1:
        return code(dump_toml(configs[0]).strip(), "toml")
    rows = differences(configs)
    differing = table(["key", *(run.name for run in runs)], rows) if rows else "None."
    return f"Keys that differ:\n\n{differing}\n\nKeys that are equal:\n\n{code(common_toml(configs), 'toml')}"


def _commands(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if len(runs) > 1:
            yield f"**{escape(run.name)}**"
        lines, train = [], run.config.train
        if train.data is not None:
            tokenizer = run.folder / "tokenizer.json"
            mixing = command_line("data", "mix", "mix.toml", "--tokenizer", tokenizer, "--out", train.data)
            lines.append(f"{mixing}  # if the data no longer exist; mix.toml is under Data")
        lines.append(command_line("train", "--config", run.folder / "config.toml", "--run", f"{run.folder}-again"))
        lines += [evaluation.command for evaluation in run.evaluations.values()]
        lines.append(command_line("report", run.folder))
        yield code("\n".join(f"$ {line}" for line in lines), "console")
