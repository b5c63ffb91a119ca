"""The state: all that the model carries through a text, fixed in size whatever the text's length."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.files import require_file
from rmkv_cli.model.pretrained import save_tensors


@dataclass(frozen=True)
class State:
    """What an RMKV carries. Reading returns a new state and leaves the old one as it was, so a state can be branched.

    Shapes: L layers (of which `memory` has one where it is carried through layers), batch B, m slots, H heads of width
    d, n tokens remembered (the look-back, then the open segment's), t tokens in the open segment.
    """

    memory: Tensor
    """(L, B, m, D), written by earlier segments only."""
    cell: Tensor | None
    """(L, B, m, D), the LSTM's cell state."""
    keys: tuple[Tensor, ...]
    """A layer: (B, H, n, d); inside a segment, the slots' and the fresh slots' keys (2m) stand before the tokens'."""
    values: tuple[Tensor, ...]
    stream: tuple[Tensor, ...]
    """A layer: (B, t, D), what the pooling will read at the segment's end."""
    documents: Tensor
    """(B, n): each remembered token's document; -1: none."""
    owner: Tensor
    """(B,): the document that wrote the memory; other documents see the fresh, learned memory."""
    document: Tensor
    """(B,): the document of the last token read; -1: none yet."""
    position: Tensor
    """(B,): tokens of that document read so far."""
    offset: Tensor
    """(B,): those of them in the open segment."""
    filled: int
    """Tokens in the open segment; 0 at a segment's boundary."""

    def map(self, f: Callable[[Tensor, int], Tensor]) -> "State":
        """Return the state with f(tensor, its batch dimension) in each tensor's place."""
        return State(
            memory=f(self.memory, 1),
            cell=None if self.cell is None else f(self.cell, 1),
            keys=tuple(f(x, 0) for x in self.keys),
            values=tuple(f(x, 0) for x in self.values),
            stream=tuple(f(x, 0) for x in self.stream),
            documents=f(self.documents, 0),
            owner=f(self.owner, 0),
            document=f(self.document, 0),
            position=f(self.position, 0),
            offset=f(self.offset, 0),
            filled=self.filled,
        )

    def detach(self) -> "State":
        """Return the state cut off from the graph that computed it."""
        return self.map(lambda x, _: x.detach())

    def rows(self, start: int, count: int) -> "State":
        """Return the state of `count` rows of the batch from row `start`."""
        return self.map(lambda x, batch: x.narrow(batch, start, count))

    @classmethod
    def join(cls, states: "list[State]") -> "State":
        """Return one state for the rows of all `states`, which must stand at the same place in their segments."""
        parts = [state.tensors() for state in states]
        joined = {
            name: torch.cat([part[name] for part in parts], dim=1 if name in ("memory", "cell") else 0)
            for name in parts[0]
            if name != "filled"
        }
        return cls.from_tensors(joined | {"filled": parts[0]["filled"]})

    def repeat(self, n: int) -> "State":
        """Return a state of batch B n: each row n times."""
        return self.map(lambda x, batch: x.repeat_interleave(n, dim=batch))

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
        """Return the state that `tensors` took apart; raises KeyError if one is missing."""
        layers = sum(name.startswith("keys.") for name in named)
        return cls(
            memory=named["memory"],
            cell=named.get("cell"),
            keys=tuple(named[f"keys.{layer}"] for layer in range(layers)),
            values=tuple(named[f"values.{layer}"] for layer in range(layers)),
            stream=tuple(named[f"stream.{layer}"] for layer in range(layers)),
            documents=named["documents"],
            owner=named["owner"],
            document=named["document"],
            position=named["position"],
            offset=named["offset"],
            filled=int(named["filled"]),
        )

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors().values())

    def save(self, path: Path) -> None:
        """Write the state to a safetensors file, whole."""
        save_tensors({name: x.clone(memory_format=torch.contiguous_format) for name, x in self.tensors().items()}, path)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "State":
        """Read a state; raise `UserError` if the file is absent or is not a state."""
        require_file(path)
        try:
            with safe_open(path, framework="pt", device=device) as file:
                return cls.from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path}: not a saved state: {error}") from None
