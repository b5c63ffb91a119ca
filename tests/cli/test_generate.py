import inspect
import io
import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from small_run import TEXT, error_of, rmkv, save_small_model

from rmkv_cli.cli import generate as command
from rmkv_cli.cli.main import main
from rmkv_cli.config import MemoryConfig
from rmkv_cli.generation import SamplingConfig, Text, generate, read_prompt, save_notes
from rmkv_cli.tokenizer import Special


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    return folder, *save_small_model(folder)


def run(monkeypatch, capsys, *arguments, stdin=b""):
    """Run the command in this process; return what it wrote to stdout and to stderr."""
    monkeypatch.setattr(sys, "argv", ["rmkv", "generate", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr()


@pytest.mark.slow
def test_the_command_generates_what_the_library_generates(saved):
    folder, model, tokenizer = saved
    expected = generate(model, tokenizer, TEXT, SamplingConfig(seed=7), 30)
    text = "".join(expected)
    done = rmkv("generate", "--model", folder, "--max-tokens", 30, "--seed", 7, stdin=TEXT.encode() + b"\n")
    assert done.returncode == 0
    assert done.stdout == text + "\n"
    assert "seed 7" in done.stderr


def test_json_of_several_samples(saved, monkeypatch, capsys):
    folder, model, tokenizer = saved
    options = ["--model", folder, "--prompt", TEXT, "--seed", 7, "--num-samples", 3, "--max-tokens", 30]
    figures = json.loads(run(monkeypatch, capsys, *options, "--top-k", 20, "--json").out)
    assert figures["prompt_tokens"] == len(tokenizer.encode_document([TEXT]))
    assert figures["sampling"]["top_k"] == 20
    assert figures["tokens_per_second_reading"] > 0
    assert figures["tokens_per_second_writing"] > 0
    assert [sample["seed"] for sample in figures["samples"]] == [7, 8, 9]
    for sample in figures["samples"]:
        expected = generate(model, tokenizer, TEXT, SamplingConfig(seed=sample["seed"], top_k=20), 30)
        assert sample["text"] == "".join(expected)
        assert (sample["tokens"], sample["stop_reason"]) == (30, "length")


def test_samples_are_separated_on_stderr(saved, monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--model", saved[0], "--prompt", "", "--num-samples", 2, "--seed", 1)
    assert "--- 1 of 2, seed 1 ---" in shown.err
    assert "--- 2 of 2, seed 2 ---" in shown.err
    assert "---" not in shown.out


def test_the_prompt_comes_from_an_option_a_file_or_standard_input(saved, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"\n\n")
    greedy = ["--model", saved[0], "--temperature", 0, "--max-tokens", 20, "--json"]
    with_newline = TEXT + "\n"
    for arguments, stdin in (
        (["--prompt", with_newline], b"not read"),
        (["--file", tmp_path / "prompt.txt"], b"not read"),
        (["--file", "-"], (with_newline + "\n").encode()),
        ([], (with_newline + "\n").encode()),
    ):
        assert json.loads(run(monkeypatch, capsys, *greedy, *arguments, stdin=stdin).out)["prompt"] == with_newline
    empty = json.loads(run(monkeypatch, capsys, *greedy).out)
    assert (empty["prompt"], empty["prompt_tokens"]) == ("", 1)


def test_line_ends_of_a_file_become_newlines_and_a_wrong_encoding_is_reported(saved, monkeypatch, capsys, tmp_path):
    options = ["--model", saved[0], "--max-tokens", 1, "--json"]
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"one\r\ntwo\rthree\n\r\n")
    for arguments, stdin in ((["--file", file], b""), ([], file.read_bytes())):
        figures = json.loads(run(monkeypatch, capsys, *options, *arguments, stdin=stdin).out)
        assert figures["prompt"] == "one\ntwo\nthree\n"
    assert json.loads(run(monkeypatch, capsys, *options, "--prompt", "a\r\nb").out)["prompt"] == "a\r\nb"
    file.write_bytes('{"prompt": "a"}'.encode("utf-16"))
    for more in ([], ["--out", tmp_path / "out.jsonl"]):
        line = error_of(monkeypatch, capsys, "generate", *options, "--file", file, *more)
        assert line.startswith(f"error: {file}: is UTF-16, where UTF-8 is expected; convert it: iconv -f UTF-16")


def test_stop_strings(saved, monkeypatch, capsys):
    options = ["--model", saved[0], "--prompt", "the", "--seed", 3]
    text = run(monkeypatch, capsys, *options).out
    first, second = text[20:23], text[10:12]
    end = min(text.find(first), text.find(second))
    cut = run(monkeypatch, capsys, *options, "--stop", first, "--stop", second)
    assert cut.out == text[:end] + "\n"
    assert "ended by stop" in cut.err


@pytest.mark.slow
def test_the_text_is_streamed_and_ctrl_c_ends_it_cleanly(saved):
    arguments = ["generate", "--model", str(saved[0]), "--prompt", "", "--max-tokens", "100000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "rmkv_cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert b"Traceback" not in err


def test_bad_input_is_one_line(saved, monkeypatch, capsys, tmp_path):
    def error(*arguments, model=saved[0]):
        return error_of(monkeypatch, capsys, "generate", "--model", model, *arguments)

    (tmp_path / "binary").write_bytes(b"text \xff")
    (tmp_path / "empty").touch()
    for arguments, message in (
        (["--prompt", "a", "--file", "b"], "either --prompt or --file, not both"),
        (["--file", tmp_path / "absent"], "no such file"),
        (["--file", tmp_path / "empty"], "is empty"),
        (["--file", tmp_path / "binary"], "is not valid UTF-8: byte 0xff at offset 5"),
        (["--prompt", "a\udc80"], "lone surrogate"),
        (["--prompt", "a", "--top-p", "2"], "sampling: top_p: should be less than or equal to 1, got 2"),
        (["--prompt", "a", "--temperature", "-1"], "sampling: temperature: should be"),
        (["--prompt", "a", "--repetition-penalty", "1e-40"], "sampling: repetition_penalty: should be"),
        (["--prompt", "a", "--frequency-penalty", "3"], "sampling: frequency_penalty: should be"),
        (["--prompt", "a", "--seed", "-1"], "sampling: seed: should be"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens: should be 1 or more"),
        (["--prompt", "a", "--num-samples", "0"], "num_samples: should be 1 or more"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
    ):
        assert message in error(*arguments)
    assert "no such folder" in error("--prompt", "a", model=tmp_path / "absent")
    save_small_model(tmp_path / "published", memory=MemoryConfig(slots=2, carry="layers", store=0))
    assert "this model cannot generate" in error("--prompt", "a", model=tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in error("--prompt", "a", model=tmp_path / "published")


def test_the_options_default_to_the_librarys_values():
    defaults = {name: p.default for name, p in inspect.signature(command.generate).parameters.items()}
    library = SamplingConfig().model_dump(exclude={"seed"})
    assert {name: defaults[name] for name in library} == library


def test_stats_show_the_share_of_the_memory_bandwidth(saved, monkeypatch, capsys):
    monkeypatch.setattr("rmkv_cli.generation.bandwidth.BUFFER", 1 << 20)
    options = ["--model", saved[0], "--prompt", TEXT, "--seed", 7, "--max-tokens", 10, "--stats"]
    assert 0 < json.loads(run(monkeypatch, capsys, *options, "--json").out)["bandwidth_share"] < 1
    assert "of the memory bandwidth" in run(monkeypatch, capsys, *options).err


class TestManyPrompts:
    LINES = (
        {"prompt": "the cat", "id": "7\u2028"},  # which ends a line for some, and not for JSON
        {"prompt": ""},
        {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": ""}]},
        {"prompt": TEXT * 3},
    )

    @pytest.fixture
    def prompts(self, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in self.LINES))
        return path

    def options(self, saved, prompts, out):
        return ["--model", saved[0], "--file", prompts, "--out", out, "--max-tokens", 20, "--seed", 5]

    def test_each_prompt_gets_the_text_that_it_gets_alone(self, saved, prompts, tmp_path, monkeypatch, capsys):
        _, model, tokenizer = saved
        out = tmp_path / "texts.jsonl"
        options = [*self.options(saved, prompts, out), "--num-samples", 2, "--batch-size", 3, "--json"]
        figures = json.loads(run(monkeypatch, capsys, *options).out)
        written = [json.loads(line) for line in out.read_bytes().splitlines()]
        beginnings = ("the cat", "", [Special.START, "the dog", Special.END], TEXT * 3)
        expected = []
        for line, beginning in zip(self.LINES, beginnings, strict=True):
            for seed in (5, 6):
                ends = [Special.EOD, Special.START] if "messages" in line else [Special.EOD]
                alone = generate(model, tokenizer, beginning, SamplingConfig(seed=seed), 20, ends=ends)
                text = "".join(alone)
                output = {"text": text, "tokens": len(alone.ids), "stop_reason": alone.stop_reason, "seed": seed}
                expected.append(line | output)
        assert written == expected
        assert (figures["texts"], figures["tokens"]) == (8, sum(line["tokens"] for line in written))
        assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "texts.jsonl"}

    def test_each_prompt_follows_the_state(self, saved, prompts, tmp_path, monkeypatch, capsys):
        _, model, tokenizer = saved
        notes, out = tmp_path / "notes.rmkv", tmp_path / "texts.jsonl"
        earlier = read_prompt(model, tokenizer, TEXT)
        save_notes(notes, earlier, model, tokenizer)
        run(monkeypatch, capsys, *self.options(saved, prompts, out), "--state", notes)
        for line, beginning in zip(map(json.loads, out.read_bytes().splitlines()), ("the cat", ""), strict=False):
            prompt = read_prompt(model, tokenizer, beginning, earlier)
            alone = generate(model, tokenizer, prompt, SamplingConfig(seed=5), 20)
            assert line["text"] == "".join(alone)

    def test_a_killed_generation_is_resumed(self, saved, prompts, tmp_path, monkeypatch, capsys):
        whole, out = tmp_path / "whole.jsonl", tmp_path / "texts.jsonl"
        run(monkeypatch, capsys, *self.options(saved, prompts, whole))
        texts, part = [], Path(f"{out}.part")

        def kill(*_):
            texts.append(1)
            if len(texts) == 3:
                with part.open("ab") as file:
                    file.write('[[3, 0], {"prompt": "cut é'.encode()[:-1])  # what a kill in the middle of a line leaves
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(command, "progress", lambda *_: nullcontext(kill))
            patch.setattr(sys, "argv", ["rmkv", "generate", *map(str, self.options(saved, prompts, out))])
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 130
        assert part.exists()
        assert not out.exists()
        assert "with a different model, prompts or settings" in error_of(
            monkeypatch, capsys, "generate", *self.options(saved, prompts, out), "--top-k", 3
        )
        save_small_model(tmp_path / "other", hidden_size=32)
        assert "with a different model, prompts or settings" in error_of(
            monkeypatch, capsys, "generate", *self.options([tmp_path / "other"], prompts, out)
        )
        again = json.loads(run(monkeypatch, capsys, *self.options(saved, prompts, out), "--json").out)
        assert out.read_text() == whole.read_text()
        assert again["tokens"] < sum(json.loads(line)["tokens"] for line in whole.read_bytes().splitlines())
        assert not part.exists()

    def broken_off(self, monkeypatch, capsys, *options):
        monkeypatch.setattr(sys, "argv", ["rmkv", "generate", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr()

    def test_a_failing_text_does_not_stop_the_others(self, saved, prompts, tmp_path, monkeypatch, capsys):
        whole, out = tmp_path / "whole.jsonl", tmp_path / "texts.jsonl"
        run(monkeypatch, capsys, *self.options(saved, prompts, whole), "--num-samples", 2)

        push = Text.push

        def broken(text, token):
            if text.config.seed == 6 and len(text.ids) == 3:
                raise RuntimeError("a fault")
            return push(text, token)

        monkeypatch.setattr(Text, "push", broken)
        shown = self.broken_off(monkeypatch, capsys, *self.options(saved, prompts, out), "--num-samples", 2, "--json")
        assert shown.err.splitlines()[-1] == f"error: {out}: 4 of 8 texts failed; the first: a fault"
        assert json.loads(shown.out)["errors"] == 4
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        right = [json.loads(line) for line in whole.read_bytes().splitlines()]
        assert [line for line in lines if line["seed"] == 5] == [line for line in right if line["seed"] == 5]
        for line, other in zip(lines, right, strict=True):
            if line["seed"] == 6:
                assert (line["stop_reason"], line["error"]) == ("error", "a fault")
                assert other["text"].startswith(line["text"])
        assert not Path(f"{out}.part").exists()

    def test_an_unreadable_prompt_does_not_stop_the_others(self, prompts, tmp_path, monkeypatch, capsys):
        """One prompt exceeds the model's learned positions; another leaves too few of them for the text."""
        (tmp_path / "short").mkdir()
        save_small_model(tmp_path / "short", position="learned", max_position_embeddings=80)
        long = [{"prompt": "the cat " * 100}, {"prompt": TEXT * 4}]
        out, alone = tmp_path / "texts.jsonl", tmp_path / "alone.jsonl"
        run(monkeypatch, capsys, *self.options([tmp_path / "short"], prompts, alone))
        prompts.write_text("".join(json.dumps(line) + "\n" for line in (*long, *self.LINES)))
        shown = self.broken_off(monkeypatch, capsys, *self.options([tmp_path / "short"], prompts, out))
        assert f"{out}: 2 of 6 texts failed; the first: the prompt and the generated text exceed" in shown.err
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert lines[2:] == [json.loads(line) for line in alone.read_bytes().splitlines()]
        for line, prompt in zip(lines, long, strict=False):
            assert (line["prompt"], line["text"], line["tokens"]) == (prompt["prompt"], "", 0)
            assert "(max_position_embeddings)" in line["error"]

    def test_bad_input_is_reported(self, saved, prompts, tmp_path, monkeypatch, capsys):
        out = tmp_path / "texts.jsonl"
        options = self.options(saved, prompts, out)
        for arguments, message in (
            (["--batch-size", 0], "batch_size: should be 1 or more"),
            (["--prompt", "a"], "--out takes its prompts from --file FILE"),
            (["--state", "a"], "a: no such file"),
        ):
            assert message in error_of(monkeypatch, capsys, "generate", *options, *arguments)
        prompts.write_text('{"prompt": "a"}\n{"text": "a"}\nno\n{"prompt": 3}\n{"prompt": "a", "id": "\\ud800"}\n')
        monkeypatch.setattr(sys, "argv", ["rmkv", "generate", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        for line, message in (
            (2, 'an object with either "prompt" or "messages"'),
            (3, "value"),
            (4, "be a string"),
            (5, "surrogate"),
        ):
            assert any(f"{prompts}:{line}: " in text and message in text for text in lines)
        prompts.write_text('{"prompt": "a"}\n')
        part = Path(f"{out}.part")
        part.write_text("")
        assert "remove it, or choose another --out" in error_of(monkeypatch, capsys, "generate", *options)
        part.unlink()
        out.touch()
        assert "already exists" in error_of(monkeypatch, capsys, "generate", *options)
