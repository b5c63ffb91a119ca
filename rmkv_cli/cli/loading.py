"""Options and loading of a trained model, shared by the commands that use one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmkv_cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from rmkv_cli.model import RMKV
    from rmkv_cli.tokenizer import Tokenizer

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto uses a GPU if there is one.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="<auto|fp32|bf16>",
        help="bf16 saves memory; slots, cells and stores stay in fp32. auto: bf16 for quantized models, else fp32.",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="Add this LoRA adapter to the model: a folder of PEFT's, or a run."),
]


def torch_dtype(name: str, *, quantized: bool = False) -> "torch.dtype":
    """Return the dtype that `--dtype` selects for a model; raise `UserError` if it is unknown."""
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype {name}: should be auto, fp32 or bf16")
    import torch

    return torch.bfloat16 if name == "bf16" or (name == "auto" and quantized) else torch.float32


def load_model(
    directory: Path, device: str, dtype: str = "auto", adapter: Path | None = None
) -> "tuple[RMKV, Tokenizer]":
    """Return the model and tokenizer of a model folder, a checkpoint or a run, on the device; errors as below."""
    return find_and_load(directory, device, dtype, adapter)[1:]


def find_and_load(
    directory: Path, device: str, dtype: str = "auto", adapter: Path | None = None
) -> "tuple[Path, RMKV, Tokenizer]":
    """Return the model folder that `directory` refers to (a run: its latest checkpoint), its model and tokenizer.

    The model computes in `dtype` (see `torch_dtype`) and includes the adapter, if one is given.

    Raises:
        UserError: one of them is missing or damaged, they do not fit each other, or the device or dtype is unknown.
    """
    from rmkv_cli.model import RMKV, find_model
    from rmkv_cli.model.adapter_file import is_adapter
    from rmkv_cli.model.pretrained import read_config
    from rmkv_cli.tokenizer import Tokenizer
    from rmkv_cli.training import resolve_device

    directory = find_model(directory)
    quantized = not is_adapter(directory) and read_config(directory).quantization is not None
    model = RMKV.from_pretrained(directory, resolve_device(device), torch_dtype(dtype, quantized=quantized))
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer does not fit its model: the tokenizer has {tokenizer.vocab_size} tokens, the "
            f"model only {model.config.vocab_size}"
        )
    if adapter is not None:
        model = adapted_model(model, directory, adapter)
    return directory, model, tokenizer


def adapted_model(model: "RMKV", directory: Path, adapter: Path) -> "RMKV":
    """Return a copy of the model from `directory` with an adapter; both share the base weights.

    Raises:
        UserError: there is no such adapter, it does not fit, or the model already has an adapter.
    """
    from rmkv_cli.model import find_model
    from rmkv_cli.model.adapter_file import adapted_copy, is_adapter, warn_of_another_base

    if is_adapter(directory):
        raise UserError(f"{directory}: already has an adapter; merge that into its base model with `rmkv merge` first")
    folder = find_model(adapter)
    adapted = adapted_copy(model, folder)
    warn_of_another_base(folder, directory)
    return adapted
