"""Quantize a model: its large matrices become integers, one after the other."""

from rmkv_cli.config import QuantizationConfig
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.model.adapters import is_adapted
from rmkv_cli.model.model import RMKV
from rmkv_cli.model.quantized import Quantized, quantizable, replacement


def quantize(model: RMKV, how: QuantizationConfig) -> None:
    """Replace a model's matrices by integers, in place; no more than one of them exists twice.

    Args:
        model: a model without an adapter; it is fit for inference alone afterwards.
        how: bits, group size, and the layers that stay as they are.

    Raises:
        UserError: the model is quantized already, has an adapter, or a width that no group size divides; `keep` names
            no layer.
    """
    if model.config.quantization is not None:
        raise UserError("the model is quantized already; quantize the model that it was made from")
    if is_adapted(model):
        raise UserError("the model has an adapter; `rmkv merge` puts it into its base model, which can be quantized")
    names = list(quantizable(model))
    ends = {".".join(name.split(".")[i:]) for name in names for i in range(len(name.split(".")))}
    for kept in how.keep:
        if kept not in ends:
            raise UserError(f"--keep: '{kept}' is no layer that is quantized{did_you_mean(kept, sorted(ends))}")
    for name, layer in quantizable(model, how.keep).items():
        new = replacement(name, layer, how)
        for part, integers in new.named_modules():
            if isinstance(integers, Quantized):
                if integers.bits == 4 and integers.columns % how.group_size:
                    raise UserError(
                        f"--group-size {how.group_size} does not divide the {integers.columns} columns of '{name}'; "
                        f"--keep {name} leaves it as it is"
                    )
                integers.quantize(layer.get_parameter(part or "weight"))
        model.set_submodule(name, new)
    model.config = model.config.model_copy(update={"quantization": how})
