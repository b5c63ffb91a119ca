"""Check that work never waits for the device, for tests."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim")


class NoSync(TorchDispatchMode):
    """Refuses operations for whose result the host has to wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in SYNCS, func
        if func._schema.name == "aten::index":  # by booleans it counts them first
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync(device):
    with NoSync():
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
