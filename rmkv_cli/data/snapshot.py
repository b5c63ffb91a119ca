"""Models of the Hugging Face hub: their files, downloaded into its cache."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from rmkv_cli.data.hub import WAITS_TO_OPEN, Repository, patiently, use_impatient_client
from rmkv_cli.errors import UserError

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
UNUSED = ("*/*", "consolidated*")
"""Copies of the weights for other programs."""


def find_snapshot(source: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Return the folder with a model's files: `source` itself, or what the hub has under that name.

    What the cache already holds is not downloaded again, and is used where the hub cannot be reached.

    Args:
        source: a folder, or a name of the hub, OWNER/NAME.
        patterns: the files that are needed.

    Raises:
        UserError: there is neither a folder nor a model of that name, it is gated, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise UserError(f"{source}: is not a folder; name the folder of a model, or OWNER/NAME of the hub")
    use_impatient_client()

    def download() -> Path:
        try:
            return Path(snapshot_download(source, allow_patterns=[*patterns], ignore_patterns=[*UNUSED]))
        except LocalEntryNotFoundError as error:  # neither the hub nor the cache
            raise error.__cause__ or error from None

    try:
        return patiently(Repository("model", source, "main", source), WAITS_TO_OPEN, download)
    except HFValidationError:
        raise UserError(f"{source}: no such folder, and no name of the hub, which is OWNER/NAME") from None
