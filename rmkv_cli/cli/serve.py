"""`rmkv serve`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmkv_cli.cli.loading import Device, Dtype, adapted_model, find_and_load
from rmkv_cli.cli.options import Model, at_least
from rmkv_cli.config import parse
from rmkv_cli.errors import UserError, pip_install

if TYPE_CHECKING:
    from rmkv_cli.model import RMKV

KEY = "RMKV_API_KEY"


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8000,
    lanes: Annotated[int, typer.Option(parser=at_least(0), metavar="N", help="Generate at most N texts at once.")] = 8,
    queue: Annotated[int, typer.Option(parser=at_least(0), metavar="N", help="Let at most N more texts wait.")] = 64,
    max_tokens: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Largest max_tokens that a request may ask for.")
    ] = 4096,
    max_seconds: Annotated[float, typer.Option(help="Largest time that a request may take, in seconds.")] = 600,
    max_body: Annotated[
        int, typer.Option(parser=at_least(1), metavar="BYTES", help="Largest body of a request.")
    ] = 16_000_000,
    max_memories: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Keep at most N named memories.")
    ] = 100,
    max_memory_bytes: Annotated[
        int,
        typer.Option(parser=at_least(1), metavar="BYTES", help="Memory for all named memories together, such as 2G."),
    ] = 1_000_000_000,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            metavar="NAME=FILE",
            help="Load this file, a tuned memory or notes, as a named memory; may be repeated.",
        ),
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Accept other machines without an API key.")
    ] = False,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Also serve the model with this LoRA adapter, under the name of its folder; may be repeated.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model over HTTP in the OpenAI protocol, with named memories and a chat page.

    If the environment variable RMKV_API_KEY is set, clients must send that API key. After SIGTERM or Ctrl-C, answers
    have ten seconds to finish.
    """
    key = _key()
    try:
        from rmkv_cli.serving import Limits, Service, bind, is_loopback
        from rmkv_cli.serving import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "prometheus_client", "uvicorn"):
            raise
        raise UserError(f"{error.name} is not installed; {pip_install('serve')}") from None

    if not is_loopback(host) and key is None and not allow_anyone:
        raise UserError(
            f"--host {host}: other machines could use the model; set {KEY} to a secret that clients must send, or add "
            "--allow-anyone"
        )
    values = {
        "lanes": lanes,
        "queue": queue,
        "max_tokens": max_tokens,
        "max_seconds": max_seconds,
        "max_body": max_body,
        "max_memories": max_memories,
        "max_memory_bytes": max_memory_bytes,
    }
    limits = parse(Limits, values, "serve")
    with bind(host, port) as bound:
        folder, rmkv, tokenizer = find_and_load(model, device, dtype)
        name = model.resolve().name
        service = Service(rmkv, tokenizer, name, limits, _variants(rmkv, folder, name, adapter or ()))
        for each in memory or ():
            service.load_memory(*_named_file(each))
        run(service, bound, key, host)


def _variants(model: "RMKV", directory: Path, name: str, adapters: Sequence[Path]) -> "dict[str, RMKV]":
    """Return the model of the folder `directory` with each of the adapters, by the adapters' names.

    Raises:
        UserError: two adapters have the same name, the model already has an adapter, or one does not fit it.
    """
    variants: dict[str, RMKV] = {}
    for adapter in adapters:
        own = adapter.resolve().name
        if own in (name, *variants):
            raise UserError(f"--adapter {adapter}: '{own}' is the name of another model served here; rename the folder")
        variants[own] = adapted_model(model, directory, adapter)
    return variants


def _named_file(given: str) -> tuple[str, Path]:
    """Return the name and the file of `--memory NAME=FILE`."""
    name, equals, file = given.partition("=")
    if not equals or not file:
        raise UserError(f"--memory {given}: should be NAME=FILE")
    return name, Path(file)


def _key() -> str | None:
    """Return the key that clients must send, or None; raise `UserError` if no client could send it."""
    if KEY not in os.environ:
        return None
    key = os.environ[KEY].strip()
    if not key:
        raise UserError(f"{KEY} is empty; set it to a secret that clients must send, or unset it")
    if not key.isprintable():  # includes bytes that are not UTF-8
        raise UserError(f"{KEY} is not printable UTF-8 text, so no client can send it; set it to another secret")
    return key
