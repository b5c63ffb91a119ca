"""RMKV in transformers: a causal language model around the layers of rmkv_cli.model; copied into exported folders."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from rmkv_cli.huggingface.configuration_rmkv import RMKVConfig
from rmkv_cli.model.model import RMKV
from rmkv_cli.model.state import State

Group = tuple[Tensor, State]
"""Indices of batch rows (n,) at the same position in their segments, and the state of these rows."""


class RMKVCache:
    """State of a batch, of a fixed size however much was read.

    Rows with different amounts of padding are in different groups. A forward pass returns a new cache and leaves the
    old one unchanged, so several texts can continue from it.
    """

    is_compileable = False

    def __init__(self, groups: list[Group], length: int) -> None:
        self.groups, self.length = groups, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read in each row, including padding."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue from the state of row beam_idx[i]."""
        groups = []
        for rows, state in self.groups:
            new, at = (beam_idx[:, None] == rows).nonzero(as_tuple=True)
            if len(new):
                groups.append((new, state.select(at)))
        self.groups = groups


class RMKVForCausalLM(PreTrainedModel, GenerationMixin):
    """RMKV with the interface of transformers.

    A row is read as one document; masked tokens are skipped as if they were absent.
    """

    config_class = RMKVConfig
    _is_stateful = True
    # Patterns for the parameters that `is_narrow` rejects. In transformers this is a list of the instance.
    _keep_in_fp32_modules_strict = [r"\.memory$", r"\.cell\.", r"\.store\.", r"\.router\.", r"\.balance$"]  # noqa: RUF012

    def __init__(self, config: RMKVConfig) -> None:
        super().__init__(config)
        self.model = RMKV(_shape(config))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token stream; slots, cells and stores may be wider."""
        return self.model.dtype

    def _init_weights(self, module: nn.Module) -> None:
        """Leave all weights unchanged, because the layers initialize themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the tokens' embeddings."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None if it is tied to the embeddings."""
        return self.model.unembedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RMKVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read tokens; return their logits and the state after them.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), or (B, all tokens so far) with the last T used; 0 for padding, whose logits are 0.
            past_key_values: state of the text before; without it, a document begins.
            labels: (B, T); if given, the loss is returned. It ignores -100, padding, and tokens after padding.
            use_cache: if False, the state after the tokens is not returned.
            logits_to_keep: number of last tokens to return logits of; 0 for all.
            kwargs: `num_items_in_batch`, for the loss. Given positions are ignored in favour of the state's.
        """
        B, T = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if past_key_values is None:
            past_key_values = RMKVCache([(torch.arange(B, device=input_ids.device), self.model.initial_state(B))], 0)
        mask = attention_mask[:, -T:].bool()
        hidden, groups = self._read(input_ids, mask, past_key_values.groups)
        logits = self.model.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            labels = labels.masked_fill(~mask, -100)
            labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        cache: Any = None if use_cache is False else RMKVCache(groups, past_key_values.length + T)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _read(self, input_ids: Tensor, mask: Tensor, before: list[Group]) -> tuple[Tensor, list[Group]]:
        """Return the hidden states (B, T, D) and the groups after them; rows with equal masks are read together."""
        hidden = self.model.norm.weight.new_zeros(*input_ids.shape, self.config.hidden_size)
        after = []
        for rows, state in before:
            patterns, which = mask[rows].unique(dim=0, return_inverse=True)
            for i, pattern in enumerate(patterns):
                at, tokens = (which == i).nonzero()[:, 0], pattern.nonzero()[:, 0]
                part, carried = rows[at], state.select(at) if len(patterns) > 1 else state
                if len(tokens):
                    read, carried = self.model.hidden(input_ids[part[:, None], tokens], carried)
                    hidden[part[:, None], tokens] = read.to(hidden.dtype)
                after.append((part, carried))
        return hidden, after


def _shape(config: RMKVConfig) -> Any:
    """Return an object with the attributes of `rmkv_cli.config.ModelConfig`."""
    keys = config.to_dict()
    memory = SimpleNamespace(**keys["memory"])
    memory.updated = memory.slots > 0 and memory.update != "none"
    head_width = config.head_size or config.hidden_size // config.num_attention_heads
    derived = {
        "memory": memory,
        "rope": SimpleNamespace(**keys["rope"]),
        "head_width": head_width,
        "store_key_width": head_width * (2 * memory.store_features or 1),
        "key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "expert_width": config.expert_size or config.intermediate_size,
        "stores": min(memory.store, config.num_hidden_layers),
    }
    return SimpleNamespace(**keys | derived)
