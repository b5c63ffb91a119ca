"""Store named memories: readings that later requests continue."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rmkv_cli.generation import Prompt
from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import state_bytes
from rmkv_cli.serving.errors import ApiError
from rmkv_cli.serving.limits import Limits


@dataclass(frozen=True)
class _Memory:
    model: str
    prompt: Prompt
    tokens: int
    created: int
    updated: int


@dataclass
class Keep:
    """A function that stores a reading as a memory, or with None changes nothing; called once, from any thread."""

    model: str
    """Name of the model that made the reading."""
    put: Callable[[Prompt | None], dict[str, Any] | None]
    figures: dict[str, Any] | None = None
    """Figures of the memory as it was stored here, even if it has changed since."""

    def __call__(self, prompt: Prompt | None) -> None:
        """Store the reading."""
        self.figures = self.put(prompt)


class Memories:
    """All memories of a server. Readings are immutable, so any number of texts can continue one at the same time.

    Only one request at a time may write to a memory; others that try to write or delete it are refused.
    """

    def __init__(self, model: RMKV, limits: Limits) -> None:
        """Create an empty collection with room for as many memories as `limits` allow, each at its largest size."""
        config, narrow = model.config, model.dtype.itemsize
        beside = 5 * config.vocab_size  # logits, tokens seen
        self.bytes_at_most = state_bytes(config, max(4, narrow), narrow)[1] + beside
        """Largest size of one memory, however long its text."""
        self.room = min(limits.max_memories, limits.max_memory_bytes // self.bytes_at_most)
        """Largest number of memories."""
        self._lock = threading.Lock()
        self._memories: dict[str, _Memory] = {}
        self._written: set[str] = set()  # names that a request is writing; a new one is not yet in `_memories`

    def __len__(self) -> int:
        """Return the number of memories."""
        return len(self._memories)

    def create(self, name: str, model: str) -> Keep:
        """Reserve a name; return the function that stores the reading of this model under it.

        Raises:
            ApiError: 409: the name is taken; 507: there is no room.
        """
        with self._lock:
            if name in self._memories or name in self._written:
                raise ApiError(
                    409, f"memory '{name}' exists; POST /v1/memories/{name} reads more text into it", "memory_exists"
                )
            if len(self._memories.keys() | self._written) >= self.room:
                message = f"there is room for {self.room} memories of {self.bytes_at_most:,} bytes; delete one first"
                raise ApiError(507, message, "no_room_for_memory")
            self._written.add(name)
        return Keep(model, lambda prompt: self._put(name, model, prompt))

    def get(self, name: str, model: str | None = None) -> Prompt:
        """Return a memory's reading; raise `ApiError` 404 if there is none, 400 if another model read it."""
        return self._get(name, model).prompt

    def hold(self, name: str, model: str | None = None) -> tuple[Prompt, Keep]:
        """Return a memory's reading, and the function that replaces it with a reading that continues it.

        Raises:
            ApiError: 404: no such memory; 400: another model read it; 409: another request is writing it.
        """
        with self._lock:
            memory = self._get(name, model)
            self._require_free(name)
            self._written.add(name)
        return memory.prompt, Keep(memory.model, lambda prompt: self._put(name, memory.model, prompt))

    def delete(self, name: str) -> None:
        """Delete a memory; errors as in `hold`."""
        with self._lock:
            self._get(name)
            self._require_free(name)
            del self._memories[name]

    def describe(self, name: str) -> dict[str, Any]:
        """Return a memory's figures; raise `ApiError` 404 if there is none."""
        return self._figures(name, self._get(name))

    def list(self) -> list[dict[str, Any]]:
        """Return the figures of all memories, most recently updated first."""
        with self._lock:
            names = sorted(self._memories, key=lambda name: self._memories[name].updated, reverse=True)
            return [self.describe(name) for name in names]

    def _figures(self, name: str, memory: _Memory) -> dict[str, Any]:
        prompt = memory.prompt
        return {
            "object": "memory",
            "name": name,
            "model": memory.model,
            "tokens": memory.tokens,
            "bytes": prompt.state.size() + prompt.logits.nbytes + prompt.seen.nbytes,
            "bytes_at_most": self.bytes_at_most,
            "created": memory.created,
            "updated": memory.updated,
        }

    def _get(self, name: str, model: str | None = None) -> _Memory:
        memory = self._memories.get(name)
        if memory is None:
            raise ApiError(404, f"there is no memory '{name}'; POST /v1/memories makes one", "memory_not_found")
        if model not in (None, memory.model):
            message = (
                f"memory '{name}' was read by the model '{memory.model}'; use that model, or have '{model}' read it"
            )
            raise ApiError(400, message, "invalid_value", "memory")
        return memory

    def _require_free(self, name: str) -> None:
        if name in self._written:
            raise ApiError(409, f"another request is writing the memory '{name}'; try again later", "memory_busy")

    def _put(self, name: str, model: str, prompt: Prompt | None) -> dict[str, Any] | None:
        memory = None
        try:
            if prompt is not None:
                # Copy: a state's tensors may be views of larger ones.
                own = replace(
                    prompt,
                    logits=prompt.logits.clone(),
                    state=prompt.state.map(lambda x, _: x.clone()),
                )
                memory = _Memory(model, own, int(prompt.state.position), int(time.time()), int(time.time()))
        finally:  # release the name even on failure
            with self._lock:
                self._written.remove(name)
                if memory is not None:
                    before = self._memories.get(name, memory)
                    self._memories[name] = memory = replace(memory, created=before.created)
        return self._figures(name, memory) if memory else None
