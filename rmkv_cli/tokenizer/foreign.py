"""Tokenizers of pretrained models, used unchanged: byte-level BPE with any pattern, and SentencePiece-like BPE.

tokenizer_config.json and generation_config.json beside them define the roles of their special tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer.parts import ANYWHERE, NOWHERE, in_parts
from rmkv_cli.tokenizer.special import Roles, Token

CONFIG, MAP, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
THINKING = "<think>", "</think>"
PROSE = (
    "The quick brown fox. It's 2024-01-02, isn't it?  Yes: 12,345 times!\n\n  def f(x):\r\n\treturn [x] ** 2\n"
    "Naïve café, 日本語の文章。 Привет мир\n\n\n-- and so on ...\n#1 end"
)
"""Test text: a tokenizer divides at `ANYWHERE` if the parts of this text have the same tokens as the whole."""
_TAG = re.compile(r"<[^<>\s]{2,}>|\[/?[A-Z_]{2,}\]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary represents (Radford et al., 2019, GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


@dataclass(frozen=True)
class Foreign:
    """Description of a pretrained model's tokenizer."""

    libraries: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, tokenizers.Tokenizer]
    """Tokenizers for text at the beginning of a document, after a special token, and in the middle of a text."""
    bytes: list[bytes]
    """Bytes of each id (V,); b"" for an id without a token."""
    tokens: dict[int, Token]
    """Special tokens by id: those declared special, and others spelt like tags, such as <think>."""
    roles: Roles
    named: dict[str, str]
    """Spellings of special tokens by name, such as `bos_token`."""
    strips: dict[int, str]
    """Sides on which a special token absorbs adjacent white space, by id: "l", "r" or "lr"."""
    spaced: tuple[bool, bool, bool]
    """Whether each of the libraries prepends a space to a text."""
    places: re.Pattern[str]
    """Pattern of the places where texts may be cut (see `in_parts`)."""


def read_foreign(
    whole: tokenizers.Tokenizer, text: str, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Foreign:
    """Return the description of a tokenizer from its tokenizer.json and the two files beside it.

    The result keeps `whole` and modifies it.

    Raises:
        UserError: the tokenizer is not BPE over bytes or with byte fallback, or the files do not name the token that
            ends a text.
    """
    described = json.loads(text)
    if described["model"].get("type") != "BPE":
        raise UserError(f"is a {described['model'].get('type')} tokenizer; only BPE is supported")
    kinds = set(_types([described["pre_tokenizer"], described["decoder"]]))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not described["model"].get("byte_fallback") and "Metaspace" not in kinds:
        raise UserError("is neither a byte-level tokenizer nor a SentencePiece-like one with byte fallback")
    named = {name: spelling for name in NAMES if (spelling := _spelling(config.get(name)))}
    if "eos_token" not in named:
        raise UserError(
            f"lacks rmkv's special tokens, and no {CONFIG} beside it names the eos_token; copy the pretrained model's "
            f"{CONFIG} to the same folder, or train a tokenizer with `rmkv tokenizer train`"
        )
    vocabulary: dict[str, int] = whole.get_vocab()
    added: list[dict[str, Any]] = described["added_tokens"]
    special = {t["content"] for t in added if t["special"] or _TAG.fullmatch(t["content"])} | set(named.values())
    ids = sorted((vocabulary[name], name) for name in special if name in vocabulary)
    tokens = {i: Token(name, i) for i, name in ids}
    if "eos_token" in named and named["eos_token"] not in vocabulary:
        raise UserError(f"has no token '{named['eos_token']}', which {CONFIG} names as eos_token")
    if short := [token for token in tokens.values() if len(token) < 2]:
        raise UserError(f"has the special token '{short[0]}', which is a single character")
    begin = _begin(whole, tokens)
    libraries = _untrusted(whole, described, tokens)
    unknown = vocabulary.get(named.get("unk_token", ""))
    for token in tokens.values():
        if any(i in tokens and i != unknown for i in libraries[1].encode(str(token), add_special_tokens=False).ids):
            raise UserError(f"turns text that spells '{token}' into that special token")
    spellings = {i: spelling for spelling, i in vocabulary.items()}
    plain = {t["id"] for t in added} | tokens.keys()
    sizes = range(max(spellings) + 1)
    known = [_bytes(spellings.get(i, ""), byte_level and i not in plain, i in plain) for i in sizes]
    spaced = tuple(_is_spaced(library, known) for library in libraries)
    roles = _roles(begin, tokens, named, generation, [i for i in sizes if i not in spellings])
    sides = {t["id"]: "l" * t["lstrip"] + "r" * t["rstrip"] for t in added if t["id"] in tokens}
    return Foreign(
        libraries,
        known,
        tokens,
        roles,
        named,
        {i: side for i, side in sides.items() if side},
        (spaced[0], spaced[1], spaced[2]),
        ANYWHERE if _divides(libraries) else NOWHERE,
    )


def _roles(
    begin: Token | None,
    tokens: Mapping[int, Token],
    named: Mapping[str, str],
    generation: Mapping[str, Any],
    missing: list[int],
) -> Roles:
    spelt = {str(token): token for token in tokens.values()}
    by_name = {name: spelt[spelling] for name, spelling in named.items() if spelling in spelt}
    eod = by_name["eos_token"]
    given = generation.get("eos_token_id")
    ids = [eod.id, *(given if isinstance(given, list) else [given])]
    ends = tuple(tokens[i] for i in dict.fromkeys(ids) if i in tokens)
    never = {by_name[name].id for name in ("pad_token", "unk_token") if name in by_name} - {end.id for end in ends}
    opened, closed = (spelt.get(tag) for tag in THINKING)
    return Roles(
        begin=begin,
        eod=eod,
        ends=ends,
        answer_ends=ends,
        never=(*sorted(never), *missing),
        pad=by_name.get("pad_token"),
        thinking=(opened, closed) if opened is not None and closed is not None else None,
    )


def _begin(library: tokenizers.Tokenizer, tokens: Mapping[int, Token]) -> Token | None:
    """Return the special token that the tokenizer prepends to a text; only its post-processor decides this."""
    with_special, without = (library.encode("a", add_special_tokens=add).ids for add in (True, False))
    first = with_special[0] if with_special else None
    return tokens.get(first) if first is not None and without[:1] != [first] else None


def _untrusted(
    whole: tokenizers.Tokenizer, described: Mapping[str, Any], tokens: Mapping[int, Token]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Return tokenizers that never parse special tokens in text, for the three places of `Foreign.libraries`."""
    made: list[tuple[dict[str, Any], tokenizers.Tokenizer]] = []
    for place in range(3):
        parts = {key: _without_space(described[key], place) for key in ("normalizer", "pre_tokenizer")}
        library = next((library for known, library in made if known == parts), None)
        if library is None:  # reuse one if possible: each takes seconds to load
            library = tokenizers.Tokenizer.from_str(json.dumps({**described, **parts})) if made else whole
            library.no_truncation()
            library.no_padding()
            library.model.dropout = None
            library.add_special_tokens([str(token) for token in tokens.values()])
            library.encode_special_tokens = True
        made.append((parts, library))
    return made[0][1], made[1][1], made[2][1]


def _without_space(part: Any, place: int) -> Any:
    """Return a normalizer or pre-tokenizer that prepends no space to a text where none belongs at `place`."""
    if not isinstance(part, dict):
        return part
    match part.get("type"):
        case "Metaspace" if place == 2 or (place == 1 and part.get("prepend_scheme") == "first"):
            return part | {"prepend_scheme": "never"}
        case "Prepend" if place == 2:
            return None
        case "ByteLevel" if place == 2 and part.get("add_prefix_space"):
            return part | {"add_prefix_space": False}
        case "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            return part | {key: [kept for x in part[key] if (kept := _without_space(x, place)) is not None]}
    return part


def _types(value: Any) -> Iterator[str]:
    """Yield the types of all parts within a description."""
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value["type"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _types(part)


def _spelling(value: Any) -> str | None:
    """Return the spelling of a token from its description in tokenizer_config.json."""
    spelling = value.get("content") if isinstance(value, dict) else value
    return spelling if isinstance(spelling, str) else None


def _bytes(spelling: str, byte_level: bool, plain: bool) -> bytes:
    """Return the bytes that a token represents; `plain` tokens are spelt literally."""
    if byte_level:
        return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in spelling)
    if not plain and (byte := _BYTE.fullmatch(spelling)):
        return bytes.fromhex(byte[1])
    return (spelling if plain else spelling.replace("▁", " ")).encode()


def _is_spaced(library: tokenizers.Tokenizer, known: list[bytes]) -> bool:
    ids = library.encode("a", add_special_tokens=False).ids
    return b"".join(known[i] for i in ids).startswith(b" ")


def _divides(libraries: tuple[tokenizers.Tokenizer, ...]) -> bool:
    """Return whether a text cut at `ANYWHERE` encodes to the same tokens as the whole."""
    whole = libraries[0].encode(PROSE, add_special_tokens=False).ids
    parts = list(in_parts([PROSE], 1, places=ANYWHERE))
    found = [
        i
        for number, part in enumerate(parts)
        for i in libraries[2 if number else 0].encode(part, add_special_tokens=False).ids
    ]
    return whole == found


BYTES = bytes_of_characters()
