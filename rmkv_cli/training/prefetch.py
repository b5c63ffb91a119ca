"""Prefetching: a thread reads the next step's rows while the current step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmkv_cli.data.lanes import Lanes, Rows


class PrefetchedLanes:
    """Lanes with one step of prefetched rows. A saved position does not include prefetched rows.

    Args:
        lanes: the lanes.
        pinned: whether to put rows into pinned memory, for a GPU.
    """

    def __init__(self, lanes: Lanes, pinned: bool) -> None:
        self._lanes, self._pinned = lanes, pinned
        self._prefetched: Future[Tensor] | None = None
        self._position: Callable[[], dict[str, Any]] | None = None

    def next(self, length: int, then: int | None = None) -> Tensor:
        """Return the next rows as from `pack_rows`, (3, lanes, length), and start to prefetch the rows after them.

        Args:
            length: tokens per row; must equal the previous call's `then` unless that was None.
            then: the next call's length; None: do not prefetch.

        Raises:
            EndOfData, UserError: see `Lanes.next`.
        """
        rows = self._read(length) if self._prefetched is None else self._prefetched.result()
        assert rows.shape[2] == length
        self._prefetched = self._position = None
        if then is not None:
            self._position = self._lanes.bookmark()
            thread = ThreadPoolExecutor(1)
            self._prefetched = thread.submit(self._read, then)
            thread.shutdown(wait=False)  # the thread ends after this read
        return rows

    def _read(self, length: int) -> Tensor:
        rows = pack_rows(self._lanes.next(length))
        return rows.pin_memory() if self._pinned else rows

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last returned rows, for `load_state_dict`."""
        return self._position() if self._position else self._lanes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`; call this before `next`. See `Lanes.load_state_dict`."""
        self._lanes.load_state_dict(state)


def pack_rows(rows: Rows) -> Tensor:
    """Return inputs, targets and documents of rows as one int32 tensor, (3, lanes, length), of half the size."""
    return torch.from_numpy(np.stack([*vars(rows).values()], dtype=np.int32, casting="same_kind"))


def unpack_rows(rows: Tensor) -> Rows:
    """Return the rows that `pack_rows` packed."""
    return Rows(*rows.long().numpy())
