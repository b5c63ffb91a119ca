"""Parse request bodies outside the event loop, after checking their bounds."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from rmkv_cli.serving.errors import ApiError, of_problems

MAX_VALUES = 50_000
"""Maximum number of keys and values in a body, at all levels together."""
MAX_DEPTH = 16
"""Maximum depth of nested lists and objects."""
# Strings, including an unterminated one; brackets; numbers and words. Possessive, so that no input is scanned twice.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]|[^\s\[\]{},:"]++', re.DOTALL)

A = TypeVar("A", bound=BaseModel)


def body_as(kind: type[A]) -> Callable[[Request], Awaitable[A]]:
    """Return a FastAPI dependency that parses a request's body as a `kind`, or raises `ApiError`."""

    async def read(request: Request) -> A:
        # This keeps out pages of other sites: browsers ask the server's permission to send JSON, which it never gives.
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/(.+\+)?json", media_type):
            raise ApiError(400, "the body should be a JSON object, sent with Content-Type: application/json")
        try:
            body = b"".join([part async for part in request.stream()])
        except ClientDisconnect:
            raise ApiError(499, "the client disconnected") from None
        return await asyncio.to_thread(parse, kind, body)

    return read


def parse(kind: type[A], body: bytes) -> A:
    """Return the JSON body as a `kind`; raise `ApiError` 400 with the body's first error.

    The body's bytes, `MAX_VALUES` and the bounds of the `kind` limit the time and memory that this takes.
    """
    _require_bounded(body)
    try:
        value = json.loads(body.decode("utf-8-sig"))
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise of_problems(error.errors(include_url=False)) from None


def _require_bounded(body: bytes) -> None:
    """Raise `ApiError` 400, naming the field, if a body has too many values or levels."""
    values = depth = 0
    field = ""
    for token in _TOKENS.finditer(body):
        mark = body[token.start()]
        if mark in b"]}":
            depth -= 1
            continue
        values += 1
        if mark in b"[{":
            depth += 1
        elif depth == 1:  # finally, the key whose value is too large
            field = body[token.start() + 1 : min(token.end() - 1, token.start() + 65)].decode("utf-8", "replace")
        if values > MAX_VALUES or depth > MAX_DEPTH:
            param = field if depth > 1 and field else None
            bound = f"{MAX_VALUES:,} keys and values" if values > MAX_VALUES else f"{MAX_DEPTH} levels"
            raise ApiError(400, f"{param or 'the body'}: should have at most {bound}", "too_large", param)
