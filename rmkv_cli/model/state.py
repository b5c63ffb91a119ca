"""The state: all that the model carries through a text, fixed in size whatever the text's length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.model.block import LayerState
from rmkv_cli.model.state_file import fault
from rmkv_cli.model.tensors import open_tensors, save_tensors

STACKED = ("memory", "cell", "store", "recent")  # one tensor for all layers that have it, (L, B, ...)
NARROW = ("recent", "keys", "values", "stream")  # of the type that the model computes in


def contiguous_copy(x: Tensor) -> Tensor:
    """Return a copy that holds on to nothing else, and whose strides follow from its shape, as compiled code asks."""
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class State:
    """What an RMKV carries. Reading returns a new state and leaves the old one as it was, so a state can be branched.

    Shapes: L layers (of which `memory` has one where it is carried through layers), the first K with a store, batch B,
    m slots, H query heads and G heads of keys and values, of width d, n tokens remembered (the look-back, then the open
    segment's), t tokens in the open segment.
    """

    memory: Tensor
    """(L, B, m, D), the slots, written by earlier segments only."""
    cell: Tensor | None
    """(L, B, m, D), the LSTM's cell state."""
    store: Tensor | None
    """(K, B, G, d, d): associative stores, written by all tokens so far."""
    recent: Tensor | None
    """(K, B, H + G, 4, d), queries and keys of the last tokens read, for the store's short convolution."""
    keys: tuple[Tensor, ...]
    """A layer: (B, G, n, d)."""
    values: tuple[Tensor, ...]
    stream: tuple[Tensor, ...]
    """A layer: (B, t, D), what the pooling will read at the segment's end."""
    documents: Tensor
    """(B, n): each remembered token's document; -1: none."""
    owner: Tensor
    """(B,): the document that wrote the slots; other documents see the fresh, learned ones."""
    store_owner: Tensor
    """(B,): the document that wrote the store; other documents read the learned start."""
    document: Tensor
    """(B,): the document of the last token read; -1: none yet."""
    position: Tensor
    """(B,): tokens of that document read so far."""
    offset: Tensor
    """(B,): those of them in the open segment."""
    filled: int
    """Tokens in the open segment; 0 at a segment's boundary."""

    def layers(self) -> list[LayerState]:
        """Return each layer's part; a memory that goes through the layers stands in all of them."""

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
    def of_layers(cls, layers: list[LayerState], memories: int, **rest: Any) -> "State":
        """Return the state of these layers, the first `memories` of which tell the memory, and the `rest` of fields."""

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
            **rest,
        )

    def map(self, f: Callable[[Tensor, int], Tensor]) -> "State":
        """Return the state with f(tensor, its batch dimension) in each tensor's place."""

        def each(value: Any, batch: int) -> Any:
            if isinstance(value, tuple):
                return tuple(f(x, batch) for x in value)
            return f(value, batch) if isinstance(value, Tensor) else value

        return State(**{x.name: each(getattr(self, x.name), int(x.name in STACKED)) for x in fields(self)})

    def flat(self) -> list[Tensor]:
        """Return all tensors, as `replaced` takes them."""
        values = (getattr(self, field.name) for field in fields(self))
        return [
            x for value in values for x in (value if isinstance(value, tuple) else [value]) if isinstance(x, Tensor)
        ]

    def replaced(self, tensors: Sequence[Tensor]) -> "State":
        """Return the state with these in the place of those that `flat` returns."""
        rest = iter(tensors)
        return self.map(lambda *_: next(rest))

    def to_precision(self, dtype: torch.dtype) -> "State":
        """Return the state as a model that computes in `dtype` carries it: slots and stores are float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        types = dict.fromkeys(NARROW, dtype) | dict.fromkeys(("memory", "cell", "store"), wide)
        tensors = {name: x.to(types.get(name.partition(".")[0], x.dtype)) for name, x in self.tensors().items()}
        return State.from_tensors(tensors)

    def detach(self) -> "State":
        """Return the state cut off from the graph that computed it."""
        return self.map(lambda x, _: x.detach())

    def rows(self, start: int, count: int) -> "State":
        """Return the state of `count` rows of the batch from row `start`."""
        return self.map(lambda x, batch: x.narrow(batch, start, count))

    def select(self, rows: Tensor) -> "State":
        """Return the state of these rows of the batch (n,), in their order, any of them more than once."""
        return self.map(lambda x, batch: x.index_select(batch, rows))

    @classmethod
    def join(cls, states: "list[State]") -> "State":
        """Return one state for the rows of all `states`, which must stand at the same place in their segments."""
        parts = [state.tensors() for state in states]
        joined = {
            name: torch.cat([part[name] for part in parts], dim=cls.batch_dimension(name))
            for name in parts[0]
            if name != "filled"
        }
        return cls.from_tensors(joined | {"filled": parts[0]["filled"]})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as `from_tensors` takes them."""
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
        """Return the state that `tensors` took apart; raises KeyError if one is missing.

        Inside a segment, older ones have keys and values of slots and learned slots before the tokens'.
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
        """Return which dimension of the tensor that `tensors` gives this name is the batch."""
        return int(name.split(".")[0] in STACKED)

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors().values())

    def save(self, path: Path) -> None:
        """Write the state atomically to a safetensors file with a checksum."""
        copies = {name: contiguous_copy(x) for name, x in self.tensors().items()}
        save_tensors(copies, path, {"format": "pt"})

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "State":
        """Return the state in a file, of any model (`load_notes` checks it against one).

        Raises:
            UserError: the file is absent or damaged, or holds no state or one that no text can produce.
        """
        with open_tensors(path, "not a saved state") as file:
            try:
                state = cls.from_tensors(file.tensors()).map(lambda x, _: x.to(device))
                wrong = fault(state)
            except (KeyError, IndexError, RuntimeError) as error:  # a tensor is missing or has another shape
                raise UserError(f"{path}: not a saved state: {error}") from None
        if wrong:
            raise UserError(f"{path}: not a saved state: {wrong}")
        return state
