"""Save the state that a model has after reading a text, and load it in another process."""

from pathlib import Path

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.generation.compressed import Compression, compress, compressed_layout, expand, is_compression
from rmkv_cli.generation.hashes import model_hash, rounded_hash
from rmkv_cli.generation.prompt import Prompt
from rmkv_cli.generation.start import START, read_start
from rmkv_cli.model import RMKV, State
from rmkv_cli.model.state_file import expected_layout, find_fault
from rmkv_cli.model.tensors import Layout, TensorFile, difference, open_tensors, save_tensors
from rmkv_cli.tokenizer import Tokenizer

FORMAT = "rmkv-notes-2"
WITH_SLOTS = "rmkv-notes-1"  # inside a segment, slots' keys and values precede those of the tokens
STATE = "state."  # prefix of the names of the state's tensors
DAMAGED = "is damaged or not a notes file"


def save_notes(
    path: Path, prompt: Prompt, model: RMKV, tokenizer: Tokenizer, compression: Compression | None = None
) -> None:
    """Write a reading to a safetensors file, atomically.

    It contains the state, the logits of the next token and which tokens were seen. Its metadata are the format, the
    hashes of the model and the tokenizer, the number of tokens of the document read so far, and a checksum. The model's
    hash is the same in float32 and bfloat16. With `compression` the state takes fewer bits and is no longer exact.

    Raises:
        UserError: the disk is full, or the file may not be written.
    """
    state = prompt.state.tensors()
    tensors = {f"{STATE}{name}": x for name, x in (compress(state, compression) if compression else state).items()}
    tensors |= {"logits": prompt.logits, "seen": prompt.seen}
    metadata = {
        "format": FORMAT,
        "model": rounded_hash(model),
        "tokenizer": tokenizer.hash,
        "tokens": str(int(prompt.state.position)),
    }
    if compression:
        metadata["compression"] = compression
    # Copies, because safetensors rejects tensors that share memory.
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    save_tensors(copies, path, metadata)


def load_notes(path: Path, model: RMKV, tokenizer: Tokenizer) -> Prompt:
    """Return a reading that `save_notes` or `save_start` saved, on the model's device; its `tokens` are 0.

    A state that the model saved when it computed in another type is converted.

    Raises:
        UserError: the file is absent, damaged, not notes, or was made by another model or tokenizer.
    """
    with open_tensors(path, DAMAGED) as file:
        metadata = file.metadata
        if metadata.get("format") == START:
            return read_start(file, model, tokenizer)
        if metadata.get("format") not in (FORMAT, WITH_SLOTS):
            raise UserError(f"{path}: is not a notes file; create one with `rmkv read`")
        if metadata.get("tokenizer") != tokenizer.hash:
            raise _made_by_another(path, "tokenizer", metadata.get("tokenizer", ""), tokenizer.hash)
        if metadata.get("model") != (rounded := rounded_hash(model)) and metadata.get("model") != model_hash(model):
            if metadata["format"] == WITH_SLOTS and model.dtype == torch.bfloat16:
                raise UserError(
                    f"{path}: was made by an older version of rmkv or with a different model; try it without --dtype"
                )
            raise _made_by_another(path, "model", metadata.get("model", ""), rounded)
        compression = metadata.get("compression")
        if compression is not None and not is_compression(compression):
            raise UserError(f"{path}: {DAMAGED}: 'compression' is '{compression}', should be bf16 or int8")
        types, row = _layout(file, model), (1, model.config.vocab_size)
        stored = compressed_layout(types, compression) if compression else types
        beside: Layout = {"logits": (torch.float32, row), "seen": (torch.bool, row)}
        if wrong := difference(file.layout, beside | {f"{STATE}{name}": x for name, x in stored.items()}):
            raise UserError(f"{path}: {DAMAGED}: {wrong}")
        tensors = {name.removeprefix(STATE): x.to(model.memory.device) for name, x in file.tensors().items()}
    logits, seen = tensors.pop("logits"), tensors.pop("seen")
    state = State.from_tensors(expand(tensors, types) if compression else tensors)
    if wrong := find_fault(state):
        raise UserError(f"{path}: {DAMAGED}: {wrong}")
    if metadata.get("tokens") != str(int(state.position)) or not logits.isfinite().all():
        raise UserError(f"{path}: {DAMAGED}: its count of tokens is wrong, or its logits are not finite")
    return Prompt(0, 0.0, logits, state.to_precision(model.dtype), seen)


def _layout(file: TensorFile, model: RMKV) -> Layout:
    """Return the layout of the state in a file of this model's notes, before compression.

    The file determines the length of the open segment and the type in which the model computed."""
    name, length = f"{STATE}filled", model.config.segment_length
    filled = int(file.tensor(name)) if file.layout.get(name) == (torch.int64, ()) else -1
    if not 0 <= filled < length:
        raise UserError(f"{file.path}: {DAMAGED}: '{name}' should be a number from 0 to {length - 1}")
    keys, _ = file.layout.get(f"{STATE}keys.0", (None, ()))
    dtype = keys if isinstance(keys, torch.dtype) and keys.is_floating_point else torch.float32
    slots = 2 * model.config.memory.slots if file.metadata["format"] == WITH_SLOTS else 0
    return expected_layout(model.initial_state(1).to_precision(dtype), filled, slots)


def _made_by_another(path: Path, what: str, saved: str, own: str) -> UserError:
    return UserError(
        f"{path}: was made with a different {what} ({saved[:12]}, not {own[:12]}); use that {what}, or read the text "
        "again with this one"
    )
