"""The sentences that the report of a run opens with."""

from dataclasses import replace

import pytest
from report_pages import data_of, records_of, write_records

from rmkv_cli.evaluation.beside import Beside, Reading
from rmkv_cli.evaluation.kept import Evaluation, keep_evaluation
from rmkv_cli.evaluation.ngram import Baseline
from rmkv_cli.model.cost import count_by_part
from rmkv_cli.report.run import read_run
from rmkv_cli.report.verdict import verdict


def test_each_sentence_has_the_figures_that_were_measured(evaluated):
    folder, found = evaluated
    run, report, task = read_run(folder), found["validation"], found["recall"]
    parameters, last = sum(count_by_part(run.config.model).values()), run.records[-1]
    right = {segments: [c for c in task.cells if c.segments == segments] for segments in (0, 3)}
    near, far = (sum(c.right for c in cells) / sum(c.answers for c in cells) for cells in right.values())
    effect = report.memory
    assert verdict(run).startswith(
        f"**first** is an RMKV model of {parameters:,} parameters, trained for {last['step']} steps on "
        f"{last['tokens']} tokens from story (100%). On {report.documents} held-out documents it scores "
        f"{report.bits_per_byte:.3f} bits per byte (step {last['step']}). Beyond the first segment of a document"
    )
    for figure in (effect.carried, effect.reset, effect.swapped):
        assert f"{figure:.3f}" in verdict(run)
    ending = f"It answers {near:.0%} of recall questions right after 0 segments of noise and {far:.0%} after 3."
    assert verdict(run).endswith(ending)


def evaluate(run, report, **changes):
    step = records_of(run)[-1]["step"]
    keep_evaluation(run, "validation", Evaluation(step, "rmkv eval", replace(report, **changes)))
    return verdict(read_run(run))


def test_baselines_stand_beside_the_score(run, measured):
    reading = Reading(parameters=7, tokens_per_second=8.0, carried_bytes=9, carried_tokens=10)
    beside = Beside("some/model", 1, 2, 3, 4.0, 1.25, [], 0, reading, reading)
    text = evaluate(run, measured["validation"], bits_per_byte=1.5, ngram=Baseline(3, 2.0, 99), beside=beside)
    assert "it scores 1.500 bits per byte" in text
    assert ", 25% better than an order-3 byte n-gram (2.000); some/model scores 1.250." in text
    assert ", 50% worse than an order-3" in evaluate(
        run, measured["validation"], bits_per_byte=3.0, ngram=Baseline(3, 2.0, 99)
    )


@pytest.mark.parametrize(
    ("reset", "expected"),
    [
        (2.5, "the memory lowers the loss to 2.000 nats per token, from 2.500 when it is reset at every segment"),
        (2.0002, "the memory does not lower the loss: 2.000 nats per token, 2.000 when it is reset at every segment"),
        (1.9, "the memory does not lower the loss: 2.000 nats per token, 1.900 when it is reset at every segment"),
    ],
)
def test_the_memory_has_an_effect_only_if_the_figures_show_one(run, measured, reset, expected):
    effect = replace(measured["validation"].memory, carried=2.0, reset=reset, swapped=2.25)
    text = evaluate(run, measured["validation"], memory=effect)
    assert f"{expected}; with another document's memory it is 2.250." in text


def test_without_tasks_it_ends_with_the_loss_within_long_documents(run, measured):
    long = measured["validation"].long_documents
    parts = [replace(part, loss=3.0 - i) for i, part in enumerate(long.by_position)]
    text = evaluate(run, measured["validation"], long_documents=replace(long, by_position=parts))
    assert text.endswith(
        f"Within the {long.documents} documents of at least {long.min_tokens} tokens, its loss falls from 3.000 at "
        f"positions 0 to 63 to {4 - len(parts)}.000 at positions {parts[-1].first} to {parts[-1].last}."
    )


def test_what_was_not_measured_is_left_out(run):
    last = records_of(run)[-1]
    score = [r["validation"] for r in records_of(run) if "validation" in r][-1]
    loss, bits = f"{score['loss']:.3f} nats per token", f"{score['bits_per_byte']:.3f} bits per byte"
    assert verdict(read_run(run)).endswith(f"from story (100%). At its last validation the loss is {loss}, {bits}.")
    text = (run / "config.toml").read_text().replace(str(data_of(run)), str(run / "gone"))
    (run / "config.toml").write_text(text.replace("tokens = 600", "tokens = 9000"))
    write_records(run, [record for record in records_of(run) if "validation" not in record])
    assert verdict(read_run(run)).endswith(f" on {last['tokens']} of 9,000 planned tokens.")
    (run / "metrics.jsonl").unlink()
    assert verdict(read_run(run)).endswith(" parameters; it has not been trained yet.")


def test_the_newest_evaluation_of_the_run_s_own_documents_counts(run, measured):
    report = measured["validation"]
    for step, name, tokens in (
        (4, "validation", 900),
        (8, "validation max-tokens=50", 50),
        (8, "validation max-tokens=70 no-memory dtype=bf16", 70),
        (9, "train", 950),
        (9, "file-a.txt 01234567", 950),
        (9, "validation-else 01234567", 950),
        (9, "validation adapter=a-01234567", 950),
        (9, "validation beside=a/b adapter=a-01234567", 950),
    ):
        keep_evaluation(run, name, Evaluation(step, "rmkv eval", replace(report, tokens=tokens)))
    step, found = read_run(run).final_evaluation()
    assert (step, found.tokens) == (8, 70)
