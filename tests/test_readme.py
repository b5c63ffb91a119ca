"""What the README tells the reader to type does what it says."""

import json
import re
from pathlib import Path

from documented import blocks, session

README = Path(__file__).parents[1] / "README.md"


def test_it_starts_with_the_two_commands():
    assert re.findall(r"^    (make \w+) ", README.read_text(encoding="utf-8"), re.MULTILINE) == [
        "make demo",
        "make test",
    ]


def test_the_python_example_runs(capsys):
    (example,) = blocks(README, "python")
    exec(example, {})
    assert re.fullmatch(r"[\d,]+ parameters, a state of [\d,]+ bytes\n", capsys.readouterr().out)


def test_the_commands_run_in_their_order(forker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mix, task = blocks(README, "toml")
    Path("mix.toml").write_text(mix)
    Path("books").mkdir()
    for i in range(100):
        Path(f"books/{i}.txt").write_text(f"Book {i}. " + "The quick brown fox jumps over the lazy dog. " * 20)
    with Path("worked.jsonl").open("w") as file:
        for i in range(200):
            worked = {"prompt": f"What is {i} + 2?", "response": f"<think>{i} + 2 = {i + 2}.</think>{i + 2}"}
            file.write(json.dumps(worked) + "\n")
    Path("prompts.jsonl").write_text('{"prompt": "Book"}\n{"prompt": "The quick"}\n')
    for command in session(README):
        words = command.words
        if words[0] == "serve":  # until it is stopped: tests/serving
            continue
        if words[0] == "train":  # the same, but shorter
            words += ["--set", "train.tokens=3000", "--set", "train.segments_max=2"]
        done = forker.run(*words, stdin=b"Hello.\n" if words[0] == "chat" else b"")
        assert done.returncode == 0, f"{command.line}\n{done.stderr}"
        assert done.stdout
    Path("task.toml").write_text(task.replace("4_000_000", "9_000"))
    done = forker.run("data", "mix", "task.toml", "--tokenizer", "tokenizer.json", "--out", "task")
    assert done.returncode == 0, done.stderr
