"""What the commands that use a trained model share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmkv_cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from rmkv_cli.model import RMKV
    from rmkv_cli.tokenizer import Tokenizer

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="<fp32|bf16>", help="Use bf16 to save memory; slots, cells and stores stay in fp32."
    ),
]


def torch_dtype(name: str) -> "torch.dtype":
    """Return the type that `--dtype` names; raise `UserError` if it names none."""
    if name not in ("fp32", "bf16"):
        raise UserError(f"--dtype {name}: should be fp32 or bf16")
    import torch

    return torch.bfloat16 if name == "bf16" else torch.float32


def load_model(directory: Path, device: str, dtype: str = "fp32") -> "tuple[RMKV, Tokenizer]":
    """Return the model and tokenizer of a model folder, a checkpoint or a run, on the device; errors as below."""
    return find_and_load(directory, device, dtype)[1:]


def find_and_load(directory: Path, device: str, dtype: str = "fp32") -> "tuple[Path, RMKV, Tokenizer]":
    """Return the model folder that `directory` means (of a run, its latest checkpoint), its model and tokenizer.

    The model computes in `dtype`, as `torch_dtype` reads it.

    Raises:
        UserError: one of them is absent or damaged, they do not fit each other, or there is no such device or type.
    """
    from rmkv_cli.model import RMKV, find_model
    from rmkv_cli.tokenizer import Tokenizer
    from rmkv_cli.training import resolve_device

    directory = find_model(directory)
    model = RMKV.from_pretrained(directory, resolve_device(device), torch_dtype(dtype))
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer does not fit its model: {tokenizer.vocab_size} tokens, the model has "
            f"{model.config.vocab_size}"
        )
    return directory, model, tokenizer
