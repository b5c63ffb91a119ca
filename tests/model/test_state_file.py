"""A state that its model cannot produce from a text is refused."""

from dataclasses import fields, replace

import pytest
import torch
from small_model import EVERY, PUBLISHED, make_model

from rmkv_cli.model.state_file import expected_layout, find_fault
from rmkv_cli.model.tensors import difference, layout


@pytest.mark.parametrize(("memory", "position", "lookback"), EVERY, ids=str)
def test_every_state_of_every_text_has_the_expected_layout_and_no_fault(memory, position, lookback):
    model = make_model(position=position, lookback=lookback, memory=memory)
    fresh = model.initial_state(2)
    assert find_fault(fresh) is None
    for length in range(1, 12):
        state = model(torch.ones(2, length, dtype=torch.int64))[1]
        assert difference(layout(state.tensors()), expected_layout(fresh, state.filled)) is None
        assert find_fault(state) is None
        documents = torch.arange(length).div(3, rounding_mode="floor").expand(2, -1)
        assert find_fault(model(torch.ones(2, length, dtype=torch.int64), document_ids=documents)[1]) is None


def test_the_published_wiring_too():
    model = make_model(memory=PUBLISHED)
    state = model(torch.ones(2, 10, dtype=torch.int64))[1]
    assert difference(layout(state.tensors()), expected_layout(model.initial_state(2), 0)) is None


CHANGES = {
    "memory": torch.nan,
    "store": torch.inf,
    "owner": 1,
    "store_owner": -2,
    "documents": 7,
    "document": -2,
    "position": -1,
    "offset": 4,
}


@pytest.mark.parametrize("name", CHANGES)
def test_numbers_that_no_text_can_produce_are_a_fault(name):
    state = make_model()(torch.ones(1, 8, dtype=torch.int64))[1]
    assert name in {field.name for field in fields(state)}
    assert f"'{name}'" in find_fault(replace(state, **{name: torch.full_like(getattr(state, name), CHANGES[name])}))
