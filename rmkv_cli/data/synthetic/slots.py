"""Fill a recipe's slots with values of a list or file, or with passages of documents."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from rmkv_cli.config import Slot
from rmkv_cli.data.blocks import START, BadRecord
from rmkv_cli.data.files import find_files
from rmkv_cli.errors import UserError
from rmkv_cli.files import LARGE, read_whole, text_fault

Draw = Callable[[int, random.Random], dict[str, str]]
"""A function that returns the texts of a slot's fields for the request with a given number."""
BREAKS = "\n\n", "\n", ". ", " "


def slot_draw(name: str, slot: Slot, base: Path, seed: int) -> Draw:
    """Return the function that fills a slot; files are relative to `base`.

    Raises:
        UserError: a file is missing, damaged or empty.
    """
    if slot.files:
        documents = [text for text in read_documents(slot.files, base) if text.strip()]
        if not documents:
            raise UserError(f"slots.{name}: its files contain no text")
        return _passages(name, slot, documents, seed)
    values = slot.values or _lines(base / slot.file) if slot.file else slot.values
    return lambda number, draw: {name: draw.choice(values)}


def read_documents(patterns: Sequence[str], base: Path) -> list[str]:
    """Return the text of each record of the files: all its strings, joined. Parts of a long text are joined too.

    Raises:
        UserError: no file matches a pattern, or a record cannot be read.
    """
    texts: list[str] = []
    for file in find_files(patterns, base):
        for _, records in file.blocks(START, ("text",)):
            for record in records:
                if isinstance(record, BadRecord):
                    raise UserError(f"{record.where}: {record.what}")
                text = "\n".join(_strings(record.columns))
                if record.part is not None and record.part.before:
                    texts[-1] += text
                else:
                    texts.append(text)
    return texts


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _strings(part)]


def _lines(path: Path) -> list[str]:
    data = read_whole(path, LARGE)
    try:
        if what := text_fault(data[:64]):
            raise UserError(f"{path}: {what}")
        lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not valid UTF-8: {error.reason}") from None
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{path}: has only empty lines")
    return found


def _passages(name: str, slot: Slot, documents: Sequence[str], seed: int) -> Draw:
    places = [(i, start, stop) for i, text in enumerate(documents) for start, stop in cut(text, slot.characters)]
    random.Random(f"{seed} {name}").shuffle(places)

    def following(document: int, start: int, characters: int) -> str:
        text = documents[document][start : start + characters]
        for i in range(1, len(documents)):
            if len(text) >= characters:
                break
            text += "\n\n" + documents[(document + i) % len(documents)]
        return text[:characters]

    def draw_passage(number: int, draw: random.Random) -> dict[str, str]:
        document, start, stop = places[number % len(places)]
        filled = {name: documents[document][start:stop]}
        if slot.following:
            filled[f"{name}_following"] = following(document, stop, draw.randint(0, slot.following))
        return filled

    return draw_passage


def cut(text: str, characters: int) -> list[tuple[int, int]]:
    """Return the bounds (start, stop) of a text's passages, each of at most `characters` characters and stripped.

    A passage ends between paragraphs if a paragraph ends in its second half; otherwise between lines, sentences or
    words.
    """
    bounds, start = [], 0
    while start < len(text):
        left = len(text) - start
        # A rest between one and two passages is halved, so that no tiny passage remains.
        size = min(characters, left) if not characters < left < 2 * characters else (left + 1) // 2
        stop = start + size
        if size < left:
            ends = (
                text.rfind(mark, start + size // 2, stop) + len(mark) for mark in BREAKS if mark in text[start:stop]
            )
            stop = next((end for end in ends if end > start + size // 2), stop)
        passage = text[start:stop]
        if passage.strip():
            bounds.append((start + len(passage) - len(passage.lstrip()), start + len(passage.rstrip())))
        start = stop
    return bounds
