"""Comparison of configs: keys that differ, and keys that are equal."""

import json
from collections.abc import Sequence
from typing import Any

import tomli_w

from rmkv_cli.config import Section


def differences(configs: Sequence[Section]) -> list[list[str]]:
    """Return a row for each dotted key whose values differ: the key and the value in each config."""
    flat = [_flat(config.model_dump()) for config in configs]
    return [
        [key, *("" if config[key] is None else json.dumps(config[key]).strip('"') for config in flat)]
        for key, value in flat[0].items()
        if any(config[key] != value for config in flat)
    ]


def common_toml(configs: Sequence[Section]) -> str:
    """Return as TOML the keys that have the same value in all configs."""
    return tomli_w.dumps(_common([config.model_dump(exclude_none=True) for config in configs])).strip()


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _common(sections: Sequence[dict[str, Any]]) -> dict[str, Any]:
    common: dict[str, Any] = {}
    for key, value in sections[0].items():
        values = [section.get(key) for section in sections]
        if isinstance(value, dict):
            common[key] = _common([other for other in values if isinstance(other, dict)])
        elif all(other == value for other in values):
            common[key] = value
    return common
