"""Causal models of the transformers library, for comparison with an RMKV and as teachers."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rmkv_cli.data.snapshot import find_snapshot
from rmkv_cli.errors import UserError, pip_install


def has_transformers() -> bool:
    """Return whether the transformers library is installed."""
    return find_spec("transformers") is not None


def load_transformer(source: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return a transformers causal model in evaluation mode, whose parameters take no gradients.

    Args:
        source: its folder, or its name on the hub.
        device: device for its computations.
        dtype: type for its computations.

    Raises:
        UserError: transformers is not installed, there is no such model, or transformers cannot load it.
    """
    model = _loaded(source, "AutoModelForCausalLM", dtype=dtype)
    model.eval().requires_grad_(False).to(device)
    return model


def load_transformer_tokenizer(source: str) -> Any:
    """Return the tokenizer of a transformers model; arguments and errors as in `load_transformer`."""
    return _loaded(source, "AutoTokenizer")


def _loaded(source: str, kind: str, **how: Any) -> Any:
    """Load a folder, or a name on the hub, with a class of transformers, silently."""
    if not has_transformers():
        raise UserError(f"{source}: loading it requires transformers: {pip_install('hf')}")
    folder = find_snapshot(source)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(folder, **how)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{source}: transformers cannot load it: {' '.join(str(error).split())}") from None


def transformer_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of a transformers model for tokens (B, T)."""
    with torch.inference_mode():
        return model(input_ids=input_ids.to(model.device), use_cache=False).logits
