import json

import pytest
from small_run import error_of
from trained_run import make_data, train_small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    return train_small_run(make_data(place / "story"), place / "first", tokens=300)


@pytest.mark.slow
def test_the_report_s_paths_are_printed_and_json_contains_the_figures(run, printed, tmp_path, monkeypatch):
    assert printed("report", run) == f"{run}/report/index.html\n{run}/report/report.md\n"
    output = json.loads(printed("report", run, "--out", tmp_path / "mine", "--json"))
    assert output["html"] == str(tmp_path / "mine" / "index.html")
    assert output["runs"]["first"]["tokens"] >= 300
    assert (run / "report" / "report.md").read_text() == (tmp_path / "mine" / "report.md").read_text()
    other = train_small_run(run.parent / "story" / "data", tmp_path / "second", tokens=300)
    monkeypatch.chdir(tmp_path)
    assert printed("report", run, other) == "report/index.html\nreport/report.md\n"


def test_bad_input_is_one_line(run, monkeypatch, capsys):
    assert "no such folder; give a run's folder" in error_of(monkeypatch, capsys, "report", run / "absent")
    assert "is not a run (it has no config.toml)" in error_of(monkeypatch, capsys, "report", run / "checkpoints")
    out = ("--out", run / "checkpoints")
    assert "is not empty and has no report" in error_of(monkeypatch, capsys, "report", run, *out)
