"""`rmkv quantize`: a model folder becomes one of integers, with a report of what that costs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from rmkv_cli.config import QuantizationConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import measure
from rmkv_cli.files import require_new, whole_directory
from rmkv_cli.generation import Decoder
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.model.adapter_file import is_adapter
from rmkv_cli.model.pretrained import WEIGHTS, write_checksums
from rmkv_cli.model.quantize import quantize
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model

DECODED = 32  # tokens whose decoding is timed


@dataclass(frozen=True)
class Cost:
    """What a model takes and gives."""

    bytes: int
    """Of its weights in the file."""
    bits_per_byte: float | None
    """On the held-out texts; None without any."""
    tokens_per_second: float
    """Decoding one text, in the type that it decodes in by default."""


@dataclass(frozen=True)
class Quantization:
    """A model before and after quantization."""

    before: Cost
    after: Cost


def quantize_folder(
    source: Path,
    out: Path,
    how: QuantizationConfig,
    data: Path | None = None,
    max_tokens: int | None = None,
    advance: Callable[[float], None] = lambda n: None,
) -> Quantization:
    """Write the model folder `out`, a model with quantized matrices, and return what it costs.

    Args:
        source: a model folder, a checkpoint or a run.
        out: must not exist.
        how: bits, group size and what stays as it is.
        data: prepared data, of which the held-out documents are read, or a text.
        max_tokens: most tokens of it that are read.
        advance: called with the tokens that were read.

    Raises:
        UserError: `out` exists, there is no model, or it cannot be quantized (see `quantize`).
    """
    require_new(out)
    folder = find_model(source)
    if is_adapter(folder):
        raise UserError(f"{source}: is an adapter; merge it first: rmkv merge MODEL {source} --out DIR")
    tokenizer = Tokenizer.load(folder)
    documents = None if data is None else _documents(data, tokenizer, max_tokens)

    def cost(model: RMKV, place: Path) -> Cost:
        bits = None
        if documents is not None:
            report = measure(model, documents, max_tokens=max_tokens, tokenizer=tokenizer, advance=advance)
            bits = report.bits_per_byte
        return Cost((place / WEIGHTS).stat().st_size, bits, decoding_rate(model))

    model = RMKV.from_pretrained(folder)
    before = cost(model, folder)
    quantize(model, how)
    with whole_directory(out) as aside:
        write_model(aside, model, tokenizer)
        write_checksums(aside)
    del model
    return Quantization(before, cost(RMKV.from_pretrained(out, dtype=torch.bfloat16), out))


def decoding_rate(model: RMKV) -> float:
    """Return the tokens per second that a model decodes of one text."""
    decoder = Decoder(model)
    decoder.add(model.initial_state(1))
    token = torch.zeros(1, dtype=torch.int64, device=model.memory.device)
    decoder.step(token)
    begun = perf_counter()
    for _ in range(DECODED):
        decoder.step(token)
    return DECODED / (perf_counter() - begun)


def _documents(data: Path, tokenizer: Tokenizer, max_tokens: int | None) -> Documents:
    if data.is_dir():
        return Documents.open(data, "validation")
    return Documents.from_files([data], tokenizer, max_tokens)
