"""An imported model's logits beside those of transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.transformer import load_transformer, load_transformer_tokenizer, transformer_logits
from rmkv_cli.model import RMKV, reading

TEXT = "The river is 1,240 km long; it rises in the hills.\n\ndef length(x: list[int]) -> int:\n    return len(x)\n"
TOLERANCE = 1e-3
"""Most that a logit may differ, in units of the largest one. Rounding in float32 accounts for a tenth of that."""


@dataclass(frozen=True)
class Check:
    """How far an imported model's logits are from transformers'."""

    tokens: int
    difference: float
    """The largest of all logits' absolute differences."""
    largest: float
    """The largest absolute logit of transformers."""


def check_logits(source: Path, model: Path) -> Check:
    """Return how far the logits of a model folder are from those of its source by transformers, on a short text.

    Both compute in float32. Raises `UserError` where they differ by more than rounding does.
    """
    ours = RMKV.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([load_transformer_tokenizer(str(source))(TEXT)["input_ids"][: ours.config.segment_length]])
    with reading(ours):
        logits = ours(ids)[0]
    del ours
    expected = transformer_logits(load_transformer(str(source)), ids)
    found = Check(ids.numel(), (logits - expected).abs().max().item(), expected.abs().max().item())
    if not found.difference <= TOLERANCE * found.largest:
        raise UserError(
            f"{source}: was read without an error, but the logits differ from transformers' by {found.difference:.3g} "
            f"(the largest is {found.largest:.3g}), so that this model is not the same; --no-check writes it all the "
            "same"
        )
    return found
