"""The report of one run."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
from report_pages import Page, data_of, records_of, section, write_records
from small_run import written_by

from rmkv_cli.config import load_config
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.beside import Beside, Reading
from rmkv_cli.evaluation.kept import Evaluation, keep_evaluation
from rmkv_cli.evaluation.measure import PositionLoss
from rmkv_cli.model.cost import count_by_part
from rmkv_cli.report import write_report
from rmkv_cli.report.pictures import Picture
from rmkv_cli.training.utilization import training_flops_per_token

NASTY = "<script>alert(1)</script>\n```\n# no heading\n~~~~ | a | *b* &amp; <!-- `c` \\ ![x](http://example.org/x.png)"


def report_of(run):
    written = write_report([run], run / "report")
    return written.markdown.read_text(encoding="utf-8"), Page(written.html), written


def test_it_shows_what_the_run_wrote(evaluated):
    run, found = evaluated
    markdown, page, written = report_of(run)
    records, config, manifest = records_of(run), load_config(run / "config.toml"), Manifest.load(data_of(run))
    validations = [record for record in records if "validation" in record]
    figures = written.runs["first"]
    parameters = sum(count_by_part(config.model).values())
    assert (figures["parameters"], figures["tokens"]) == (parameters, records[-1]["tokens"])
    assert figures["validation_loss"] == validations[-1]["validation"]["loss"]
    assert figures["training_flops"] == training_flops_per_token(config.model) * records[-1]["tokens"]
    assert figures["memory_reset_cost"] == found["validation"].memory.reset_cost
    assert f"| bits per byte, last | {validations[-1]['validation']['bits_per_byte']:.4f} |" in markdown
    for part in found["validation"].long_documents.by_position:
        assert f"| from {part.first:,} | {part.loss:.4f} |" in section(markdown, "Loss by position")
    assert f"| cost of resetting | {found['validation'].memory.reset_cost:+.4f} |" in section(markdown, "Memory")
    cells = [f"{cell.accuracy:.2f} at {cell.row:g} and {cell.segments}" for cell in found["recall"].cells]
    assert ", ".join(cells) in section(markdown, "Tasks")
    assert f"| all | {parameters:,} |" in section(markdown, "Parameters and FLOPs")
    step, tokens = (run / "latest").resolve().name.removeprefix("step-").lstrip("0"), found["validation"].tokens
    assert f"On held-out documents: step {step}, all {tokens:,} tokens." in section(markdown, "Final evaluation")
    long = found["validation"].long_documents
    covered = f"the same {long.documents} documents, of at least {long.min_tokens} tokens, at every position"
    assert f"- first, step {step}: {covered}" in section(markdown, "Loss by position")
    assert f"first: step {step}." in section(markdown, "Memory")
    data = section(markdown, "Data")
    assert manifest.tokenizer_hash in data
    assert f"| story | {manifest.sources[0].documents:,} |" in data
    assert f"learning_rate = {config.train.learning_rate}" in section(markdown, "Config")
    again = section(markdown, "To reproduce")
    assert f"$ rmkv train --config {run}/config.toml" in again
    assert "$ rmkv eval --recall\n$ rmkv eval --validation\n" in again
    samples = [record["sample"] for record in validations]
    assert len(samples) >= 3
    shown = [text.removesuffix("\n") for text in page.texts["pre"]]
    assert samples[0]["prompt"] in shown
    assert len(page.texts["h2"]) == 12


def test_the_report_contains_a_compared_model(run, measured):
    report = measured["validation"]
    reading = Reading(parameters=7, tokens_per_second=8.0, carried_bytes=9, carried_tokens=10)
    long = report.long_documents
    losses = [PositionLoss(part.first, part.last, 1, 100.0 + part.first) for part in long.by_position]
    beside = Beside("some/model", 1, 2, 3, 4.0, 5.0, [], 0, reading, reading, replace(long, by_position=losses))
    step = int((run / "latest").resolve().name.removeprefix("step-"))
    keep_evaluation(run, "validation", Evaluation(step, "rmkv eval", replace(report, beside=beside)))
    markdown = report_of(run)[0]
    assert "| some/model | 5.0000 | 4.0000 |  | 2 | 1 |" in section(markdown, "Final evaluation")
    shown = section(markdown, "Loss by position")
    assert "| position | first | first: some/model |" in shown
    for part in long.by_position:
        assert f"| from {part.first:,} | {part.loss:.4f} | {100 + part.first:.4f} |" in shown


def test_both_files_are_equal_in_content_and_need_nothing_else(evaluated):
    run, _ = evaluated
    markdown, page, written = report_of(run)
    names = re.findall(r"^!\[.*\]\((.+)\)$", markdown, re.MULTILINE)
    assert {"loss.png", "optimizer.png", "speed.png", "loss-by-position.png", "task-1.png"} == set(names)
    assert {path.name for path in written.html.parent.iterdir()} == {"index.html", "report.md", *names}
    assert page.tags.count("svg") == len(names)
    assert len(page.values("aria-labelledby")) == len(names)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for name in ("href", "src") for link in page.values(name))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.values("href")} <= set(ids)
    titles = re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    assert page.texts["h2"] == titles
    assert page.values("lang") == ["en"]
    cells = [cell.strip() for line in markdown.splitlines() if line.startswith("| ") for cell in line.split(" | ")]
    assert len(cells) > len(titles)
    assert "default-src 'none'" in "".join(page.values("content"))


def test_texts_of_the_run_are_shown_literally(run):
    named = run.parent / "_a $x$ <b> `c` | *d* é猫"
    shutil.copytree(run, named, symlinks=True)
    records = records_of(named)
    for record in records:
        if "sample" in record:
            record["sample"]["text"] = NASTY
    bad = {"step": records[-1]["step"] + 1, "tokens": records[-1]["tokens"] + 8, "bad_step": NASTY, "bad_steps": 1}
    write_records(named, [*records, bad])
    markdown, page, _ = report_of(named)
    assert f"{NASTY}\n" in page.texts["pre"]
    assert page.texts["h1"] == [f"Report of {named.name}"]
    assert page.texts["title"][0] == f"Report of {named.name}"
    assert " ".join(NASTY.split()) in page.texts["blockquote"][0]
    assert named.name in page.texts["th"]
    assert not {"script", "b", "em", "img"} & set(page.tags)
    assert f"````text\n{NASTY}\n````" in markdown


@pytest.mark.slow
def test_a_missing_measurement_is_shown_with_its_command(run, monkeypatch, capsys):
    markdown, _, _ = report_of(run)
    for title in ("Final evaluation", "Loss by position", "Memory"):
        assert f"$ rmkv eval --model {run} --data {data_of(run)}\n" in section(markdown, title)
    assert f"$ rmkv eval --model {run} --task recall\n" in section(markdown, "Tasks")
    assert f"$ rmkv eval --model {run} --harness hellaswag,piqa\n" in section(markdown, "Benchmarks")
    written_by(monkeypatch, capsys, "eval", "--model", run, "--data", data_of(run))
    markdown, _, _ = report_of(run)
    for title in ("Final evaluation", "Loss by position", "Memory"):
        assert "Not measured yet" not in section(markdown, title)
    assert "| cost of resetting | " in section(markdown, "Memory")
    assert "| order-3 byte n-gram | " in section(markdown, "Final evaluation")


def test_scores_of_the_harness_are_in_it(run):
    (run / "evaluations").mkdir()
    score = {"task": "a_b", "version": "1", "num_fewshot": 0, "documents": 7, "metric": "acc", "filter": "none"}
    score |= {"value": 0.5, "standard_error": None, "higher_is_better": True}
    for limit in (None, 7):
        report = {"lm_eval": "0.4", "limit": limit, "scores": [score]}
        kept = {"step": 4, "command": "rmkv eval --harness a_b", "report": report}
        (run / "evaluations" / f"harness-a_b-{limit}.json").write_text(json.dumps(kept))
    shown = section(report_of(run)[0], "Benchmarks")
    assert "| first | 4 | a_b | 0 | 7 | acc | 0.5000 |  |" in shown
    assert "| first | 4 | a_b | 0 | 7\\* | acc | 0.5000 |  |" in shown
    assert "do not publish it" in shown


def test_damage_bad_steps_and_an_unfinished_run_are_noted(run):
    records = [record for record in records_of(run) if record["step"] <= 5]
    bad = {"step": 6, "tokens": records[-1]["tokens"] + 8, "bad_step": "not a finite number: loss nan", "bad_steps": 1}
    write_records(run, [*records, bad, {"step": 7, "tokens": bad["tokens"] + 8, "loss": float("nan")}])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'7\nnull\n{"step": 8}\n\xff\xfe\n{"step": 9, "tokens": 9, "validation": 3, "sample": 4}\n{"step": 10, "lo'
        )
    markdown, page, written = report_of(run)
    (note,) = page.texts["blockquote"]
    assert "6 lines of metrics.jsonl are damaged and were left out" in note
    assert "skipped step 6 (not a finite number: loss nan)" in note
    assert f"resume it with rmkv train --resume --run {run}" in note
    assert written.runs["first"]["bad_steps"] == 1
    assert "nan" not in section(markdown, "Figures")
    assert "bad steps" in (run / "report" / "index.html").read_text()


def test_a_run_without_validation_and_one_without_a_step_have_reports(run):
    write_records(run, [record for record in records_of(run) if "validation" not in record])
    markdown, _, _ = report_of(run)
    assert "There has been no validation yet" in section(markdown, "Curves")
    assert "No validation has written a sample. To generate a text: `rmkv generate --model" in section(
        markdown, "Samples"
    )
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    markdown, page, written = report_of(run)
    assert "has not recorded a step yet" in page.texts["blockquote"][0]
    assert "No step has been recorded yet" in section(markdown, "Curves")
    assert {path.name for path in (run / "report").iterdir()} == {"index.html", "report.md"}  # no older picture
    assert written.runs["first"]["steps"] == 0


def test_other_files_beside_a_report_stay(run):
    (run / "report").mkdir()
    (run / "report" / ".DS_Store").write_text("a file browser's")
    report_of(run)
    theirs = {"loss-annotated.png": "mine", "notes.md": "mine", ".DS_Store": "a file browser's"}
    for name, text in theirs.items():
        (run / "report" / name).write_text(text)
    (run / "metrics.jsonl").unlink()
    report_of(run)
    assert {path.name for path in (run / "report").iterdir()} == {"index.html", "report.md", *theirs}
    assert {name: (run / "report" / name).read_text() for name in theirs} == theirs


def test_a_folder_with_a_report_of_something_else_is_not_written_into(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("# My report\n")
    with pytest.raises(UserError, match="is not empty and has no report"):
        write_report([run], tmp_path / "mine")
    assert (tmp_path / "mine" / "report.md").read_text() == "# My report\n"


def test_a_report_that_was_cut_off_can_be_written_again(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_records(run, [{"step": 1, "tokens": 8, "loss": 2.5}])  # one picture
    with monkeypatch.context() as patch:
        patch.setattr(Picture, "write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report_of(run)
    (run / "report" / ".index.html.1234.part").write_text("<!doc")  # what a killed process leaves
    assert report_of(run)[1].texts["h1"] == ["Report of first"]


def test_data_that_no_longer_exist_are_named(run):
    text = (run / "config.toml").read_text().replace(str(data_of(run)), str(run / "gone"))
    (run / "config.toml").write_text(text)
    assert f"no longer in `{run / 'gone'}`" in section(report_of(run)[0], "Data")


def test_a_run_that_cannot_be_reported_is_an_error(run, monkeypatch):
    def error(folders, out=run / "report"):
        with pytest.raises(UserError) as raised:
            write_report(folders, out)
        return str(raised.value)

    assert error([run / "absent"]) == f"{run / 'absent'}: no such folder; give a run's folder"
    assert "is not a run (it has no config.toml)" in error([run.parent])
    assert "is given twice" in error([run, run / ".." / run.name])
    assert "is not empty and has no report; choose another --out" in error([run], run)
    assert "is not empty" in error([run], run / "config.toml")
    assert not (run / "report").exists()
    (run / "evaluations").mkdir()
    (run / "evaluations" / "mine.json").write_text("{}")
    assert "mine.json: is not an evaluation of this version of rmkv; remove it" in error([run])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -c constraints.txt -e '.[plot]'" in error([run])
