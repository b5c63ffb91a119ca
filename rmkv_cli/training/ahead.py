"""Rows for training, read by a thread while the step before is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmkv_cli.data.lanes import Lanes, Rows


class Ahead:
    """Lanes that are read one step ahead. What was read ahead counts as unread: a checkpoint's place is before it.

    Args:
        lanes: what is read.
        pinned: whether rows go to a GPU.
    """

    def __init__(self, lanes: Lanes, pinned: bool) -> None:
        self._lanes, self._pinned = lanes, pinned
        self._coming: Future[Tensor] | None = None
        self._place: Callable[[], dict[str, Any]] | None = None

    def next(self, length: int, then: int | None = None) -> Tensor:
        """Return the next rows, as `packed`, and begin to read those after them.

        Args:
            length: tokens of each row. It must be the call before's `then`, if that was not None.
            then: length of the next call's rows. None: do not read ahead.

        Raises:
            EndOfData, UserError: see `Lanes.next`.
        """
        rows = self._read(length) if self._coming is None else self._coming.result()
        assert rows.shape[2] == length
        self._coming = self._place = None
        if then is not None:
            self._place = self._lanes.bookmark()
            thread = ThreadPoolExecutor(1)
            self._coming = thread.submit(self._read, then)
            thread.shutdown(wait=False)  # it ends when the rows are read
        return rows

    def _read(self, length: int) -> Tensor:
        rows = packed(self._lanes.next(length))
        return rows.pin_memory() if self._pinned else rows

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on behind the rows that were returned."""
        return self._place() if self._place else self._lanes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, before any rows are read; see `Lanes.load_state_dict`."""
        self._lanes.load_state_dict(state)


def packed(rows: Rows) -> Tensor:
    """Return rows as one int32 tensor (3, lanes, length), half the size: the inputs, the targets and the documents."""
    return torch.from_numpy(np.stack([*vars(rows).values()], dtype=np.int32, casting="same_kind"))


def unpacked(rows: Tensor) -> Rows:
    """Return what was packed."""
    return Rows(*rows.long().numpy())
