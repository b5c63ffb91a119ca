"""Comparison of an imported model's logits with those of transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.transformer import load_transformer, load_transformer_tokenizer, transformer_logits
from rmkv_cli.model import RMKV, inference

TEXT = "The river is 1,240 km long; it rises in the hills.\n\ndef length(x: list[int]) -> int:\n    return len(x)\n"
TOLERANCE = 1e-3
"""Maximum difference of a logit, relative to the largest logit. Rounding in float32 accounts for a tenth of it."""


@dataclass(frozen=True)
class Check:
    """Difference between an imported model's logits and those of transformers."""

    tokens: int
    difference: float
    """Largest absolute difference of a logit."""
    largest: float
    """Largest absolute logit of transformers."""


def check_logits(source: Path, model: Path) -> Check:
    """Compare the logits of a model folder on a short text with those that transformers computes from its source.

    Both compute in float32. Raises `UserError` if the logits differ by more than rounding.
    """
    ours = RMKV.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([load_transformer_tokenizer(str(source))(TEXT)["input_ids"][: ours.config.segment_length]])
    with inference(ours):
        logits = ours(ids)[0]
    del ours
    expected = transformer_logits(load_transformer(str(source)), ids)
    found = Check(ids.numel(), (logits - expected).abs().max().item(), expected.abs().max().item())
    if not found.difference <= TOLERANCE * found.largest:
        raise UserError(
            f"{source}: was imported without an error, but the logits differ from transformers' by "
            f"{found.difference:.3g} (the largest is {found.largest:.3g}), so this is not the same model; --no-check "
            "writes it anyway"
        )
    return found
