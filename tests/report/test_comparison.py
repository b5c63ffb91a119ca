"""Several runs side by side."""

import json
import re
import shutil

import pytest
from report_pages import Page, data_of, section
from trained_run import make_data, train_small_run

from rmkv_cli.report import write_report


def compare(*runs):
    written = write_report(runs, runs[0].parent / "both")
    return written.markdown.read_text(encoding="utf-8"), Page(written.html), written


@pytest.mark.slow
def test_curves_figures_and_what_differs(evaluated, tmp_path):
    run, found = evaluated
    other = train_small_run(data_of(run), tmp_path / "other", memory={"slots": 4}, tokens=400)
    markdown, page, written = compare(run, other)
    assert page.texts["h1"] == ["Comparison of first, other"]
    assert list(written.runs) == ["first", "other"]
    figures = section(markdown, "Figures")
    assert "|  | first | other |" in figures
    losses = [f"{its['validation_loss']:.4f}" for its in written.runs.values()]
    assert f"| validation loss, last, nats per token | {losses[0]} | {losses[1]} |" in figures
    assert (
        f"| cost of resetting the memory, nats per token | {found['validation'].memory.reset_cost:+.4f} |  |" in figures
    )
    scores = section(markdown, "Final evaluation")
    assert "| bits per byte | first |" in scores
    assert f"| story | {found['validation'].by_source['story'].loss:.4f} |" in scores
    assert re.search(r"!\[validation loss.*first: from .*; other: from .*\]\(validation-loss\.png\)", markdown)
    config = section(markdown, "Config")
    assert "| model.memory.slots | 2 | 4 |\n| train.tokens | 600 | 400 |\n" in config
    assert "learning_rate = 0.01" in config
    assert config.count("learning_rate = 0.01") == 1
    assert "slots =" not in config
    assert section(markdown, "Data").count("prepared in") == 1
    assert "different" not in "".join(page.texts["blockquote"])


@pytest.mark.slow
def test_other_data_and_tokenizers_are_warned_of(run, tmp_path):
    data = make_data(tmp_path / "else", source="else", vocab=275)
    other = train_small_run(data, tmp_path / "other", tokens=300)
    (note,) = compare(run, other)[1].texts["blockquote"]
    assert "The runs have different tokenizers. Their losses in nats per token are not comparable" in note
    assert "The runs have different data." in note
    assert section(compare(run, other)[0], "Data").count("prepared in") == 2


def test_runs_of_the_same_name_are_distinguished_by_their_folders(run, tmp_path):
    other = tmp_path / "else" / run.name
    shutil.copytree(run, other, symlinks=True)
    markdown, _, written = compare(run, other)
    assert list(written.runs) == [str(run), str(other)]
    assert "None." in section(markdown, "Config")
    json.dumps(written.runs)
