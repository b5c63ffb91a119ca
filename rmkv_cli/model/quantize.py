"""Quantize a model: convert its large matrices to integers, one at a time."""

from rmkv_cli.config import QuantizationConfig
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.model.adapters import is_adapted
from rmkv_cli.model.model import RMKV
from rmkv_cli.model.quantized import Quantized, make_quantized, quantizable


def quantize(model: RMKV, config: QuantizationConfig) -> None:
    """Replace a model's large matrices by integers in place. Only one matrix at a time exists in both forms.

    Args:
        model: a model without an adapter; afterwards it can only be used for inference.
        config: bits, group size, and layers to keep in floating point.

    Raises:
        UserError: the model is already quantized, has an adapter, or has a width that the group size does not divide;
            or an entry of `keep` matches no layer.
    """
    if model.config.quantization is not None:
        raise UserError("the model is already quantized; quantize the original model instead")
    if is_adapted(model):
        raise UserError("the model has an adapter; merge it into its base model first (rmkv merge)")
    names = list(quantizable(model))
    ends = {".".join(name.split(".")[i:]) for name in names for i in range(len(name.split(".")))}
    for kept in config.keep:
        if kept not in ends:
            raise UserError(f"--keep: '{kept}' is not a layer that can be quantized{did_you_mean(kept, sorted(ends))}")
    for name, layer in quantizable(model, config.keep).items():
        new = make_quantized(name, layer, config)
        for part, integers in new.named_modules():
            if isinstance(integers, Quantized):
                if integers.bits == 4 and integers.columns % config.group_size:
                    raise UserError(
                        f"--group-size {config.group_size} does not divide the {integers.columns} columns of '{name}'; "
                        f"choose another, or leave this layer as it is with --keep {name}"
                    )
                integers.quantize(layer.get_parameter(part or "weight"))
        model.set_submodule(name, new)
    model.config = model.config.model_copy(update={"quantization": config})
