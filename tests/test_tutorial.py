"""Every command of docs/tutorial.md works in order, with less training."""

import re
from pathlib import Path

import pytest
from documented import blocks, rmkv_stopped, session

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorial.md"
SHORTER = {
    "--set train.tokens=300000": "--set train.tokens=3000 --set train.eval_tokens=2000",
    "--set train.tokens=100000": "--set train.tokens=3000 --set train.eval_tokens=2000",
    "--max-tokens 20000": "--max-tokens 1000",
}


def but_for_numbers(text):
    return re.sub(r"[\d,.]+", "0", text)


@pytest.mark.slow
def test_a_newcomer_can_follow_it_line_by_line(forker, tmp_path, monkeypatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    (tmp_path / "first-hour").mkdir()
    monkeypatch.chdir(tmp_path / "first-hour")
    for text in blocks(PAGE, "toml"):
        Path(text.partition("\n")[0].removeprefix("# ")).write_text(text)
    commands = session(PAGE)
    assert len(commands) > 15
    for long in SHORTER:
        assert any(long in command.line for command in commands)
    for command in commands:
        for long, short in SHORTER.items():
            command.line = command.line.replace(long, short)
        if command.stopped:
            code, output = rmkv_stopped(*command.words)
            assert code == 130, output
        else:
            done = forker.run(*command.words, stdin=command.typed.encode())
            assert done.returncode == 0, f"{command.line}\n{done.stderr}"
            assert done.stdout
            output = done.stdout + done.stderr
        for line in command.shown:
            assert but_for_numbers(line) in but_for_numbers(output).splitlines(), f"{command.line}\n{output}"
    assert Path("runs/first/latest/model.safetensors").exists()
