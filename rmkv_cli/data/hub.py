"""Data sets of the Hugging Face hub: which files they are, read by ranges, with patience for a hub that fails."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar, cast

import httpx2
from huggingface_hub import HfApi, HfFileSystem, constants, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from rmkv_cli.config import HubSource
from rmkv_cli.data.blocks import Block, Position
from rmkv_cli.data.records import RECORDS, TEXTS, File, read_blocks, suffix
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.progress import stderr

WAITS_TO_OPEN = (1, 3, 5)  # seconds, between tries
WAITS_TO_READ = (5, 10, 20, 40, 60, 60)  # after the library's own six tries, which take 23 s in all
ANSWER_WITHIN = 10.0  # seconds, or the request is taken for lost
T = TypeVar("T")


class Repository(NamedTuple):
    """A repository on the hub, with its label in messages."""

    kind: Literal["data set", "model"]
    name: str
    revision: str | None
    label: str
    """Subject of the messages about waiting for the hub."""

    @property
    def page(self) -> str:
        """Address of its page."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'data set' else ''}{self.name}"


def resolve_revision(source: HubSource) -> str:
    """Return the commit that a source's revision means now.

    Raises:
        UserError: the data set is absent or gated, or the hub cannot be reached.
    """
    use_impatient_client()
    ask = partial(HfApi().dataset_info, source.dataset, revision=source.revision, timeout=ANSWER_WITHIN)
    return patiently(_repository(source), WAITS_TO_OPEN, lambda: str(ask().sha))


def find_hub_files(source: HubSource) -> list[File]:
    """Return the files of a source's split, which stay where they are.

    Raises:
        UserError: as in `resolve_revision`; or there is no such config or split, or it has files of an unknown kind.
    """
    from datasets import load_dataset_builder, logging

    logging.set_verbosity(logging.ERROR)
    revision = resolve_revision(source)
    try:
        builder = patiently(
            _repository(source),
            WAITS_TO_OPEN,
            lambda: load_dataset_builder(source.dataset, source.config, revision=revision),
        )
    # An unknown config, whose message lists the known; no files; a script, which is run no more.
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        _refuse(_repository(source), error)
        raise UserError(f"data set {source.dataset}: {' '.join(str(error).split())}") from None
    found = {str(split): urls for split, urls in (builder.config.data_files or {}).items()}
    if source.split not in found:
        hint = did_you_mean(source.split, found) or f" (there are: {', '.join(found)})"
        raise UserError(f"data set {source.dataset}, config {builder.config.name}: no split '{source.split}'{hint}")
    urls = list(map(str, found[source.split]))
    for url in urls:
        if not url.startswith("hf://"):
            raise UserError(
                f"{Path(source.dataset).absolute()} hides the data set of that name: move it, or work elsewhere"
            )
        if suffix(url) not in RECORDS | TEXTS:
            known = ", ".join(sorted(RECORDS | TEXTS))
            raise UserError(f"{url}: is of a kind that cannot be read; {known} can, also as .gz")
    return [_remote(source, url) for url in urls]


def _remote(source: HubSource, url: str) -> File:
    name = url.removeprefix("hf://")

    def open_it() -> IO[bytes]:
        return cast(IO[bytes], io.BufferedReader(HfFileSystem().open(url, "rb"), 1 << 20))

    def blocks(start: Position, columns: Sequence[str]) -> Iterator[Block]:
        last: Position | None = None
        reading: Iterator[Block] | None = None

        def next_block() -> Block | None:
            """Return the next block; where the hub broke off, the file is opened again at the last one."""
            nonlocal reading
            if reading is None:
                begun = read_blocks(name, open_it, last or start, columns)
                if last is not None:
                    next(begun)  # was given
                reading = begun
            try:
                return next(reading, None)
            except Exception:
                reading = None  # a generator that has raised says that it is at its end
                raise

        try:
            while (block := patiently(_repository(source), WAITS_TO_READ, next_block)) is not None:
                last = block[0]
                yield block
        except UserError as error:
            raise UserError(f"source '{source.name}': {error}") from None

    return File(name, blocks)


def _repository(source: HubSource) -> Repository:
    return Repository("data set", source.dataset, source.revision, f"source '{source.name}'")


def use_impatient_client() -> None:
    """Give the library a client with a timeout; its own client waits forever for an answer."""
    set_client_factory(_client)


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(ANSWER_WITHIN)
    return client


def patiently(repository: Repository, waits: Sequence[float], attempt: Callable[[], T]) -> T:
    """Return what `attempt` returns, which is called again, after each of the waits, while the hub fails.

    Raises:
        UserError: what cannot be cured by waiting, or the hub still fails at the end.
    """
    for wait in (*waits, None):
        try:
            return attempt()
        except (HfHubHTTPError, httpx2.HTTPError, ConnectionError, TimeoutError) as error:
            _refuse(repository, error)
            what = str(error).strip().partition("\n")[0]
            if wait is None:
                raise UserError(
                    f"the hub at {constants.ENDPOINT} cannot be read ({what}); is there a network?"
                ) from None
            stderr().print(f"{repository.label}: {what}; trying again in {wait:g} s", style="yellow")
            time.sleep(wait)
    raise AssertionError


def _refuse(repository: Repository, error: Any) -> None:
    """Raise `UserError` if an error is one that waiting does not cure."""
    login = "log in by `hf auth login`, or set HF_TOKEN"
    kind, name, page = repository.kind, repository.name, repository.page
    message = str(error)
    if isinstance(error, OfflineModeIsEnabled):
        raise UserError("HF_HUB_OFFLINE is set, so the hub is not asked; unset it to read from it") from None
    if isinstance(error, GatedRepoError) or "is a gated dataset" in message:
        raise UserError(f"{kind} {name} is gated: accept its terms at {page}, then {login}") from None
    if isinstance(error, RevisionNotFoundError):
        raise UserError(f"{kind} {name} has no revision '{repository.revision}'; see {page}") from None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 403:
        raise UserError(f"{kind} {name}: access is refused; accept its terms at {page}, then {login}") from None
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        raise UserError(f"there is no {kind} {name} at {constants.ENDPOINT}; if it is private, {login}")
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        raise UserError(f"{kind} {name}: {message.partition(chr(10))[0]}") from None
