"""The model: attention over memory and tokens, pooling, recurrent cells, and the state that they carry."""

from rmkv_cli.model.attention import AttentionPooling, QKVBlock
from rmkv_cli.model.block import RMKVBlock
from rmkv_cli.model.cells import RecurrentMemoryCell
from rmkv_cli.model.model import RMKV, inference, reset_memory, reset_recent, swap_memory
from rmkv_cli.model.pretrained import find_model
from rmkv_cli.model.state import State
from rmkv_cli.model.store import AssociativeStore

__all__ = [
    "RMKV",
    "AssociativeStore",
    "AttentionPooling",
    "QKVBlock",
    "RMKVBlock",
    "RecurrentMemoryCell",
    "State",
    "find_model",
    "inference",
    "reset_memory",
    "reset_recent",
    "swap_memory",
]
