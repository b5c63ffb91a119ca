"""The commands and code of the README work as it says."""

import re
from pathlib import Path

from documented import blocks, session

README = Path(__file__).parents[1] / "README.md"


def test_it_starts_with_the_two_commands():
    assert re.findall(r"^    (make \w+) ", README.read_text(encoding="utf-8"), re.MULTILINE) == [
        "make demo",
        "make test",
    ]


def test_the_figures_show_the_results_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(README.parent / "docs")
    from make_figure import curves, evidence

    assert (README.parent / "docs/evidence.svg").read_text(encoding="utf-8") == evidence()
    assert (README.parent / "docs/curves.svg").read_text(encoding="utf-8") == curves()


def test_the_python_example_runs(capsys):
    (example,) = blocks(README, "python")
    exec(example, {})
    assert re.fullmatch(r"[\d,]+ parameters, a state of [\d,]+ bytes\n", capsys.readouterr().out)


def test_the_commands_run_in_their_order(forker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    for i in range(100):
        Path(f"books/{i}.txt").write_text(f"Book {i}. " + "The quick brown fox jumps over the lazy dog. " * 20)
    for command in session(README):
        words = command.words
        if words[0] == "serve":  # until it is stopped: tests/serving
            continue
        if words[0] == "train":  # the same, but shorter
            words += ["--set", "train.tokens=3000", "--set", "train.segments_max=2"]
        done = forker.run(*words)
        assert done.returncode == 0, f"{command.line}\n{done.stderr}"
        assert done.stdout
