"""Define the routes."""

import base64
import hashlib
import re
from collections.abc import Collection
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from starlette.types import ASGIApp

from rmkv_cli.serving.body import body_as
from rmkv_cli.serving.errors import ApiError, handle_errors
from rmkv_cli.serving.gate import Gate
from rmkv_cli.serving.protocol import ChatRequest, CompletionRequest, MemoryRequest, TextRequest
from rmkv_cli.serving.service import Service

METRICS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service, key: str | None = None, hosts: Collection[str] = ()) -> ASGIApp:
    """Return the application that serves the service, whose engine must be running.

    Args:
        service: the model and what its requests share.
        key: API key that clients must send; None: no key.
        hosts: host names that the server answers to without a key; empty: all.
    """

    app = FastAPI(openapi_url=None)
    handle_errors(app)
    _add_protocol(app, service)
    _add_memories(app, service)
    _add_page(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.engine.open:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": METRICS})

    return Gate(app, service.metrics, service.limits, key, hosts)


def _add_protocol(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "rmkv"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in service.models]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(service.model_of(name))

    @app.post("/v1/completions")
    async def completions(
        request: Request, asked: Annotated[CompletionRequest, Depends(body_as(CompletionRequest))]
    ) -> Response:
        return await service.write(request, asked)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: Annotated[ChatRequest, Depends(body_as(ChatRequest))]) -> Response:
        return await service.write(request, asked)


def _add_memories(app: FastAPI, service: Service) -> None:
    memories = service.memories

    @app.get("/v1/memories")
    async def all_memories() -> dict[str, Any]:
        return {"object": "list", "data": memories.list(), "room": memories.room}

    @app.post("/v1/memories", status_code=201)
    async def create(
        request: Request, asked: Annotated[MemoryRequest, Depends(body_as(MemoryRequest))]
    ) -> dict[str, Any]:
        keep = memories.create(asked.name, service.model_of(asked.model))
        return await service.read(request, asked.text, None, keep)

    @app.get("/v1/memories/{name}")
    async def one_memory(name: str) -> dict[str, Any]:
        return memories.describe(name)

    @app.post("/v1/memories/{name}")
    async def read_on(
        request: Request, name: str, asked: Annotated[TextRequest, Depends(body_as(TextRequest))]
    ) -> dict[str, Any]:
        return await service.read(request, asked.text, *memories.hold(name))

    @app.delete("/v1/memories/{name}")
    async def delete(name: str) -> dict[str, Any]:
        memories.delete(name)
        return {"object": "memory.deleted", "name": name, "deleted": True}


def _add_page(app: FastAPI) -> None:
    def source(name: str) -> str:
        return (files("rmkv_cli.serving") / name).read_text(encoding="utf-8")

    scripts = re.compile('<script src="(.*?)"></script>')
    page = scripts.sub(lambda script: f"<script>{source(script[1])}</script>", source("page.html"))

    def own(tag: str) -> str:
        """Return the policy's sources for this tag: the hashes of the page's own scripts or styles."""
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in bodies)

    policy = (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    @app.get("/")
    async def show_page() -> Response:
        return Response(page, headers=headers, media_type="text/html")
