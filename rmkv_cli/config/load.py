"""From TOML, presets and `--set` to a config, with every error of a file in one report."""

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
from rmkv_cli.config.numbers import WANTED
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
MOST_LINES, LONGEST_LINE = 50, 1000  # bounds of the report of a file's errors


def tunes_only(name: str) -> bool:
    """Return whether a preset says how an existing model is trained, and describes no model of its own."""
    return "model" not in _read_toml(preset_path(name))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a model and training config from a TOML file, then apply `key=value` overrides in their order.

    Raises:
        UserError: a line for every unknown key, wrong value and broken rule, naming the file (or `--set`) and key.
    """
    data = _read_toml(path)
    return parse(Config, data, str(path), _override(data, overrides))


def load_recipe(path: Path, overrides: Sequence[str], model: ModelConfig, *, preset: bool) -> Config:
    """Read the training of a config for a model that exists already, then apply `key=value` overrides.

    A preset contributes its `[train]` alone. In any other file, and in an override, a key of the model must have the
    value that it has in `model`.

    Raises:
        UserError: as in `load_config`; a line for each key that contradicts the model.
    """
    data = _read_toml(path)
    if preset:
        data.pop("model", None)
    overridden = _override(data, overrides)
    given = data.get("model", {})
    whole = data | ({"model": _merged(model.model_dump(), given)} if isinstance(given, dict) else {})
    config = parse(Config, whole, str(path), overridden)
    lines = [
        f"{f'--set {key}' if key in overridden else f'{path}: {key}'}: is {shown(found)}, but the model that --from "
        f"names has {shown(there)}; leave it out"
        for key, found, there in differences(config.model, model)
    ]
    if lines:
        raise UserError("\n".join(lines))
    return config


def differences(one: Section, other: Section, before: str = "model.") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key of each value that differs between two sections of one kind, with both values."""
    for name in type(one).model_fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, Section) and isinstance(b, Section):
            yield from differences(a, b, f"{before}{name}.")
        elif a != b:
            yield before + name, a, b


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    return "none" if value is None else json.dumps(value, default=str)


def _merged(table: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the keys of another in their place, tables inside it merged likewise."""
    both = {
        key: _merged(table[key], x) if isinstance(x, dict) and isinstance(table.get(key), dict) else x
        for key, x in more.items()
    }
    return table | both


def _override(data: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Set the keys of `key=value` overrides in a config's data; return the keys."""
    overridden = set()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: wants KEY=VALUE, for instance model.memory.slots=64")
        _assign(data, key, value)
        overridden.add(key)
    _one_length(data, overridden)
    return overridden


def _one_length(data: dict[str, Any], overridden: set[str]) -> None:
    """Let an override of train.tokens or train.epochs replace the other key; raise `UserError` if there are both."""
    given = overridden & {"train.tokens", "train.epochs"}
    if len(given) == 2:
        raise UserError("--set train.tokens and train.epochs: only one of them decides how long the training is")
    for key in given:
        data["train"].pop("epochs" if key == "train.tokens" else "tokens", None)


def load_mix(path: Path, tokens: int | None = None) -> MixConfig:
    """Read a mix of data sources from a TOML file, made `tokens` long if given; errors as in `load_config`."""
    data = _read_toml(path)
    return parse(MixConfig, data if tokens is None else data | {"tokens": tokens}, str(path))


def load_data_recipe(path: Path, overrides: Sequence[str] = ()) -> DataRecipe:
    """Read a recipe for synthetic data, then apply `key=value` overrides; errors as in `load_config`."""
    data = _read_toml(path)
    return parse(DataRecipe, data, str(path), _override(data, overrides))


def load_any(path: Path) -> Section:
    """Read a mix (it has `sources`), a recipe for synthetic data (`writer`), or else a model and training config.

    Errors as in `load_config`.
    """
    data = _read_toml(path)
    kinds: dict[str, type[Section]] = {"sources": MixConfig, "writer": DataRecipe}
    return parse(next((kind for key, kind in kinds.items() if key in data), Config), data, str(path))


def dump_toml(section: Section) -> str:
    """Return the whole section as TOML, every default included; reading it gives the section again."""
    return tomli_w.dumps(section.model_dump(exclude_none=True))


def parse(kind: type[S], data: dict[str, Any], origin: str, overridden: set[str] | None = None) -> S:
    """Return `data` as a `kind`; raise one `UserError` for all its errors, each with its origin and dotted key."""
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
                said = "unknown key" + _known_keys(kind, section, parent, key, override is not None)
            else:
                said = _explain(dict(problem))
            place = f"--set {key}" if override else f"{origin}: {key}" if key else origin
            lines.append(_shortened(f"{place}: {said}"))
        more = [f"{origin}: {len(lines) - MOST_LINES} more errors"] if len(lines) > MOST_LINES else []
        raise UserError("\n".join(lines[:MOST_LINES] + more)) from None


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"


def _read_toml(path: Path) -> dict[str, Any]:
    data = read_whole(path)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # includes errors of decoding and numbers of 5,000 digits
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _assign(data: dict[str, Any], key: str, value: str) -> None:
    """Set a dotted key. Strings are turned into the schema's type by pydantic; lists and tables are read as TOML."""
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
    """Return an error's dotted key as it stands in the file, and the section that the key should have been in."""
    key = ""
    section: type[BaseModel] | None = kind
    for before, part in zip((None, *loc), loc, strict=False):
        if isinstance(part, int):
            key += f"[{part}]"
        elif isinstance(before, int) and part in KINDS:
            section = KINDS[part]  # pydantic's mark of which kind it tried; not a key
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
    """Return the section that a key, or each entry of a key's list or table, is; None if it is none."""
    inner = get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _known_keys(kind: type[BaseModel], section: type[BaseModel] | None, parent: str, key: str, whole: bool) -> str:
    """Return the end of an unknown key's message: similar keys, preferably in its section, else the section's keys.

    Args:
        kind: type of the whole config.
        section: type of the section that the key is in.
        parent: dotted key of that section with a final dot, or "".
        key: the unknown key, dotted.
        whole: whether to include the section in the names of its own keys.
    """
    here = [parent + name for name in (section.model_fields if section else ())]
    everywhere = list(_paths(kind))
    near = [path for path in everywhere if path.endswith(f".{key}")]
    near = near or _with_nearest_name(key, here) or _with_nearest_name(key, everywhere)
    shown = [path if whole else path.removeprefix(parent) for path in near or here]
    return f"; did you mean {' or '.join(map(repr, shown))}?" if near else f"; known are {', '.join(shown)}"


def _with_nearest_name(key: str, paths: Sequence[str]) -> list[str]:
    """Return the paths, if any, whose last part is most similar to that of the key."""
    names = [path.rpartition(".")[2] for path in paths]
    nearest = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    return [path for path, name in zip(paths, names, strict=True) if name in nearest]


def _paths(kind: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config's sections and of all keys in them."""
    for name, field in kind.model_fields.items():
        yield before + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{before}{name}.")


def _kinds(loc: Sequence[int | str]) -> list[str]:
    """Return the kinds that an entry of a list at `loc` may have: `sources`, or the exercises of rollouts."""
    return list(SOURCES if "sources" in loc else EXERCISES)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(map(repr, words[:-1]))}, or {words[-1]!r}"


def _explain(problem: dict[str, Any]) -> str:
    if problem["type"] == "int_parsing":
        return f"{WANTED}, got '{problem['input']}'"
    if problem["type"] == "union_tag_invalid":
        given, kinds = problem["ctx"]["tag"], _kinds(problem["loc"])
        return f"kind should be {_listed(kinds)}, got '{given}'{did_you_mean(given, kinds)}"
    if problem["type"] == "union_tag_not_found":
        return f"kind is missing; it should be {_listed(_kinds(problem['loc']))}"
    if problem["type"] == "missing":
        return "is missing"
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
    given = problem["input"]
    told = problem["type"] == "value_error" or isinstance(given, dict | list)  # a rule's message names the values
    shown = "" if told else f", got {json.dumps(given, default=str)}"
    return message[0].lower() + message[1:] + shown
