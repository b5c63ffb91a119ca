"""Generate a text for each line of a JSONL file of prompts."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rmkv_cli.data.chat import pieces_of, read_messages
from rmkv_cli.errors import UserError, one_line
from rmkv_cli.files import HEAD, LARGE, require_file, require_new, sha256, text_fault, write_text
from rmkv_cli.generation.decoder import Decoder
from rmkv_cli.generation.generate import together
from rmkv_cli.generation.hashes import model_hash
from rmkv_cli.generation.notes import load_notes
from rmkv_cli.generation.prompt import Prompt, read_prompt, read_prompts, require_fit, require_positions
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.text import StopReason, Text
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Piece, Tokenizer


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of prompts, each with either a `prompt` (text) or `messages` (a conversation).

    Raises:
        UserError: the file is absent or empty, or lines are invalid; the message lists up to ten of them.
    """
    require_file(path, LARGE)
    with path.open("rb") as begun:
        if what := text_fault(begun.read(HEAD)):
            raise UserError(f"{path}: {what}")
    lines, wrong = [], []
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, text in enumerate(file, 1):
                if text.strip():
                    try:
                        lines.append(json.loads(text))
                        pieces(lines[-1])
                        _require_writable(lines[-1])
                    except (ValueError, RecursionError) as error:
                        wrong.append(f"{path}:{number}: {error}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not valid UTF-8: {error.reason}") from None
    if wrong:
        more = f"\nand {len(wrong) - 10} more lines" if len(wrong) > 10 else ""
        raise UserError("\n".join(wrong[:10]) + more)
    return lines


def pieces(line: Any, tokenizer: Tokenizer | None = None, after: bool = False) -> tuple[Piece, ...]:
    """Return the pieces of a line's prompt (see `pieces_of`); raise ValueError if it has none."""
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError('should be an object with either "prompt" or "messages"')
    if "messages" in line:
        return pieces_of(read_messages(line["messages"]), tokenizer, after)
    if not isinstance(line["prompt"], str):
        raise ValueError('"prompt" should be a string')
    return (line["prompt"],)


def _require_writable(line: dict[str, Any]) -> None:
    """Raise `ValueError` for a lone surrogate, which JSON can spell and no UTF-8 file can contain."""
    try:
        json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"contains a lone surrogate, U+{ord(error.object[error.start]):04X}") from None


def write_lines(
    model: RMKV,
    tokenizer: Tokenizer,
    lines: Sequence[dict[str, Any]],
    out: Path,
    configs: Sequence[SamplingConfig],
    max_tokens: int,
    stop: Sequence[str],
    decoder: Decoder,
    advance: Callable[[float], None] = lambda texts: None,
    notes: Path | None = None,
) -> tuple[int, list[str]]:
    """Generate a text for each line's prompt with each of the configs, one per lane of the decoder at a time.

    `out` gets one line per text, in the order of the prompts: the prompt's own keys, `text`, `tokens`, `stop_reason`
    and `seed`. A text that an error ended, or whose prompt cannot be read, has the stop reason "error" and a message
    in `error`; the other texts continue.

    Unfinished output is stored in OUT.part; a call with the same model, prompts and settings
    resumes from it. `advance` is called with 1 for each finished text. With `notes`, each prompt follows the text that
    `rmkv read` saved in that file.

    Returns:
        The number of tokens generated in this call, and the error messages, in the order of `out`.

    Raises:
        UserError: `out` exists; OUT.part belongs to another model, prompts or settings; the model cannot generate, or
            the tokenizer does not fit it; errors of `Text` and `load_notes`.
    """
    require_fit(model, tokenizer)
    require_new(out)
    earlier = None if notes is None else load_notes(notes, model, tokenizer)
    part = out.with_name(out.name + ".part")
    job = [
        lines,
        [config.model_dump() for config in configs],
        max_tokens,
        list(stop),
        tokenizer.hash,
        model_hash(model),
        *([] if notes is None else [sha256(notes)]),
    ]
    written = _begin(part, hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest())
    advance(len(written))
    places: dict[Text, tuple[int, int]] = {}

    def texts() -> Iterator[Text]:
        todo = [i for i in range(len(lines)) if any((i, c) not in written for c in range(len(configs)))]
        for start in range(0, len(todo), decoder.lanes):
            for i, prompt in readings(todo[start : start + decoder.lanes]):
                is_answer = "messages" in lines[i]
                for c, config in enumerate(configs):
                    if (i, c) not in written:
                        text = Text(tokenizer, prompt, config, max_tokens, stop, answer=is_answer)
                        places[text] = i, c
                        yield text

    def readings(group: Sequence[int]) -> Iterator[tuple[int, Prompt]]:
        """Yield the prompts of the lines, read in a batch; if one fails, record its error and read the others alone."""
        try:
            asked = [pieces(lines[i], tokenizer, after=earlier is not None) for i in group]
            if earlier is None:
                prompts = read_prompts(model, tokenizer, asked)
            else:
                prompts = [read_prompt(model, tokenizer, prompt, earlier) for prompt in asked]
            for prompt in prompts:
                require_positions(model, prompt.state, max_tokens - 1)
        except Exception as error:
            if len(group) > 1:
                for i in group:
                    yield from readings([i])
                return
            for place in ((group[0], c) for c in range(len(configs))):
                if place not in written:
                    note(place, "", 0, None, error)
        else:
            yield from zip(group, prompts, strict=True)

    def note(
        place: tuple[int, int], text: str, tokens: int, reason: StopReason | None, fault: Exception | None
    ) -> None:
        i, c = place
        figures: dict[str, Any] = {"tokens": tokens, "stop_reason": reason, "seed": configs[c].seed}
        if fault is not None:
            figures |= {"stop_reason": "error", "error": one_line(fault) or type(fault).__name__}
        written[place] = lines[i] | {"text": text} | figures
        file.write(json.dumps([place, written[place]], ensure_ascii=False) + "\n")
        file.flush()
        advance(1)

    tokens = 0
    with part.open("a", encoding="utf-8") as file:
        for text in together(decoder, texts()):
            note(places.pop(text), text.text, len(text.ids), text.stop_reason, text.fault)
            tokens += len(text.ids)
    in_order = [line for _, line in sorted(written.items())]
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in in_order))
    part.unlink()
    return tokens, [str(line.get("error")) for line in in_order if line.get("stop_reason") == "error"]


def _begin(part: Path, job: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the texts that an earlier call stored in `part`, by line and config; create the file if it is absent."""
    head = json.dumps({"job": job}) + "\n"
    if not part.exists():
        write_text(part, head)
        return {}
    if not part.is_file() or part.stat().st_size > LARGE:
        raise UserError(f"{part}: is not the unfinished output of an earlier run; remove it, or choose another --out")
    # Split bytes: str.splitlines would also split at U+2028 and the like, which JSON does not escape.
    first, *rest = part.read_bytes().splitlines(keepends=True) or [b""]
    if first != head.encode():
        raise UserError(
            f"{part}: was started with a different model, prompts or settings; remove it, or choose another --out"
        )
    whole = [line for line in rest if line.endswith(b"\n")]  # the last line may be incomplete
    try:
        written = {(int(i), int(c)): dict(line) for (i, c), line in map(json.loads, whole)}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{part}: is damaged; remove it to generate the texts again") from None
    if len(whole) < len(rest):
        write_text(part, head + b"".join(whole).decode())
    return written
