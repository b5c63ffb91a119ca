"""Base class of all sections of a config."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from rmkv_cli.config.numbers import whole_number


class Section(BaseModel):
    """A frozen section of a config that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields; rules about missing fields are skipped."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, data: Any) -> Any:
        # A field validator cannot do this: pydantic forbids one on a discriminator such as `kind`.
        if not isinstance(data, dict):
            return data
        read = dict(data)
        for name, field in cls.model_fields.items():
            if isinstance(read.get(name), str) and int in (field.annotation, *get_args(field.annotation)):
                with suppress(ValueError):  # pydantic reports the remaining strings
                    read[name] = whole_number(read[name])
        return read

    @field_validator("*")
    @classmethod
    def _obey_rules(cls, value: Any, info: ValidationInfo) -> Any:
        # After each field, because after all fields pydantic would skip the rules of a section with a wrong field.
        assert info.field_name
        if isinstance(value, int) and abs(value) >= 1 << 63:  # the limit of torch and Arrow
            raise ValueError("should be below 2^63")
        # info.data has the valid fields before this one.
        broken = list(cls.broken_rules(info.data | {info.field_name: value}))
        if broken:
            raise ValueError("; ".join(broken))
        return value
