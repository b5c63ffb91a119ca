"""Report errors in the form of the OpenAI protocol: {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from rmkv_cli.errors import UserError
from rmkv_cli.generation import NonFiniteError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response: HTTP status, a message of one line, and a code for programs."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """Return the error in the protocol's form."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return the response, with headers that say when to retry or how to authenticate."""
        more = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}
        # Escape it: the message can name a key of the request that is not valid Unicode.
        content = json.dumps(self.body())
        return Response(content, self.status, {**more.get(self.status, {}), **(headers or {})}, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """Return the error to report to the client; it hides the details of the server's own faults."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NonFiniteError):
        return ApiError(500, str(error), "internal_error")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed to handle this request; see its log", "internal_error")


def handle_errors(app: FastAPI) -> None:
    """Make the application answer every error in the protocol's form."""

    async def report(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail.lower()}"
        return ApiError(error.status_code, message).response(error.headers)

    for kind in (ApiError, UserError, Exception):
        app.add_exception_handler(kind, report)
    app.add_exception_handler(HTTPException, of_http)


def of_problems(problems: Sequence[Any]) -> ApiError:
    """Return the error for the first problem that pydantic found in a request's body."""
    problem = problems[0]
    kind, place = problem["type"], [str(part)[:64] for part in problem["loc"]]  # a key may be as long as the body
    if kind == "unsupported_parameter":
        place.append(problem["ctx"]["param"])
    if not place:
        message = "the body should be a JSON object" if kind == "model_type" else f"the body {problem['msg']}"
        return ApiError(400, message)
    param = ".".join(place)
    if kind == "missing":
        return ApiError(400, f"{param}: is missing", "missing_required_parameter", param)
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", "unknown_parameter", param)
    message = problem["msg"].removeprefix("Value error, ")
    code = kind if kind == "unsupported_parameter" else "invalid_value"
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}", code, param)
