"""Data sets on the Hugging Face hub: find their files, read them by ranges, and retry while the hub fails."""

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

WAITS_TO_OPEN = (1, 3, 5)
"""Seconds between attempts to open a repository."""
WAITS_TO_READ = (5, 10, 20, 40, 60, 60)
"""Seconds between attempts to read a file, after the library's own six attempts, which take 23 s in total."""
TIMEOUT = 10.0
"""Seconds to wait for the hub's answer to a request."""
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
    """Return the commit that a source's revision currently refers to.

    Raises:
        UserError: the data set is missing or gated, or the hub cannot be reached.
    """
    use_client_with_timeout()
    ask = partial(HfApi().dataset_info, source.dataset, revision=source.revision, timeout=TIMEOUT)
    return with_retries(_repository(source), WAITS_TO_OPEN, lambda: str(ask().sha))


def find_hub_files(source: HubSource) -> list[File]:
    """Return the files of a source's split, to be read from the hub.

    Raises:
        UserError: as in `resolve_revision`; or the config or split is unknown, or has files of an unsupported kind.
    """
    from datasets import load_dataset_builder, logging

    logging.set_verbosity(logging.ERROR)
    revision = resolve_revision(source)
    try:
        builder = with_retries(
            _repository(source),
            WAITS_TO_OPEN,
            lambda: load_dataset_builder(source.dataset, source.config, revision=revision),
        )
    # Raised for an unknown config (the message lists the known ones), missing files, or a script, which is never run.
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        _raise_permanent(_repository(source), error)
        raise UserError(f"data set {source.dataset}: {' '.join(str(error).split())}") from None
    found = {str(split): urls for split, urls in (builder.config.data_files or {}).items()}
    if source.split not in found:
        hint = did_you_mean(source.split, found) or f" (there are: {', '.join(found)})"
        raise UserError(f"data set {source.dataset}, config {builder.config.name}: no split '{source.split}'{hint}")
    urls = list(map(str, found[source.split]))
    for url in urls:
        if not url.startswith("hf://"):
            raise UserError(
                f"{Path(source.dataset).absolute()} hides the data set of that name on the hub; rename this folder, or "
                "run the command in another one"
            )
        if suffix(url) not in RECORDS | TEXTS:
            known = ", ".join(sorted(RECORDS | TEXTS))
            raise UserError(f"{url}: is not a supported kind of file; supported are {known}, also as .gz")
    return [_remote(source, url) for url in urls]


def _remote(source: HubSource, url: str) -> File:
    name = url.removeprefix("hf://")

    def open_file() -> IO[bytes]:
        return cast(IO[bytes], io.BufferedReader(HfFileSystem().open(url, "rb"), 1 << 20))

    def blocks(start: Position, columns: Sequence[str]) -> Iterator[Block]:
        last: Position | None = None
        reading: Iterator[Block] | None = None

        def next_block() -> Block | None:
            """Return the next block; after a failure of the hub, reopen the file at the last block."""
            nonlocal reading
            if reading is None:
                reopened = read_blocks(name, open_file, last or start, columns)
                if last is not None:
                    next(reopened)  # already returned
                reading = reopened
            try:
                return next(reading, None)
            except Exception:
                reading = None  # after an exception, a generator only reports its end
                raise

        try:
            while (block := with_retries(_repository(source), WAITS_TO_READ, next_block)) is not None:
                last = block[0]
                yield block
        except UserError as error:
            raise UserError(f"source '{source.name}': {error}") from None

    return File(name, blocks)


def _repository(source: HubSource) -> Repository:
    return Repository("data set", source.dataset, source.revision, f"source '{source.name}'")


def use_client_with_timeout() -> None:
    """Give the library a client with a timeout, because its default client waits forever."""
    set_client_factory(_client)


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(TIMEOUT)
    return client


def with_retries(repository: Repository, waits: Sequence[float], attempt: Callable[[], T]) -> T:
    """Return the result of `attempt`; while the hub fails, wait and try again, once for each of the waits.

    Raises:
        UserError: the failure is permanent, or the hub still fails at the last attempt.
    """
    for wait in (*waits, None):
        try:
            return attempt()
        except (HfHubHTTPError, httpx2.HTTPError, ConnectionError, TimeoutError) as error:
            _raise_permanent(repository, error)
            what = str(error).strip().partition("\n")[0]
            if wait is None:
                raise UserError(
                    f"the hub at {constants.ENDPOINT} cannot be read ({what}); check the network connection"
                ) from None
            stderr().print(f"{repository.label}: {what}; trying again in {wait:g} s", style="yellow")
            time.sleep(wait)
    raise AssertionError


def _raise_permanent(repository: Repository, error: Any) -> None:
    """Raise `UserError` if another attempt would fail as well."""
    login = "log in with `hf auth login`, or set HF_TOKEN"
    kind, name, page = repository.kind, repository.name, repository.page
    message = str(error)
    if isinstance(error, OfflineModeIsEnabled):
        raise UserError("HF_HUB_OFFLINE is set, so the hub is not used; unset it to read from the hub") from None
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
