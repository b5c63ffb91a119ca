"""`rmkv upcycle`: give a dense model experts that change nothing at first (Komatsuzaki et al., 2022)."""

from pathlib import Path

import torch
from torch import nn

from rmkv_cli.config import ModelConfig, parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import require_new
from rmkv_cli.model import RMKV, RMKVBlock, find_model
from rmkv_cli.model.adapter_file import is_adapter
from rmkv_cli.model.experts import Experts
from rmkv_cli.model.feed_forward import FeedForward
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model_folder


def upcycle(source: Path, out: Path, experts: int, per_token: int, size: int) -> RMKV:
    """Write a model folder with the source's function and new experts beside its feed-forwards; return the model.

    Args:
        source: a model folder, a checkpoint or a run of a dense model.
        out: the folder to write; must not exist.
        experts: number of experts per layer.
        per_token: number of experts that process each token.
        size: width of an expert; 0: that of the feed-forward.

    Raises:
        UserError: `out` exists, there is no model, it is not dense or has no feed-forward, or the numbers do not fit.
    """
    require_new(out)
    folder = find_model(source)
    if is_adapter(folder):
        raise UserError(f"{source}: is an adapter; merge it first: rmkv merge MODEL {source} --out DIR")
    dense = RMKV.from_pretrained(folder, dtype=torch.float32)
    if dense.config.experts:
        raise UserError(f"{source}: already has {dense.config.experts} experts per layer")
    if dense.config.quantization is not None:
        raise UserError(f"{source}: is quantized; upcycle the original model instead")
    if size > dense.config.intermediate_size:
        raise UserError(
            f"--expert-size {size} is more than the feed-forward's width, {dense.config.intermediate_size}; "
            "experts begin as parts of it"
        )
    shape = {"experts": experts, "experts_per_token": per_token, "expert_size": size}
    config = parse(ModelConfig, dense.config.model_dump() | shape, "rmkv upcycle")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RMKV(config)
        model.load_state_dict(dense.state_dict(), strict=False)
        for block in model.blocks:
            assert isinstance(block, RMKVBlock)
            if block.feed_forward is not None and block.experts is not None:
                _begin_as_parts(block.experts, block.feed_forward)
    write_model_folder(out, model, Tokenizer.load(folder))
    return model


@torch.no_grad()
def _begin_as_parts(experts: Experts, feed_forward: FeedForward) -> None:
    """Set each expert's hidden units to some of the feed-forward's, in a random order, and its output to 0."""
    order = torch.randperm(feed_forward.gate.out_features)
    for i, expert in enumerate(experts.feed_forwards):
        assert isinstance(expert, FeedForward)
        size = expert.gate.out_features
        units = order[torch.arange(i * size, (i + 1) * size) % len(order)]
        expert.gate.weight.copy_(feed_forward.gate.weight[units])
        expert.up.weight.copy_(feed_forward.up.weight[units])
        nn.init.zeros_(expert.down.weight)
