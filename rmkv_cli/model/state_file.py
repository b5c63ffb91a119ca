"""Checks of a loaded state: the model's shapes, and values that a text can produce."""

from typing import TYPE_CHECKING

from rmkv_cli.model.tensors import Layout, layout

if TYPE_CHECKING:
    from rmkv_cli.model.state import State


def expected_layout(fresh: "State", filled: int, slots: int = 0) -> Layout:
    """Return the type and shape of each tensor of a state with `filled` tokens in its open segment.

    Args:
        fresh: the model's state before any token.
        filled: the tokens in the open segment, fewer than a segment has.
        slots: the slots whose keys and values precede the tokens' inside a segment, in files of earlier versions.
    """
    growing = {"documents": (1, filled), "stream": (1, filled)}
    growing |= dict.fromkeys(("keys", "values"), (2, filled + slots * (filled > 0)))
    expected = {}
    for name, (dtype, shape) in layout(fresh.tensors()).items():
        dimension, more = growing.get(name.partition(".")[0], (0, 0))
        expected[name] = dtype, (*shape[:dimension], shape[dimension] + more, *shape[dimension + 1 :]) if shape else ()
    return expected


def find_fault(state: "State") -> str | None:
    """Return the first fault in a state, a number that is not finite or an impossible counter, or None."""
    for name, x in state.tensors().items():
        if x.is_floating_point() and not x.isfinite().all():
            return f"'{name}' has numbers that are not finite"
    if (state.document < -1).any() or (state.position < 0).any():
        return "'document' or 'position' is below its first value"
    last = state.document[:, None]
    for name, x in (("owner", state.owner[:, None]), ("store_owner", state.store_owner[:, None])):
        if ((x < -1) | (x > last)).any():
            return f"'{name}' is not a document of the text"
    if ((state.documents < -1) | (state.documents > last)).any():
        return "'documents' are not documents of the text"
    if ((state.offset < 0) | (state.offset > state.position) | (state.offset > state.filled)).any():
        return "'offset' is outside the open segment"
    return None
