"""A dry run estimates the cost of a run and leaves nothing; a profile leaves a trace and does not change runs."""

import gzip
import json
import tempfile

import pytest
from small_run import error_of, written_by

from rmkv_cli.config import dump_toml, load_mix
from rmkv_cli.errors import UserError
from rmkv_cli.model import RMKV
from rmkv_cli.training import dry_run, profile, train
from rmkv_cli.training.disk import checkpoint_bytes
from rmkv_cli.training.memory import total_memory


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left(folder):
    """Return what is in it, but for the cache that torch may make on its first use."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["make_config", "streamed"])
def test_a_dry_run_estimates_the_cost_of_the_run_and_leaves_nothing(way, request, tmp_path, scratch):
    config = request.getfixturevalue(way)(tokens=1500)
    report = dry_run(config, tmp_path / "runs" / "run", price=2.0)
    assert left(scratch) == []
    assert not (tmp_path / "runs").exists()
    assert report["parameters"] == RMKV(config.model).count_parameters()
    assert report["hours"] == pytest.approx(1500 / report["tokens_per_second"] / 3600)
    assert report["cost"] == 2 * report["hours"]
    assert report["disk_bytes"]["needed"] == 5 * checkpoint_bytes(config)  # 3, the best, and the one being written
    assert 0 < report["memory_bytes"]["peak"] < report["memory_bytes"]["total"] == total_memory("cpu")
    steps = train(config, tmp_path / "runs" / "run").step
    assert report["steps"] == pytest.approx(steps, rel=0.2)


def test_a_stream_that_ends_within_a_dry_run_is_reported(streamed, data, tmp_path, scratch):
    mix = load_mix(data.parent / "mix.toml")
    story = mix.sources[0].model_copy(update={"when_dry": "stop"})
    (data.parent / "mix.toml").write_text(dump_toml(mix.model_copy(update={"sources": [story], "phases": []})))
    with pytest.raises(UserError, match="before the trial steps were complete; give more data"):
        dry_run(streamed(segments_min=500, segments_max=500), tmp_path / "run")


def test_a_dry_run_finds_what_is_wrong(make_config, tmp_path, scratch):
    for keys, message in (
        ({"model": {"vocab_size": 100}}, r"its tokenizer has \d+ tokens, but model\.vocab_size = 100"),
        (
            {"model": {"segment_length": 10**9}},
            r"training needs about [\d,]+\.\d GB of memory, but the device has [\d,]+\.\d GB",
        ),
        ({"data": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(UserError, match=message):
            dry_run(make_config(**keys), tmp_path / "run")
    run = train(make_config(tokens=100), tmp_path / "run").run
    with pytest.raises(UserError, match="a run already exists here"):
        dry_run(make_config(), run)
    assert left(scratch) == []


@pytest.mark.slow
def test_a_profile_leaves_a_trace_and_the_run_as_it_is(make_config, tmp_path, scratch):
    config, run = make_config(tokens=300, batch_size=4, micro_batch_size=2), tmp_path / "run"
    report = profile(config, run, steps=2)
    assert report["rows"] == 2
    assert left(scratch) == []
    assert [path.name for path in run.iterdir()] == ["profile"]
    with gzip.open(report["trace"], "rt") as file:
        named = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert named.count("_CrossEntropy") == 2  # two steps
    names = set(named)
    shares = [operation["share"] for operation in report["operations"]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert {operation["name"] for operation in report["operations"]} <= names
    with pytest.raises(UserError, match="profile: already exists"):
        profile(config, run, steps=2)

    train(config, run)  # can begin beside it
    (run / "profile" / "trace.json.gz").rename(tmp_path / "trace.json.gz")
    (run / "profile").rmdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    profile(config, run, steps=1)
    assert {path: path.stat().st_mtime_ns for path in before} | {run: 0} == before | {run: 0}


def test_on_the_command_line(make_config, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.toml"
    config.write_text(dump_toml(make_config()))
    given = ("train", "--config", config, "--run", tmp_path / "run")
    report = json.loads(written_by(monkeypatch, capsys, *given, "--dry-run", "--price", "3", "--json").out)
    assert report["cost"] == 3 * report["hours"]
    shown = written_by(monkeypatch, capsys, *given, "--dry-run").out
    assert f"{report['parameters']:,}" in shown
    assert "cost" not in shown
    shown = written_by(monkeypatch, capsys, *given, "--profile", "1").out
    trace = tmp_path / "run" / "profile" / "trace.json.gz"
    assert shown.endswith(f"1 step of one micro-batch each (4 rows of 2 segments); trace: {trace}\n")
    assert "use a single process" in error_of(monkeypatch, capsys, *given, "--dry-run", "--nproc", "2")
    with monkeypatch.context() as started_by_torchrun:
        started_by_torchrun.setenv("RANK", "0")
        assert "use a single process" in error_of(monkeypatch, capsys, *given, "--profile", "1")
    assert "only one of them" in error_of(monkeypatch, capsys, *given, "--dry-run", "--profile", "1")
    assert "--price needs --dry-run" in error_of(monkeypatch, capsys, *given, "--price", "1")
