"""Notes: what a model carries after a text, in a file that outlives the process."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rmkv_cli.errors import UserError
from rmkv_cli.files import require_file, whole_file
from rmkv_cli.generation.prompt import Prompt
from rmkv_cli.model import RMKV, State
from rmkv_cli.tokenizer import Tokenizer

FORMAT = "rmkv-notes-1"


def save_notes(path: Path, prompt: Prompt, model: RMKV, tokenizer: Tokenizer) -> None:
    """Write what was read to a safetensors file, whole.

    It holds the state, the logits of the token that would follow and which tokens were seen, and as metadata the
    format, the hashes of the model and of the tokenizer, and the number of tokens of the document read so far.

    Raises:
        UserError: there is no room for it, or no right to write it.
    """
    tensors = {f"state.{name}": x for name, x in prompt.state.tensors().items()}
    tensors |= {"logits": prompt.logits, "seen": prompt.seen}
    metadata = {
        "format": FORMAT,
        "model": model_hash(model),
        "tokenizer": tokenizer.hash,
        "tokens": str(int(prompt.state.position)),
    }
    # Copies, as safetensors takes no tensors that share memory.
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    try:
        with whole_file(path) as aside:
            save_file(copies, aside, metadata)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def load_notes(path: Path, model: RMKV, tokenizer: Tokenizer) -> Prompt:
    """Return what `save_notes` saved, on the model's device, to read or write on from; its `tokens` are 0.

    Raises:
        UserError: the file is absent, damaged or holds no notes, or another model or tokenizer made them.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt", device=str(model.memory.device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: holds no notes ({FORMAT}); `rmkv read` makes them")
            _require_same(path, "tokenizer", metadata["tokenizer"], tokenizer.hash)
            _require_same(path, "model", metadata["model"], model_hash(model))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        logits, seen = tensors.pop("logits"), tensors.pop("seen")
        state = State.from_tensors({name.removeprefix("state."): x for name, x in tensors.items()})
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: is damaged, or holds no notes: {error}") from None
    return Prompt(0, 0.0, logits, state, seen)


def model_hash(model: RMKV) -> str:
    """Return a SHA-256, in hexadecimal, of the model's config (defaults left out) and of its weights."""
    config = model.config.model_dump(exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _require_same(path: Path, what: str, saved: str, own: str) -> None:
    if saved != own:
        raise UserError(
            f"{path}: another {what} made these notes ({saved[:12]}, this one is {own[:12]}); give the one that did, "
            "or read the text again"
        )
