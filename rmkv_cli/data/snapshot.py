"""Models on the Hugging Face hub: download of their files into the local cache."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from rmkv_cli.data.hub import WAITS_TO_OPEN, Repository, use_client_with_timeout, with_retries
from rmkv_cli.errors import UserError

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
UNUSED = ("*/*", "consolidated*")
"""Copies of the weights for other programs."""


def find_snapshot(source: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Return the folder with a model's files: `source` itself, or a local copy of the model with that name on the hub.

    Cached files are not downloaded again, and are used if the hub cannot be reached.

    Args:
        source: a folder, or a name on the hub, OWNER/NAME.
        patterns: patterns of the files that are needed.

    Raises:
        UserError: there is neither a folder nor a model with that name, it is gated, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise UserError(f"{source}: is not a folder; name the folder of a model, or OWNER/NAME on the hub")
    use_client_with_timeout()

    def download() -> Path:
        try:
            return Path(snapshot_download(source, allow_patterns=[*patterns], ignore_patterns=[*UNUSED]))
        except LocalEntryNotFoundError as error:  # the hub cannot be reached, and the cache lacks the model
            raise error.__cause__ or error from None

    try:
        return with_retries(Repository("model", source, "main", source), WAITS_TO_OPEN, download)
    except HFValidationError:
        raise UserError(f"{source}: no such folder, and not a name on the hub (OWNER/NAME)") from None
