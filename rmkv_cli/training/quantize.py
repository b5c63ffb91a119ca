"""`rmkv quantize`: write a model folder with quantized weights, and compare it to its source."""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rmkv_cli.config import NeedleSource, QuantizationConfig, RecallSource, TaskSource
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import held_out_text, measure, task_accuracy
from rmkv_cli.files import atomic_directory, require_new
from rmkv_cli.generation import Decoder
from rmkv_cli.markdown import table
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.model.adapter_file import is_adapter
from rmkv_cli.model.pretrained import WEIGHTS, write_checksums
from rmkv_cli.model.quantize import quantize
from rmkv_cli.progress import progress
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model

TIMED_TOKENS = 32  # tokens decoded to measure speed
EXAMPLES = 32  # documents per cell of a task


@dataclass(frozen=True)
class Measures:
    """Size, speed and quality of a model."""

    bytes: int
    """Size of the weights' file."""
    tokens_per_second: float
    """Decoding rate of one text."""
    bits_per_byte: float | None
    """Loss on the held-out texts; None if there are none."""
    tasks: dict[str, float]
    """Accuracy by task, averaged over difficulties."""


@dataclass(frozen=True)
class Comparison:
    """A model before and after quantization."""

    before: Measures
    after: Measures

    def rows(self) -> list[list[str]]:
        """Return a table with the columns measure, before and after."""
        before, after = self.before, self.after
        rows = [["weights, MB", f"{before.bytes / 1e6:,.1f}", f"{after.bytes / 1e6:,.1f}"]]
        if before.bits_per_byte is not None and after.bits_per_byte is not None:
            rows.append(["bits per byte", f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}"])
        rows += [[f"{task}, accuracy", f"{x:.3f}", f"{after.tasks[task]:.3f}"] for task, x in before.tasks.items()]
        return [*rows, ["tokens/s decoding", f"{before.tokens_per_second:,.1f}", f"{after.tokens_per_second:,.1f}"]]


def quantize_folder(
    source: Path,
    out: Path,
    config: QuantizationConfig,
    data: Path | None = None,
    max_tokens: int | None = None,
) -> Comparison:
    """Write a model folder with quantized weights and a README.md that compares it to its source.

    Args:
        source: a model folder, a checkpoint or a run.
        out: the folder to write; must not exist.
        config: bits, group size and layers to keep in floating point.
        data: prepared data, of which held-out documents and the tasks recall and needle are used, or a file of text.
        max_tokens: maximum number of tokens of `data` to read.

    Raises:
        UserError: `out` exists, there is no model or no data, or the model cannot be quantized (see `quantize`).
    """
    require_new(out)
    folder = find_model(source)
    if is_adapter(folder):
        raise UserError(f"{source}: is an adapter; merge it first: rmkv merge MODEL {source} --out DIR")
    tokenizer = Tokenizer.load(folder)
    measure_model = _Evaluator(tokenizer, data, max_tokens)
    model = RMKV.from_pretrained(folder)
    before = measure_model("before", model, folder)
    quantize(model, config)
    with atomic_directory(out) as temporary:
        write_model(temporary, model, tokenizer)
        del model
        after = measure_model("after", RMKV.from_pretrained(temporary, dtype=torch.bfloat16), temporary)
        comparison = Comparison(before, after)
        (temporary / "README.md").write_text(_card(out, config, comparison))
        write_checksums(temporary)
    return comparison


class _Evaluator:
    """Texts and tasks to measure both models on."""

    def __init__(self, tokenizer: Tokenizer, data: Path | None, max_tokens: int | None) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.documents: Documents | None = None
        self.tasks: list[tuple[TaskSource, Any]] = []  # each with its noise, if that is text
        if data is None:
            return
        if data.is_dir():
            self.documents = Documents.open(data, "validation")
            tasks = [x for x in Manifest.load(data).mix.sources if isinstance(x, RecallSource | NeedleSource)]
            self.tasks = [(x, held_out_text(data, x.text, tokenizer) if x.text else None) for x in tasks]
        else:
            self.documents = Documents.from_files([data], tokenizer, max_tokens)

    def __call__(self, when: str, model: RMKV, folder: Path) -> Measures:
        """Return the measures of a model and its folder."""
        bits, tasks = None, {}
        if self.documents is not None:
            tokens = min(int(self.documents.lengths.sum()), self.max_tokens or math.inf)
            with progress(f"reading, {when}", tokens, "tokens") as advance:
                options: dict[str, Any] = {
                    "max_tokens": self.max_tokens,
                    "tokenizer": self.tokenizer,
                    "advance": advance,
                }
                bits = measure(model, self.documents, **options).bits_per_byte
        for task, text in self.tasks:
            with progress(f"{task.name}, {when}", None, "documents") as advance:
                report = task_accuracy(model, task, self.tokenizer, text, examples=EXAMPLES, advance=advance)
            tasks[task.name] = sum(cell.accuracy for cell in report.cells) / len(report.cells)
        return Measures((folder / WEIGHTS).stat().st_size, decoding_rate(model), bits, tasks)


def decoding_rate(model: RMKV) -> float:
    """Return a model's decoding rate for one text, in tokens per second."""
    decoder = Decoder(model)
    decoder.add(model.initial_state(1))
    token = torch.zeros(1, dtype=torch.int64, device=model.memory.device)
    decoder.step(token)
    begun = perf_counter()
    for _ in range(TIMED_TOKENS):
        decoder.step(token)
    return TIMED_TOKENS / (perf_counter() - begun)


def _card(out: Path, config: QuantizationConfig, comparison: Comparison) -> str:
    precision = "8 bits"
    if config.bits == 4:
        precision = f"4 bits in groups of {config.group_size}, its embeddings and head to 8 bits"
    kept = f" Not quantized: {', '.join(config.keep)}." if config.keep else ""
    return f"""\
# {out.name}

An RMKV whose matrices are quantized to {precision}.{kept}

```console
$ rmkv generate --model {out.name} --prompt "Once upon a time"
```

{table(["", "before", "after"], comparison.rows())}
"""
