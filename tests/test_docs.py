"""The docs are true: figures match the command beside them, and each fault names its test."""

import ast
import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import count_trained, training_memory, tuning_memory
from rmkv_cli.model.precision import parameter_dtype
from rmkv_cli.training.utilization import training_budget

ROOT = Path(__file__).parents[1]


@cache
def bench(name):
    """Definitions of a benchmark, imported only once, because that takes seconds."""
    return runpy.run_path(str(ROOT / "benchmarks" / name))


@pytest.fixture
def tables(monkeypatch, capsys):
    """Return the output of `python benchmarks/NAME table`."""

    def run(name, *studies):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr("sys.argv", [name, "table", *studies])
        bench(name)["main"]()
        return capsys.readouterr().out.strip()

    return run


@pytest.mark.parametrize(
    ("study", "page"),
    [*((study, "memory.md") for study in ("recall", "copy", "needle", "facts", "text")), ("short", "training.md")],
)
def test_tables_match_the_benchmark_output(tables, study, page):
    output = tables("memory.py", study)
    assert "| slots and stores |" in output
    assert output in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_the_table_of_other_models_matches_the_benchmark_output(tables):
    pytest.importorskip("transformers")
    output = tables("quality.py")
    assert "| RMKV |" in output
    for table, page in zip(output.split("\n\n"), ("benchmarks.md", "benchmarks.md", "decisions.md"), strict=True):
        assert table in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_the_table_of_the_small_conversion_matches_the_benchmark_output(tables):
    shown = tables("convert_small.py")
    assert "| the default |" in shown
    assert shown in (ROOT / "docs/distillation.md").read_text(encoding="utf-8")


def test_the_tables_of_the_conversion_match_the_benchmark_output(tables):
    shown = tables("convert.py")
    assert "| distilled, " in shown
    assert shown in (ROOT / "docs/convert.md").read_text(encoding="utf-8")


def test_the_table_of_reinforcement_matches_the_benchmark_output(tables):
    page = (ROOT / "docs/reinforcement.md").read_text(encoding="utf-8")
    shown = tables("reinforce.py").split("\n\n")
    assert len(shown) == 2
    assert all(table.strip() in page for table in shown)


def test_the_table_of_synthetic_data_matches_the_benchmark_output(tables):
    shown = tables("synthetic.py")
    assert "| verified pairs | 2 |" in shown
    assert shown in (ROOT / "docs/synthetic.md").read_text(encoding="utf-8")


def test_each_documented_message_and_fault_names_a_test_that_checks_its_words():
    lines = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "::" in line]
    messages = [row for row in rows if len(row) == 3]  # what is seen, what to do, test
    faults = [row for row in rows if len(row) == 5]  # fault, what is seen, exit code, lost, test
    assert len(messages) + len(faults) == len(rows)
    assert len({fault for fault, *_ in faults}) >= 20
    assert len({seen for seen, *_ in messages}) >= 10
    for seen, place in [(seen, place) for seen, _, place in messages] + [(row[1], row[4]) for row in faults]:
        file, _, test = place.strip("`").partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert test in functions, f"{seen}: {file} has no {test}"
        plain = source.replace("\\", "")  # of what is matched as a pattern
        for quoted in re.findall(r"`(.*?)`", seen):
            for words in quoted.split("…"):
                assert words.strip() in plain, f"{seen}: {file} does not ask for {words!r}"


def test_the_hours_match_params():
    output = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    small, large = (training_budget(load_config(preset_path(name))) for name in ("125m", "600m"))
    assert f"at an assumed MFU of {small['assumed_mfu']:.0%}" in output
    for card, hours in small["hours"].items():
        assert f"| {card} | {hours:,.1f} | {large['hours'][card]:,.1f} |\n" in output


def test_the_megabytes_of_the_weights_match_the_presets():
    output = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.,]+) \| ([\d.,]+) \|$", output, re.MULTILINE)
    assert len(rows) == 3
    for name, *cells in rows:
        with torch.device("meta"):
            parameters = dict(RMKV(load_config(preset_path(name)).model).named_parameters())
        for dtype, cell in zip((torch.float32, torch.bfloat16), cells, strict=True):
            size = sum(x.numel() * parameter_dtype(key, dtype).itemsize for key, x in parameters.items())
            assert cell == f"{size / 1e6:,.1f}"


def test_the_gigabytes_of_what_is_trained_match_params():
    page = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
    config = load_config(preset_path("600m"))
    tuned = tuning_memory(config, 4, 8192)
    assert f'| `"all"`, with Muon | {tuned["all"] / 1e9:.1f} GB |' in page
    assert f'| `"adapters"`, of rank 16 | {tuned["adapters"] / 1e9:.1f} GB |' in page
    assert f'| `["memory start"]` | {tuned["memory start"] / 1e9:.1f} GB |' in page
    start = config.train.model_copy(update={"trainable": ["memory start"]})
    start = sum(count_trained(config.model, start).values())
    assert f"for `600m` {start / 1e6:.1f}M numbers, {4 * start / 1e6:.1f} MB" in page


def test_the_gigabytes_of_the_cards_match_params():
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 3
    for count, *cells in rows:
        for preset, cell in zip(("125m", "600m"), cells, strict=True):
            config = load_config(preset_path(preset), [f"train.micro_batch_size={count}"])
            row = config.train.segments_max * config.model.segment_length
            assert cell == f"{training_memory(config.model, config.train, int(count), row).total / 1e9:.1f}"
