"""Define requests: those of the OpenAI protocol that RMKV supports, and those for named memories."""

import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, FailFast, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rmkv_cli.config import Section
from rmkv_cli.data.chat import text_of, text_with_calls
from rmkv_cli.generation import SamplingConfig, Seed

IGNORED = {
    *("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"),
    *("annotations", "name", "refusal", "tool_call_id"),  # of messages
}
"""Fields of the protocol that do not affect the text."""
NEUTRAL = {
    "audio": None,
    "best_of": 1,
    "echo": False,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prediction": None,
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_calls": [],
    "tool_choice": "none",
    "tools": [],
    "verbosity": "medium",
    "web_search_options": None,
}
"""Unsupported fields of the protocol, each with the value that has no effect and is therefore accepted."""

MAX_KEYS = 100
"""Maximum number of keys of a request, and of each object in it."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Asked(Section):
    """Base of requests and their parts: types are strict, and null means absent."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_KEYS:
            raise PydanticCustomError("too_many_keys", "should have at most {most} keys", {"most": MAX_KEYS})
        own = {key: value for key, value in data.items() if value is not None}
        for key in own.keys() & NEUTRAL.keys() - cls.model_fields.keys():
            if own.pop(key) != NEUTRAL[key]:
                raise PydanticCustomError("unsupported_parameter", "is not supported; leave it out", {"param": key})
        return {key: value for key, value in own.items() if key in cls.model_fields or key not in IGNORED}


class StreamOptions(Asked):
    """Options of a stream."""

    include_usage: bool = False
    """Whether to send the usage in a final chunk."""
    include_obfuscation: bool = False
    """Accepted without effect: chunks are never padded."""


class Request(SamplingConfig, Asked):
    """Fields that completions and chats share; sampling has the defaults of `rmkv generate`."""

    seed: Seed = Field(default_factory=lambda: secrets.randbelow(2**31))
    model: str | None = Field(None, max_length=256)
    max_tokens: int = Field(256, ge=1)
    n: int = Field(1, ge=1, le=128)
    stop: list[Stop] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    memory: Name | None = None
    """Name of the memory to start from."""
    keep: bool = False
    """Whether to add this request's messages and answer to that memory."""

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield the conflicts between fields."""
        if fields.get("seed", 0) + fields.get("n", 1) > 2**63:
            yield "seed + n should be at most 2**63: the texts are generated with seed, seed + 1, ..."
        if fields.get("stream_options") and not fields.get("stream", True):
            yield "is only for streams (stream = true)"
        if fields.get("keep") and not fields.get("memory"):
            yield "needs the name of a memory"
        if fields.get("keep") and fields.get("n", 1) > 1:
            yield "needs n = 1, because a memory keeps only one text"

    def configs(self) -> list[SamplingConfig]:
        """Return the sampling settings of the n texts, with seed, seed + 1, ..."""
        values = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        return [SamplingConfig(**values | {"seed": self.seed + i}) for i in range(self.n)]


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: list[str] = Field(min_length=1, max_length=1024)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        prompts = [value] if isinstance(value, str) else value
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("should be a string or a list of strings; token ids are not supported")
        return prompts

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield the conflicts between fields."""
        yield from Request.broken_rules(fields)
        if fields.get("keep") and len(fields.get("prompt", ())) > 1:
            yield "keep needs a single prompt, because a memory keeps only one text"


class Message(Asked):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _called(cls, data: Any) -> Any:
        """Put the tool calls into the content, as text."""
        if not isinstance(data, dict) or not (calls := data.get("tool_calls")):
            return data
        rest = {key: value for key, value in data.items() if key != "tool_calls"}
        text = text_with_calls(rest.get("content"), calls)
        return rest if text is None else rest | {"content": text}

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Join the parts of a content that is a list of texts; leave all else to be refused."""
        text = text_of(value)
        return value if text is None else text


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield the conflicts between fields."""
        yield from Request.broken_rules(fields)
        if fields.get("top_logprobs") and not fields.get("logprobs", True):
            yield "needs logprobs = true"


class TextRequest(Asked):
    """POST /v1/memories/{name}."""

    text: str


class MemoryRequest(TextRequest):
    """POST /v1/memories."""

    name: Name
    model: str | None = Field(None, max_length=256)
