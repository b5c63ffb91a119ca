"""Damage a file at random, by a seed: flip bits, change ranges or fields, or replace the file by something else."""

import json
import os
import random
import re

import torch
from safetensors import safe_open

from rmkv_cli.model.tensors import CHECKSUM, save_tensors

HOSTILE = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, 1e308, "", "x", "x" * 9999, [], {}, [[]], {"a": 1}]
PLACES = ("absent", "empty", "pipe", "folder", "device", "loop", "huge")


def damage(path, rng):
    """Damage the file at `path`; return the kind of damage, and whether another result is now valid as well."""
    ways = [_bytes, _bytes, _bytes, _replace]
    if path.suffix in (".json", ".jsonl", ".toml"):
        ways += [_fields, _fields]
    if path.suffix in (".rmkv", ".safetensors"):
        ways += [_header, _header, _forge]
    way = rng.choice(ways)
    done = way(path, rng)
    return done, way is _forge


def _bytes(path, rng):
    data = bytearray(path.read_bytes())
    near = min(len(data), 600)  # headers are the weakest: half of the damage is there or at the end
    at = rng.choice([rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)])
    size = rng.randrange(1, 65)
    other = rng.randrange(len(data))
    what = rng.choice(["flip", "flip", "flip", "noise", "cut", "zero", "swap", "delete", "repeat"])
    match what:
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "noise":
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        case "cut":
            del data[at:]
        case "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "swap":
            first, second = sorted((at, other))
            size = min(size, second - first, len(data) - second)
            data[first : first + size], data[second : second + size] = (
                data[second : second + size],
                data[first : first + size],
            )
        case "delete":
            del data[at : at + size]
        case "repeat":
            data[at:at] = data[at : at + size]
    path.write_bytes(data)
    return f"{what} at {at}"


def _replace(path, rng):
    what = rng.choice(PLACES)
    path.unlink()
    match what:
        case "empty":
            path.touch()
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
    return what


def _fields(path, rng):
    """Change a field of a JSON file, of a line of one, or of a TOML file; or nest it a hundred thousand deep."""
    text = path.read_text()
    if rng.random() < 0.1:
        path.write_text(rng.choice(["[", '{"a":', "a = [", "a.", '{"a":[']) * 100_000)
        return "nested"
    if path.suffix == ".toml":
        numbers = list(re.finditer(r"= (.+)", text))
        at, value = rng.choice(numbers), rng.choice([x for x in HOSTILE if x is not None])
        path.write_text(f"{text[: at.start(1)]}{json.dumps(value)}{text[at.end(1) :]}")
        return f"{at[0][:30]} to {value!r:.30}"
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    i = rng.randrange(len(lines))
    lines[i], done = _changed(lines[i], rng)
    path.write_text("\n".join(lines))
    return done


def _changed(text, rng):
    """Return JSON with a field changed, removed, renamed or set to another's value, and the kind of damage."""
    value = json.loads(text)
    places = list(_places(value))
    part, key = rng.choice(places)
    what = rng.choice(["change", "change", "remove", "rename", "swap"])
    match what:
        case "change":
            part[key] = rng.choice(HOSTILE)
        case "remove":
            del part[key]
        case "rename" if isinstance(part, dict):
            part[key + "x"] = part.pop(key)
        case _:
            other, there = rng.choice(places)
            try:
                part[key], other[there] = other[there], part[key]
                return json.dumps(value), f"{what} {key} {there}"
            except (ValueError, RecursionError):  # one within the other
                return "{}", "a loop"
    return json.dumps(value), f"{what} {key}"


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _header(path, rng):
    """Change a field of a safetensors file's header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, done = _changed(data[8 : 8 + size].decode(), rng)
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data[8 + size :])
    return f"header: {done}"


def _forge(path, rng):
    """Change a tensor of a safetensors file and update the file's checksum."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = {key: x for key, x in (file.metadata() or {}).items() if key != CHECKSUM}
    name = rng.choice(sorted(tensors))
    x = tensors[name]
    what = rng.choice(["remove", "add", "type", "empty", "longer", "flat", "nan", "low", "high", "one"])
    match what:
        case "remove":
            del tensors[name]
        case "add":
            tensors[f"{name}.7"] = x.clone()
        case "type":
            tensors[name] = x.to(rng.choice([torch.int8, torch.bool, torch.float16, torch.float64, torch.int64]))
        case "empty":
            tensors[name] = x.new_zeros(0)
        case "longer":
            tensors[name] = torch.cat([x.flatten(), x.flatten()]).contiguous()
        case "flat":
            tensors[name] = x.flatten().clone()
        case "one":
            tensors[name].view(-1)[rng.randrange(x.numel()) if x.numel() else slice(0)] = 1
        case _:
            low = 0 if x.dtype == torch.bool else -(2**62) if not x.is_floating_point() else -1e38
            fill = {"nan": torch.nan if x.is_floating_point() else -7, "low": low, "high": 1 if low == 0 else -low}
            tensors[name].fill_(fill[what])
    path.unlink()
    save_tensors(tensors, path, metadata)
    return f"forge: {what} {name}"


def draw(seed, kind, number):
    """Return the random generator of a case, independent of other cases."""
    return random.Random(f"{seed} {kind} {number}")
