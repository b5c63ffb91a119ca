"""Models of other kinds, by transformers, trained as RMKV is: same rows, same order, optimizer and schedule."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import Config, ModelConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import IGNORED, Lanes, Prepared, Rows
from rmkv_cli.files import atomic_file
from rmkv_cli.model import RMKV
from rmkv_cli.model.context import TAPS
from rmkv_cli.training.optimizer import learning_rate


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def same_size(make: Callable[[int], nn.Module], parameters: int) -> int:
    """Return the width of the feed-forward with which a model comes nearest to so many parameters."""
    with torch.device("meta"):
        least = size(make(8))
        a_unit = size(make(9)) - least
    return 8 + round((parameters - least) / a_unit)


def feed_forward_like(model: ModelConfig, other: ModelConfig) -> int:
    """Return the width of the feed-forward with which an RMKV comes nearest to another's number of parameters."""
    with torch.device("meta"):
        parameters = size(RMKV(other))
    return same_size(lambda inner: RMKV(model.model_copy(update={"intermediate_size": inner})), parameters)


def of_equal_size(peer: Callable[[Config, int], nn.Module], config: Config) -> nn.Module:
    """Return an untrained model of another kind with the number of parameters of the config's RMKV, within 0.1%."""
    with torch.device("meta"):
        parameters = size(RMKV(config.model))
    make = partial(peer, config)
    torch.manual_seed(config.train.seed)
    return make(same_size(make, parameters))


def llama(config: Config, inner: int) -> nn.Module:
    """Return a model of full attention, of RMKV's width and depth: Llama (Touvron et al., 2023)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **_shape(config),
            intermediate_size=inner,
            num_attention_heads=config.model.num_attention_heads,
            attn_implementation="sdpa",
        )
    )


def llama_with_shifted_keys(config: Config, inner: int) -> nn.Module:
    """Return a Llama whose first layers also attend as RMKV's store reads: to all tokens, by shifted keys."""
    model = llama(config, inner)
    for layer in model.model.layers[: config.model.stores]:
        layer.self_attn = WithShiftedKeys(layer.self_attn, config.model.num_attention_heads)
    return model


class WithShiftedKeys(nn.Module):
    """Attention, and a second attention with the same queries, keys and values, but with the store's own means.

    It has no positions. Queries and keys pass through a short convolution, and a value stands under the key of the
    previous token. Only the direction of queries and keys counts, times a learned scale per head (Henry et al., 2020,
    "Query-Key Normalization for Transformers"). As in the store, keys start equal to queries, and a norm and a gate
    follow. Where the store keeps one matrix, this keeps all keys and values.
    """

    def __init__(self, attention: nn.Module, heads: int) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        width = attention.q_proj.out_features
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, TAPS, groups=width, bias=False) for _ in range(2))
        self.scale = nn.Parameter(torch.full((heads, 1, 1), 10.0))
        self.gate, self.norm = nn.Linear(attention.q_proj.in_features, heads), nn.RMSNorm(width // heads)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            for convolution in self.convolutions:
                convolution.weight.zero_()[..., -1] = 1

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        """Return the sum of both attentions for hidden states (B, T, D), and the weights of the first, if any."""
        output, weights = self.attention(hidden_states=hidden_states, **arguments)
        q, k = self.attention.q_proj(hidden_states), self.attention.k_proj(hidden_states)
        of_query, of_key = self.convolutions
        q = of_query(F.pad(q.mT, (TAPS - 1, 0))).mT
        k = of_key(F.pad(k.mT[..., :-1], (TAPS, 0))).mT
        q, k, v = (self._by_head(x) for x in (q, k, self.attention.v_proj(hidden_states)))
        q, k = self.scale * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)  # (B, T, H, d)
        found = self.norm(found) * self.gate(hidden_states).sigmoid()[..., None]
        return output + self.attention.o_proj(found.flatten(2)), weights

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def gated_delta_net(config: Config, inner: int) -> nn.Module:
    """Return Gated DeltaNet (Yang et al., 2025), of RMKV's width and depth: the linear layers of Qwen3.5 alone.

    As in the paper values are twice as wide as keys. In PyTorch's own operations, so that it runs without a GPU.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.set_flush_denormal(True)  # its decays reach denormal numbers, with which a CPU takes twice the time
    model = config.model
    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            **_shape(config),
            intermediate_size=inner,
            layer_types=["linear_attention"] * model.num_hidden_layers,
            linear_num_key_heads=model.num_attention_heads,
            linear_num_value_heads=model.num_attention_heads,
            linear_key_head_dim=model.head_width,
            linear_value_head_dim=2 * model.head_width,
        )
    )


def _shape(config: Config) -> dict[str, int | bool]:
    model = config.model
    shape = {name: getattr(model, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return shape | {"tie_word_embeddings": True, "use_cache": False}


def train(model: nn.Module, config: Config, data: Path, checkpoint: Path | None = None) -> Iterator[int]:
    """Train a model on rows of the config's longest length, and yield the number of tokens after each step.

    Each piece of a document within a row is read alone, from its start. With the path of a `checkpoint`, training
    resumes from it if it exists, and writes it every `checkpoint_every` steps.
    """
    train = config.train
    torch.manual_seed(train.seed)
    documents = Documents.open(data, "train")
    lanes = Lanes(Prepared(documents, train.seed), train.batch_size, documents.eod)
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in tables]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=train.learning_rate, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=train.learning_rate, betas=(train.beta1, train.beta2), weight_decay=0.0, fused=True
        ),
    ]
    parts = {"model": model, "lanes": lanes, "matrices": optimizers[0], "others": optimizers[1]}
    tokens = step = 0
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint)
        tokens, step = saved["tokens"], saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    model.train()
    while tokens < train.tokens:
        rows = lanes.next(train.segments_max * config.model.segment_length)
        tokens += rows.input_ids.size
        rows_loss(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, min(1.0, tokens / train.tokens))
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        yield tokens
        if checkpoint and step % train.checkpoint_every == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            with atomic_file(checkpoint) as aside:
                torch.save({"tokens": tokens, "step": step} | states, aside)


def rows_loss(model: nn.Module, rows: Rows) -> Tensor:
    """Return the mean loss in nats of the targets that count."""
    groups: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for row, ids in enumerate(rows.document_ids):
        for start, stop in _stretches(ids):
            if (rows.targets[row, start:stop] != IGNORED).any():
                groups[(int(stop) - int(start) - 1).bit_length()].append((row, start, stop))
    total = torch.zeros(())
    for pieces in groups.values():  # pieces of similar length, so that padding at most doubles them
        longest = max(stop - start for _, start, stop in pieces)
        ids, targets = np.zeros((len(pieces), longest), np.int64), np.full((len(pieces), longest), IGNORED)
        for i, (row, start, stop) in enumerate(pieces):
            ids[i, : stop - start] = rows.input_ids[row, start:stop]
            targets[i, : stop - start] = rows.targets[row, start:stop]
        logits = model(input_ids=torch.from_numpy(ids)).logits
        total = total + F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="sum")
    return total / int((rows.targets != IGNORED).sum())


def _stretches(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    yield from pairwise(edges)


def logits(model: nn.Module, input_ids: Tensor, window: int) -> Tensor:
    """Return the logits (T, V) of a text (T,), read from its start.

    Attention sees what it has been trained to see: `window` tokens at most, and half of them at least.
    """
    if isinstance(model, RMKV):
        return model(input_ids[None])[0][0]
    if "Llama" not in type(model).__name__:
        return model(input_ids=input_ids[None]).logits[0]
    found = [model(input_ids=input_ids[None, :window]).logits[0]]
    half = window // 2
    for start in range(window, len(input_ids), half):
        seen = input_ids[None, start - half : start + half]
        found.append(model(input_ids=seen).logits[0, half:])
    return torch.cat(found)
