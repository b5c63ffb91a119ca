"""Load configs from TOML files, presets and `--set`, and report all errors of a file at once."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from rmkv_cli.config.exercises import Exercises
from rmkv_cli.config.mix import MixConfig, Source
from rmkv_cli.config.model import ModelConfig
from rmkv_cli.config.numbers import EXPECTED_NUMBER
from rmkv_cli.config.recipe import DataRecipe
from rmkv_cli.config.section import Section
from rmkv_cli.config.shipped import preset_path
from rmkv_cli.config.train import Config
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.files import read_whole

S = TypeVar("S", bound=Section)
SOURCES, EXERCISES = (
    {get_args(section.model_fields["kind"].annotation)[0]: section for section in get_args(get_args(union)[0])}
    for union in (Source, Exercises)
)
KINDS: dict[int | str, type[BaseModel]] = SOURCES | EXERCISES
MAX_ERRORS, MAX_LINE = 50, 1000  # limits of an error report: lines, and characters of a line


def tunes_only(name: str) -> bool:
    """Return whether a preset has no model of its own, but settings to train an existing model."""
    return "model" not in _read_toml(preset_path(name))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a model and training config from a TOML file, then apply `key=value` overrides in order.

    Raises:
        UserError: one line for each unknown key, wrong value and broken rule, with the file (or `--set`) and the key.
    """
    data = _read_toml(path)
    return parse(Config, data, str(path), _override(data, overrides))


def load_recipe(path: Path, overrides: Sequence[str], model: ModelConfig, *, preset: bool) -> Config:
    """Read a training config for an existing model, then apply `key=value` overrides.

    A preset contributes only its `[train]`. In other files and in overrides, keys of the model must have their values
    in `model`.

    Raises:
        UserError: as in `load_config`, and one line for each key that contradicts the model.
    """
    data = _read_toml(path)
    if preset:
        data.pop("model", None)
    overridden = _override(data, overrides)
    given = data.get("model", {})
    merged = data | ({"model": _merged(model.model_dump(), given)} if isinstance(given, dict) else {})
    config = parse(Config, merged, str(path), overridden)
    lines = [
        f"{f'--set {key}' if key in overridden else f'{path}: {key}'}: is {format_value(value)}, but the model of "
        f"--from has {format_value(expected)}; remove the key"
        for key, value, expected in differences(config.model, model)
    ]
    if lines:
        raise UserError("\n".join(lines))
    return config


def differences(one: Section, other: Section, prefix: str = "model.") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key and both values of each difference between two sections of the same kind."""
    for name in type(one).model_fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, Section) and isinstance(b, Section):
            yield from differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield prefix + name, a, b


def format_value(value: Any) -> str:
    """Return a config value in the form of error messages."""
    return "none" if value is None else json.dumps(value, default=str)


def _merged(table: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the keys of another merged in, recursively; the other's values win."""
    both = {
        key: _merged(table[key], x) if isinstance(x, dict) and isinstance(table.get(key), dict) else x
        for key, x in more.items()
    }
    return table | both


def _override(data: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Set the keys of `key=value` overrides in a config's data, and return the keys."""
    overridden = set()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: should be KEY=VALUE, such as model.memory.slots=64")
        _assign(data, key, value)
        overridden.add(key)
    _resolve_length(data, overridden)
    return overridden


def _resolve_length(data: dict[str, Any], overridden: set[str]) -> None:
    """Let an override of train.tokens or train.epochs replace the other key; raise `UserError` for both."""
    given = overridden & {"train.tokens", "train.epochs"}
    if len(given) == 2:
        raise UserError("--set train.tokens and train.epochs: both set the length of training; give only one")
    for key in given:
        data["train"].pop("epochs" if key == "train.tokens" else "tokens", None)


def load_mix(path: Path, tokens: int | None = None) -> MixConfig:
    """Read a mix of data sources from a TOML file, with its `tokens` replaced if given; errors as in `load_config`."""
    data = _read_toml(path)
    return parse(MixConfig, data if tokens is None else data | {"tokens": tokens}, str(path))


def load_data_recipe(path: Path, overrides: Sequence[str] = ()) -> DataRecipe:
    """Read a recipe for synthetic data, then apply `key=value` overrides; errors as in `load_config`."""
    data = _read_toml(path)
    return parse(DataRecipe, data, str(path), _override(data, overrides))


def load_any(path: Path) -> Section:
    """Read a mix (with `sources`), a recipe for synthetic data (with `writer`), or a model and training config.

    Errors as in `load_config`.
    """
    data = _read_toml(path)
    kinds: dict[str, type[Section]] = {"sources": MixConfig, "writer": DataRecipe}
    return parse(next((kind for key, kind in kinds.items() if key in data), Config), data, str(path))


def dump_toml(section: Section) -> str:
    """Return a section as TOML with all defaults; reading it returns the same section."""
    return tomli_w.dumps(section.model_dump(exclude_none=True))


def parse(kind: type[S], data: dict[str, Any], origin: str, overridden: set[str] | None = None) -> S:
    """Return `data` as a `kind`; raise one `UserError` for all errors, one line each with origin and dotted key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key, section = _locate(kind, data, problem["loc"])
            override = next((k for k in overridden or () if k == key or k.startswith(f"{key}.")), None)
            if problem["type"] == "extra_forbidden":
                parent = key[: key.rfind(".") + 1]
                key = override or key
                message = "unknown key" + _known_keys(kind, section, parent, key, override is not None)
            else:
                message = _explain(dict(problem))
            place = f"--set {key}" if override else f"{origin}: {key}" if key else origin
            lines.append(_shortened(f"{place}: {message}"))
        more = [f"{origin}: {len(lines) - MAX_ERRORS} more errors"] if len(lines) > MAX_ERRORS else []
        raise UserError("\n".join(lines[:MAX_ERRORS] + more)) from None


def _shortened(line: str) -> str:
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def _read_toml(path: Path) -> dict[str, Any]:
    data = read_whole(path)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: also wrong UTF-8, and numbers of 5,000 digits
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _assign(data: dict[str, Any], key: str, value: str) -> None:
    """Set a dotted key. Pydantic converts strings to the schema's types; lists and tables are read as TOML."""
    *parents, last = key.split(".")
    for part in parents:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {key}: '{part}' is a value, not a section")
    try:
        data[last] = tomllib.loads(f"v = {value}")["v"] if value[:1] in ("[", "{") else value
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"--set {key}: '{value}' is not valid TOML: {error}") from None


def _locate(kind: type[BaseModel], data: Any, loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """Return an error's dotted key as in the file, and the section that the key is in."""
    key = ""
    section: type[BaseModel] | None = kind
    for before, part in zip((None, *loc), loc, strict=False):
        if isinstance(part, int):
            key += f"[{part}]"
        elif isinstance(before, int) and part in KINDS:
            section = KINDS[part]  # the kind that pydantic tried, not a key
            continue
        else:
            key += f".{part}" if key else part
            field = section.model_fields.get(part) if section else None
            section = _section_of(field.annotation if field else None) or section
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return key, section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section type of a key, or of the entries of its list or table; None for other types."""
    inner = get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _known_keys(kind: type[BaseModel], section: type[BaseModel] | None, parent: str, key: str, full: bool) -> str:
    """Return suggestions for an unknown key: similar keys, preferably of its section, else all keys of the section.

    Args:
        kind: type of the whole config.
        section: type of the section that the key is in.
        parent: dotted key of that section with a final dot, or "".
        key: the unknown key, dotted.
        full: whether to show keys of the section with their dotted path.
    """
    here = [parent + name for name in (section.model_fields if section else ())]
    everywhere = list(_paths(kind))
    similar = [path for path in everywhere if path.endswith(f".{key}")]
    similar = similar or _with_nearest_name(key, here) or _with_nearest_name(key, everywhere)
    names = [path if full else path.removeprefix(parent) for path in similar or here]
    return f"; did you mean {' or '.join(map(repr, names))}?" if similar else f"; known keys are {', '.join(names)}"


def _with_nearest_name(key: str, paths: Sequence[str]) -> list[str]:
    """Return the paths whose last part is most similar to that of the key, if any is similar."""
    names = [path.rpartition(".")[2] for path in paths]
    nearest = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    return [path for path, name in zip(paths, names, strict=True) if name in nearest]


def _paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config's sections and of all keys in them."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def _kinds(loc: Sequence[int | str]) -> list[str]:
    """Return the possible kinds of a list entry at `loc`: a mix's source or an exercise."""
    return list(SOURCES if "sources" in loc else EXERCISES)


def _join_with_or(words: Sequence[str]) -> str:
    return f"{', '.join(map(repr, words[:-1]))}, or {words[-1]!r}"


def _explain(problem: dict[str, Any]) -> str:
    """Return the message for one of pydantic's errors."""
    if problem["type"] == "int_parsing":
        return f"{EXPECTED_NUMBER}, got '{problem['input']}'"
    if problem["type"] == "union_tag_invalid":
        given, kinds = problem["ctx"]["tag"], _kinds(problem["loc"])
        return f"kind should be {_join_with_or(kinds)}, got '{given}'{did_you_mean(given, kinds)}"
    if problem["type"] == "union_tag_not_found":
        return f"kind is missing; it should be {_join_with_or(_kinds(problem['loc']))}"
    if problem["type"] == "missing":
        return "is missing"
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
    given = problem["input"]
    # A broken rule's message already contains the values.
    omit = problem["type"] == "value_error" or isinstance(given, dict | list)
    return message[0].lower() + message[1:] + ("" if omit else f", got {json.dumps(given, default=str)}")
