"""Filter answers: by shape, verification, repetition, and contamination with evaluation sets."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rmkv_cli.config import Filters
from rmkv_cli.data.synthetic.equations import wrong_equation
from rmkv_cli.data.synthetic.requests import REFUSED, Answer
from rmkv_cli.data.synthetic.slots import read_documents

FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.S)
WORD = re.compile(r"\w+")
SHINGLE = 5
"""Words of a shingle; MinHash estimates the share of shingles that two answers have in common."""
MIN_WORDS = 5
"""Minimum words of an evaluation text. Shorter ones are answers such as "Paris", which any text may contain."""


class Rejected(Exception):  # noqa: N818 (not an error: filters are expected to reject answers)
    """A filter rejects an answer: the filter's name and the reason."""

    def __init__(self, filter_name: str, reason: str) -> None:
        super().__init__(reason)
        self.filter_name = filter_name


def parts(filters: Filters, answer: Answer) -> dict[str, str]:
    """Return an answer's fields: `response`, and the texts under its JSON keys.

    Raises:
        Rejected: the answer was refused or cut, is too short or too long, or has another JSON shape.
    """
    if answer.finish_reason == REFUSED:
        raise Rejected("refused", answer.text)
    if filters.truncated and answer.finish_reason == "length":
        raise Rejected("truncated", f"cut after {answer.tokens:,} tokens")
    text = valid(answer.text).strip()
    if len(text) < filters.min_characters:
        raise Rejected("min_characters", f"{len(text):,} characters")
    if filters.max_characters is not None and len(text) > filters.max_characters:
        raise Rejected("max_characters", f"{len(text):,} characters")
    return {"response": text} | (_json_texts(text, filters.json_keys) if filters.json_keys else {})


def _json_texts(text: str, keys: Sequence[str]) -> dict[str, str]:
    fenced = FENCE.search(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as error:
        raise Rejected("json_keys", f"not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Rejected("json_keys", "not a JSON object")
    for key in keys:
        if not isinstance(found.get(key), str) or not found[key].strip():
            raise Rejected("json_keys", f"no text under '{key}'")
    return {key: valid(found[key]).strip() for key in keys}


def valid(text: str) -> str:
    """Return the text with lone surrogates replaced, which JSON can express but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def verify(filters: Filters, filled: Mapping[str, str]) -> str:
    """Return the verdict about an answer: "verified" if a verifier checked it, else "accepted".

    Raises:
        Rejected: a verifier found it wrong.
    """
    if filters.equations and (reason := wrong_equation(filled["response"])):
        raise Rejected("equations", reason)
    for key, slot in filters.quoted.items():
        quote, source = (" ".join(WORD.findall(filled[name].lower())) for name in (key, slot))
        if not quote or f" {quote} " not in f" {source} ":
            raise Rejected("quoted", f"'{filled[key][:100]}' does not occur in the {slot}")
    return "verified" if filters.equations or filters.quoted else "accepted"


class Evaluation:
    """The n-grams of words of the evaluation sets, as hashes."""

    def __init__(self, filters: Filters, base: Path) -> None:
        """Read the sets' files, which are relative to `base`; raise `UserError` if one cannot be read."""
        self._runs: dict[int, set[int]] = {}
        for text in read_documents(filters.evaluation, base) if filters.evaluation else ():
            words = _words(text)
            length = min(len(words), filters.ngram)
            if length >= MIN_WORDS:
                self._runs.setdefault(length, set()).update(hash(run) for run in _runs(words, length))

    def require_absent(self, text: str) -> None:
        """Raise `Rejected` if the text has a run of words of an evaluation set."""
        words = _words(text)
        for length, known in self._runs.items():
            for run in _runs(words, length):
                if hash(run) in known:
                    raise Rejected("evaluation", f"shares '{' '.join(run)}' with an evaluation set")


class Repetition:
    """The rows so far, among which exact and near duplicates are found."""

    def __init__(self, filters: Filters) -> None:
        self._rows: set[str] = set()
        self._near = None
        if filters.near_duplicates:
            from rensa import RMinHashDeduplicator

            self._near = RMinHashDeduplicator(threshold=filters.near_duplicates, num_perm=128, use_lsh=True)

    def add(self, row: str, answer: str) -> None:
        """Add a row that no other filter rejects; raise `Rejected` if it repeats an earlier one."""
        words = _words(row)
        whole = " ".join(words) or row
        if whole in self._rows:
            raise Rejected("duplicates", "the same words as an earlier row")
        runs = [" ".join(run) for run in _runs(_words(answer), SHINGLE)]
        if self._near is not None and runs and not self._near.add_pairs([(str(len(self._rows)), runs)])[0]:
            raise Rejected("near_duplicates", "almost the same words as an earlier row's answer")
        self._rows.add(whole)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
