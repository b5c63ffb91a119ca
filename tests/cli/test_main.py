"""The command as a whole: help is quick and has examples, bad input is one line and exit code 2."""

import json
import os
import resource
import subprocess
import sys

import pytest
import typer.main
from small_run import error_of, rmkv, save_small_model

import rmkv_cli.__main__
from rmkv_cli.cli.main import build


def every_command(command, path=()):
    if hasattr(command, "commands"):
        for name, sub in command.commands.items():
            yield from every_command(sub, (*path, name))
    else:
        yield path, command


COMMANDS = dict(every_command(typer.main.get_command(build())))


def test_the_list_of_commands_is_complete():
    assert {" ".join(path) for path in COMMANDS} == {
        *("train", "eval", "generate", "chat", "serve", "read", "params", "count-params", "demo", "report", "merge"),
        *("quantize", "model quantize", "upcycle", "model upcycle"),
        *("model train", "model eval", "model generate", "model chat", "model serve"),
        *("model read", "model params", "model merge"),
        *("inspect memory", "export hf", "import hf", "push"),
        *("tokenizer train", "tokenizer encode", "tokenizer decode", "tokenizer inspect"),
        *("data sample", "data mix", "data inspect", "data generate"),
        *("config show", "config validate", "config list"),
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_a_description_and_an_example(path):
    command = COMMANDS[path]
    assert command.help
    assert command.epilog.startswith(f"Example: rmkv {' '.join(path).removeprefix('model ')}")


def test_help_imports_nothing_heavy():
    """Every subcommand's help, in one process that then looks at what it has imported."""
    code = f"""
import sys
import typer.main
from rmkv_cli.cli.main import build
command = typer.main.get_command(build())
for path in {[list(path) for path in COMMANDS]!r} + [[]]:
    try:
        command.main([*path, "--help"], prog_name="rmkv")
    except SystemExit as end:
        assert end.code == 0, path
heavy = {{"torch", "datasets", "pyarrow", "numpy", "tokenizers"}} & sys.modules.keys()
print("imported:", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert done.stdout.count("Example: rmkv ") == len(COMMANDS)


@pytest.mark.slow
def test_params_and_config_report_as_tables_and_as_json(printed):
    for name in ("params", "count-params"):
        report = json.loads(printed(name, "--preset", "600m", "--json"))
        assert sum(report["by_part"].values()) == report["parameters"]
    assert f"{report['parameters']:,}" in printed("params", "--preset", "600m")
    muon = ("params", "--preset", "600m", "--set", "train.optimizer=muon", "--groups", "--train")
    report = json.loads(printed(*muon, "--json"))
    groups = report["groups"]
    assert [group["optimizer"] for group in groups if group["name"] in ("attention", "norms")] == ["muon", "adamw"]
    assert sum(group["parameters"] for group in groups) == report["parameters"]
    shown = printed(*muon)
    assert all(f"{group['parameters']:,}" in shown for group in groups)
    assert all(f" {hours:,.1f} " in shown for hours in report["training"]["hours"].values())
    shown = json.loads(printed("config", "show", "--preset", "tiny", "--set", "model.memory.slots=5", "--json"))
    assert shown["model"]["memory"]["slots"] == 5
    presets = {"tiny", "125m", "600m", "600m-published", "instruct", "convert", "reinforce", "demo"}
    assert json.loads(printed("config", "list", "--json")).keys() == presets


def test_version():
    assert rmkv("--version").stdout.startswith("rmkv 0.")


def test_validate_accepts_what_show_prints(printed, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(printed("config", "show", "--preset", "125m"))
    assert printed("config", "validate", path) == f"{path}: valid\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--preset", "tny"], "--preset tny: no such preset; did you mean 'tiny'?"),
        (["train", "--preset", "tiny"], "no data: give --data DIR"),
        (["train", "--preset", "tiny", "--data", "absent"], "absent"),
        (["train"], "give a config"),
        (["train", "--resume", "--run", "absent"], "absent: no run to resume"),
        (["train", "--preset", "tiny", "--config", "x.toml"], "either --preset NAME"),
        (
            ["params", "--preset", "tiny", "--set", "memory.slots=1"],
            "--set memory.slots: unknown key; did you mean 'model.memory.slots'?",
        ),
        (["params", "--preset", "tiny", "--set", "model.memory.slot=1"], "did you mean 'model.memory.slots'?"),
        (["params", "--preset", "tiny", "--set", "zzzz=1"], "--set zzzz: unknown key; known keys are model, train"),
        (["config", "validate", "absent.toml"], "absent.toml: no such file"),
        (["generate", "--model", "absent", "--prompt", "x"], "absent: no such folder"),
        (["eval", "--model", "absent", "--data", "x"], "absent: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in error_of(monkeypatch, capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_rmkv_debug_shows_the_traceback():
    command = [sys.executable, "-m", "rmkv_cli", "params", "--preset", "tny"]
    done = subprocess.run(command, capture_output=True, text=True, env={"RMKV_DEBUG": "1", "PATH": ""})
    assert "Traceback" in done.stderr


def test_a_damaged_model_folder_is_named(monkeypatch, capsys, tmp_path):
    save_small_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = error_of(monkeypatch, capsys, "generate", "--model", tmp_path, "--prompt", "x")
    assert f"{weights}: damaged or missing weights" in line


def test_a_tokenizer_that_does_not_fit_the_model_is_named(monkeypatch, capsys, tmp_path):
    save_small_model(tmp_path, vocab_size=100)
    assert "does not fit its model" in error_of(monkeypatch, capsys, "generate", "--model", tmp_path, "--prompt", "x")


@pytest.fixture
def small_run(tmp_path, printed):
    """Prepares a mix and a config; returns the arguments that train on them, two steps a checkpoint."""
    (tmp_path / "text.txt").write_text("A line of text, and another one. " * 200)
    (tmp_path / "mix.toml").write_text(
        'validation = 0.0\n[[sources]]\nkind = "files"\nname = "t"\nweight = 1\nfiles = ["text.txt"]\n'
    )
    tokenizer = tmp_path / "tokenizer.json"
    printed("tokenizer", "train", tmp_path / "mix.toml", "--vocab-size", 300, "--out", tokenizer)
    mixing = ["data", "mix", tmp_path / "mix.toml", "--tokenizer", tokenizer, "--out", tmp_path / "data"]
    printed(*mixing, "--workers", 1)
    keys = {
        "model.vocab_size": 300, "model.hidden_size": 32, "model.num_hidden_layers": 1, "model.intermediate_size": 32,
        "model.segment_length": 8, "model.lookback": 4, "train.batch_size": 2, "train.micro_batch_size": 2,
        "train.checkpoint_every": 2, "train.eval_every": 2, "train.tokens": 300,
    }  # fmt: skip
    sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return ["--preset", "tiny", "--data", tmp_path / "data", "--run", tmp_path / "run", *sets]


@pytest.mark.slow
def test_train_from_the_command_line_and_its_json(small_run, shown, monkeypatch, capsys, tmp_path):
    done = rmkv("model", "train", *small_run, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["finished"]
    assert report["tokens"] >= 300

    def error(*arguments):
        return error_of(monkeypatch, capsys, "train", *arguments)

    assert "a run already exists here" in error(*small_run)
    resume = ["--resume", "--run", tmp_path / "run"]
    assert "training is complete" in shown("train", *resume).err
    assert "--set train.batch_size: cannot change on resume" in error(*resume, "--set", "train.batch_size=4")
    assert "contains other files and is not a run" in error(*small_run, "--run", tmp_path)


@pytest.mark.slow
def test_a_full_disk_ends_training_with_one_line_and_leaves_only_complete_checkpoints(small_run, tmp_path):
    """No file may pass 40 kB: the first checkpoint's weights are larger."""
    command = [sys.executable, "-m", "rmkv_cli", "train", *map(str, small_run)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    resumed = rmkv("train", "--resume", "--run", tmp_path / "run")  # when there is room again
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(("chosen", "policy"), [(None, "passive"), ("active", "active")])
def test_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch, chosen, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", str(chosen))
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("rmkv_cli.__main__.handle_signals", lambda: None)
    monkeypatch.setattr("rmkv_cli.cli.main.main", lambda: None)
    rmkv_cli.__main__.main()
    assert os.environ["OMP_WAIT_POLICY"] == policy
