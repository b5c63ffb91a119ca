"""The state: everything that the model carries through a text, of fixed size however long the text is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.model.block import LayerState
from rmkv_cli.model.state_file import find_fault
from rmkv_cli.model.tensors import open_tensors, save_tensors

STACKED = ("memory", "cell", "store", "recent")  # one tensor for all layers that have one, (L, B, ...)
NARROW = ("recent", "keys", "values", "stream")  # in the type that the model computes in


def contiguous_copy(x: Tensor) -> Tensor:
    """Return a copy with its own memory and contiguous strides, which compiled code relies on."""
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class State:
    """Everything that an RMKV carries. Reading returns a new state and leaves the old one unchanged, as a branch.

    Shapes: L layers (1 in `memory` and `cell` if the memory is carried through layers), the first K with a store, batch
    B, m slots, H query heads and G key-value heads of width d, p features of the store's keys, n remembered tokens (the
    look-back, then the open segment), t tokens in the open segment.
    """

    memory: Tensor
    """Slots, written by earlier segments only, (L, B, m, D)."""
    cell: Tensor | None
    """The LSTM's cell state, (L, B, m, D)."""
    store: Tensor | None
    """Associative stores, written by all tokens so far, (K, B, G, p, d)."""
    recent: Tensor | None
    """Queries and keys of the last four tokens, for the stores' short convolution, (K, B, H + G, 4, d)."""
    keys: tuple[Tensor, ...]
    """Attention keys of remembered tokens, (B, G, n, d) per layer."""
    values: tuple[Tensor, ...]
    """Attention values of remembered tokens, (B, G, n, d) per layer."""
    stream: tuple[Tensor, ...]
    """Input of the pooling at the segment's end, (B, t, D) per layer."""
    documents: Tensor
    """Document of each remembered token, (B, n); -1: none."""
    owner: Tensor
    """Document that wrote the slots, (B,); other documents see the learned initial slots."""
    store_owner: Tensor
    """Document that wrote the store, (B,); other documents read the learned initial store."""
    document: Tensor
    """Document of the last token, (B,); -1: none yet."""
    position: Tensor
    """Number of that document's tokens read so far, (B,)."""
    offset: Tensor
    """Number of these in the open segment, (B,)."""
    filled: int
    """Number of tokens in the open segment; 0 at a segment's boundary."""

    def layers(self) -> list[LayerState]:
        """Return each layer's part; a memory that is carried through layers is in every part."""

        def each(stacked: Tensor | None) -> list[Tensor | None]:
            parts: list[Tensor | None] = [] if stacked is None else list(stacked.unbind())
            return parts + [None] * (len(self.keys) - len(parts))

        memories, cells = each(self.memory), each(self.cell)
        if len(self.memory) == 1:
            memories, cells = memories[:1] * len(self.keys), cells[:1] * len(self.keys)
        parts = zip(
            memories, cells, each(self.store), each(self.recent), self.keys, self.values, self.stream, strict=True
        )
        return [LayerState(*part) for part in parts]

    @classmethod
    def from_layers(cls, layers: list[LayerState], memories: int, **others: Any) -> "State":
        """Return the state with these layers, the first `memories` of which provide the memory, and `others`."""

        def stacked(parts: list[Tensor | None]) -> Tensor | None:
            present = [x for x in parts if x is not None]
            return torch.stack(present) if present else None

        return cls(
            memory=torch.stack([layer.memory for layer in layers[:memories]]),
            cell=stacked([layer.cell for layer in layers[:memories]]),
            store=stacked([layer.store for layer in layers]),
            recent=stacked([layer.recent for layer in layers]),
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            stream=tuple(layer.stream for layer in layers),
            **others,
        )

    def map(self, f: Callable[[Tensor, int], Tensor]) -> "State":
        """Return the state with each tensor replaced by f(tensor, its batch dimension)."""

        def each(value: Any, batch: int) -> Any:
            if isinstance(value, tuple):
                return tuple(f(x, batch) for x in value)
            return f(value, batch) if isinstance(value, Tensor) else value

        return State(**{x.name: each(getattr(self, x.name), int(x.name in STACKED)) for x in fields(self)})

    def flat(self) -> list[Tensor]:
        """Return all tensors in the order that `with_tensors` expects."""
        values = (getattr(self, field.name) for field in fields(self))
        return [
            x for value in values for x in (value if isinstance(value, tuple) else [value]) if isinstance(x, Tensor)
        ]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "State":
        """Return the state with its tensors replaced by these, in the order of `flat`."""
        replacements = iter(tensors)
        return self.map(lambda *_: next(replacements))

    def to_precision(self, dtype: torch.dtype) -> "State":
        """Return the state in the types of a model that computes in `dtype`; slots and stores are float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        types = dict.fromkeys(NARROW, dtype) | dict.fromkeys(("memory", "cell", "store"), wide)
        tensors = {name: x.to(types.get(name.partition(".")[0], x.dtype)) for name, x in self.tensors().items()}
        return State.from_tensors(tensors)

    def detach(self) -> "State":
        """Return the state detached from the autograd graph."""
        return self.map(lambda x, _: x.detach())

    def rows(self, start: int, count: int) -> "State":
        """Return the state of `count` rows of the batch, from row `start`."""
        return self.map(lambda x, batch: x.narrow(batch, start, count))

    def select(self, rows: Tensor) -> "State":
        """Return the state of the given rows of the batch, (n,), in that order; rows can repeat."""
        return self.map(lambda x, batch: x.index_select(batch, rows))

    @classmethod
    def join(cls, states: "list[State]") -> "State":
        """Return one state for the rows of all `states`, which must have equally many tokens in their open segments."""
        parts = [state.tensors() for state in states]
        joined = {
            name: torch.cat([part[name] for part in parts], dim=cls.batch_dimension(name))
            for name in parts[0]
            if name != "filled"
        }
        return cls.from_tensors(joined | {"filled": parts[0]["filled"]})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as `from_tensors` expects them."""
        named: dict[str, Tensor] = {"filled": torch.tensor(self.filled)}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                named[field.name] = value
            elif isinstance(value, tuple):
                named |= {f"{field.name}.{layer}": x for layer, x in enumerate(value)}
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "State":
        """Return the state with these tensors, the inverse of `tensors`; raise KeyError if one is missing.

        States of earlier versions that end inside a segment have keys and values of slots before those of tokens, which
        are dropped.
        """
        n, slots = named["documents"].shape[1], 2 * named["memory"].shape[2]

        def layers(name: str) -> tuple[Tensor, ...]:
            parts = (named[f"{name}.{layer}"] for layer in range(sum(x.startswith(f"{name}.") for x in named)))
            return tuple(x[:, :, slots:] if name != "stream" and x.shape[2] == slots + n else x for x in parts)

        return cls(
            memory=named["memory"],
            cell=named.get("cell"),
            store=named.get("store"),
            recent=named.get("recent"),
            keys=layers("keys"),
            values=layers("values"),
            stream=layers("stream"),
            documents=named["documents"],
            owner=named["owner"],
            store_owner=named["store_owner"],
            document=named["document"],
            position=named["position"],
            offset=named["offset"],
            filled=int(named["filled"]),
        )

    @staticmethod
    def batch_dimension(name: str) -> int:
        """Return the batch dimension of the tensor of this name in `tensors`."""
        return int(name.split(".")[0] in STACKED)

    def size(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(x.nbytes for x in self.tensors().values())

    def save(self, path: Path) -> None:
        """Write the state atomically to a safetensors file with a checksum."""
        copies = {name: contiguous_copy(x) for name, x in self.tensors().items()}
        save_tensors(copies, path, {"format": "pt"})

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "State":
        """Return the state in a file, of whatever model (`load_notes` checks it against a model).

        Raises:
            UserError: the file is absent or damaged, or does not contain a state that a text can produce.
        """
        with open_tensors(path, "not a saved state") as file:
            try:
                state = cls.from_tensors(file.tensors()).map(lambda x, _: x.to(device))
                wrong = find_fault(state)
            except (KeyError, IndexError, RuntimeError) as error:  # a tensor is missing or has another shape
                raise UserError(f"{path}: not a saved state: {error}") from None
        if wrong:
            raise UserError(f"{path}: not a saved state: {wrong}")
        return state
