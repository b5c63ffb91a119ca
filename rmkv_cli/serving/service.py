"""Turn requests into jobs for the engine, and their events into responses."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request, Response

from rmkv_cli.config import parse
from rmkv_cli.data.chat import answer, pieces_of
from rmkv_cli.errors import UserError
from rmkv_cli.generation import Prompt, load_notes
from rmkv_cli.model import RMKV
from rmkv_cli.serving.choice import Said
from rmkv_cli.serving.engine import Engine
from rmkv_cli.serving.errors import ApiError, as_api_error
from rmkv_cli.serving.exchange import EventStream, Exchange, while_connected
from rmkv_cli.serving.jobs import Job, Writing
from rmkv_cli.serving.limits import Limits
from rmkv_cli.serving.memories import Keep, Memories
from rmkv_cli.serving.metrics import Metrics
from rmkv_cli.serving.protocol import ChatRequest, CompletionRequest, MemoryRequest
from rmkv_cli.serving.replies import Replies, usage
from rmkv_cli.tokenizer import Piece, Tokenizer
from rmkv_cli.tokenizer.template import without_begin


class Service:
    """The served model, its variants, and what their requests share.

    The variants are the model with adapters, under their own names; shape and tokenizer are the same.
    """

    def __init__(
        self, model: RMKV, tokenizer: Tokenizer, name: str, limits: Limits, variants: Mapping[str, RMKV] | None = None
    ) -> None:
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self.models = {name: model, **(variants or {})}
        self.created = int(time.time())
        self.metrics = Metrics()
        self.engine = Engine(self.models, tokenizer, limits, self.metrics)
        self.memories = Memories(model, limits)
        self.metrics.memories.set_function(lambda: len(self.memories))

    def load_memory(self, name: str, path: Path) -> None:
        """Add a tuned memory or notes as a named memory.

        Raises:
            UserError: the name is not allowed or taken, the file is not of this model, or there is no room.
        """
        place = f"--memory {name}={path}"
        parse(MemoryRequest, {"name": name, "text": ""}, place)
        prompt = load_notes(path, self.models[self.name], self.tokenizer)
        try:
            self.memories.create(name, self.name)(prompt)
        except ApiError as error:
            raise UserError(f"{place}: {error.message}") from None

    async def write(self, request: Request, asked: CompletionRequest | ChatRequest) -> Response:
        """Answer a completion or a chat, whole or as a stream; raise `ApiError` or `UserError` if that fails."""
        exchange = Exchange()
        replies = Replies(self.model_of(asked.model), self.tokenizer, chat=isinstance(asked, ChatRequest))
        exchange.submit(self.engine, self._jobs(asked, exchange))
        said = exchange.said()
        try:
            if not asked.stream:
                parts = await while_connected(request, _all(said))
                tokens, scored = usage(exchange.read, exchange.written), _scores(asked) is not None
                return await asyncio.to_thread(_whole, replies, parts, tokens, scored)
            first = await while_connected(
                request, anext(said)
            )  # an error before the first part still gets its own status
        except BaseException:
            exchange.cancel()
            raise
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(exchange, _events(first, said, exchange, replies, with_usage))

    def model_of(self, name: str | None) -> str:
        """Return the name of the requested model; raise `ApiError` 404 if there is none."""
        if name is None:
            return self.name
        if name not in self.models:
            have = ", ".join(f"'{known}'" for known in self.models)
            raise ApiError(404, f"there is no model '{name}'; this server has {have}", "model_not_found", "model")
        return name

    async def read(self, request: Request, text: str, after: Prompt | None, keep: Keep) -> dict[str, Any]:
        """Read a text, after an earlier reading or as a document's beginning, and keep the result.

        Return the figures of the new memory; errors as in `write`.
        """
        exchange = Exchange()
        exchange.submit(
            self.engine, [Job(keep.model, (text,), exchange.send, self.limits.max_seconds, after, keep=keep)]
        )
        try:
            await while_connected(request, _all(exchange.said()))
        finally:
            exchange.cancel()
        assert keep.figures is not None
        return keep.figures

    def _jobs(self, asked: CompletionRequest | ChatRequest, exchange: Exchange) -> list[Job]:
        """Return a job for each prompt."""
        limits, chat = self.limits, isinstance(asked, ChatRequest)
        model = self.model_of(asked.model)
        prompts: list[tuple[Piece, ...]]
        if isinstance(asked, ChatRequest):
            prompts = [self._prompt(asked, model)]
        else:
            prompts = [(prompt,) for prompt in asked.prompt]
        texts = asked.n * len(prompts)
        if texts > limits.lanes:
            message = f"n: this server generates at most {limits.lanes} texts per request, got {texts}"
            raise ApiError(400, message, "invalid_value", "n")
        writing = Writing(
            configs=asked.configs(),
            max_tokens=self._max_tokens(asked),
            stop=asked.stop,
            answer=chat,
            scores=_scores(asked),
            remembered=self._remembered if chat else lambda text: (text,),
        )
        after, keep = None, None
        if asked.memory is not None and asked.keep:
            after, keep = self.memories.hold(asked.memory, model)
        elif asked.memory is not None:
            after = self.memories.get(asked.memory, model)
        return [
            Job(model, pieces, exchange.send, limits.max_seconds, after, writing, keep, first=i * asked.n)
            for i, pieces in enumerate(prompts)
        ]

    def _prompt(self, asked: ChatRequest, model: str) -> tuple[Piece, ...]:
        """Return the pieces of a conversation; raise `ApiError` 400 if the model's chat template refuses it."""
        turns = [(message.role, message.content) for message in asked.messages]
        after = self.memories.get(asked.memory, model) if asked.memory else None
        try:
            pieces = pieces_of(turns, self.tokenizer, after=after is not None and int(after.state.position) > 1)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", "invalid_value", "messages") from None
        return pieces if after is None else without_begin(pieces, self.tokenizer.roles.begin)

    def _remembered(self, text: str) -> tuple[Piece, ...]:
        """Return the pieces of an answer and those between it and the next message."""
        closing = self.tokenizer.template.closing if self.tokenizer.template else ()
        return (*answer(text, self.tokenizer), *closing)

    def _max_tokens(self, asked: CompletionRequest | ChatRequest) -> int:
        field, wanted, most = "max_tokens", asked.max_tokens, self.limits.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            field, wanted = "max_completion_tokens", asked.max_completion_tokens
        if field not in asked.model_fields_set:
            return min(wanted, most)
        if wanted > most:
            message = f"{field}: should be {most} or less on this server, got {wanted}"
            raise ApiError(400, message, "invalid_value", field)
        return wanted


def _scores(asked: CompletionRequest | ChatRequest) -> int | None:
    """Return the number of likeliest tokens to report with each token; None for no log probabilities."""
    if isinstance(asked, ChatRequest):
        return asked.top_logprobs if asked.logprobs else None
    return asked.logprobs


async def _all(said: AsyncIterator[Said]) -> list[Said]:
    return [part async for part in said]


def _whole(replies: Replies, parts: list[Said], tokens: dict[str, int], scored: bool) -> Response:
    """Return a whole answer. Log probabilities can make it 40 MB, so a thread encodes it in many small steps."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    answer = "".join(encoder.iterencode(replies.whole(parts, tokens, scored=scored)))
    return Response(answer, media_type="application/json")


async def _events(
    first: Said, said: AsyncIterator[Said], exchange: Exchange, replies: Replies, with_usage: bool
) -> AsyncIterator[str]:
    """Yield a stream's server-sent events, from its first part on; an error becomes the last event."""
    empty = {"usage": None} if with_usage else {}
    try:
        yield _event(replies.chunk(first) | empty)
        async for part in said:
            if part.text or part.score or part.stop_reason:
                yield _event(replies.chunk(part) | empty)
        if with_usage:
            yield _event(replies.usage(usage(exchange.read, exchange.written)))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(as_api_error(error).body())


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"
