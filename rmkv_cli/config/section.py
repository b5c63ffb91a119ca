"""The rules that every part of a config shares."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from rmkv_cli.config.numbers import whole_number


class Section(BaseModel):
    """A part of a config: frozen, and refusing keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield a message for each broken rule across fields; one that lacks any of its fields is skipped."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, data: Any) -> Any:
        # A field validator would not do: pydantic forbids it on the field by which it chooses a kind of source.
        if not isinstance(data, dict):
            return data
        read = dict(data)
        for name, field in cls.model_fields.items():
            if isinstance(read.get(name), str) and int in (field.annotation, *get_args(field.annotation)):
                with suppress(ValueError):  # pydantic reports the texts that remain
                    read[name] = whole_number(read[name])
        return read

    @field_validator("*")
    @classmethod
    def _obey_rules(cls, value: Any, info: ValidationInfo) -> Any:
        # After every field, not after all: pydantic would check no rule of a section that has one wrong field.
        assert info.field_name
        if isinstance(value, int) and abs(value) >= 1 << 63:  # torch and Arrow have 64 bits
            raise ValueError("should be below 2^63")
        broken = list(cls.broken_rules(info.data | {info.field_name: value}))  # info.data: the right ones before it
        if broken:
            raise ValueError("; ".join(broken))
        return value
