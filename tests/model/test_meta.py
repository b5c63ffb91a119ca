"""Training and decoding never wait for the device: they run on the meta device, whose tensors have no values."""

import pytest
import torch
from no_sync import no_sync
from small_model import IMPORTED, make_model

from rmkv_cli.generation import Decoder
from rmkv_cli.training.loss import row_loss

SHAPES = [*({"memory": memory} for memory in [{}, {"cell": "lstm"}, {"slots": 0}, {"store": 0}]), *IMPORTED]


@pytest.mark.parametrize(
    ("replay", "border"),
    [(True, 0), (False, 7), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, 7), (False, 0)])],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_s_loss_and_gradients(shape, replay, border):
    model = make_model(**shape).to("meta").requires_grad_(True)
    ids = torch.zeros(2, 15, dtype=torch.int64, device="meta")  # a first, an inner and a last segment
    documents = torch.tensor([0] * border + [1] * (15 - border)).expand(2, -1)  # on the CPU, where rows come from
    with no_sync("meta"):
        row_loss(model, ids, ids, documents, model.initial_state(2), replay=replay)[0].backward()
    assert model.embedding.weight.grad.is_meta


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_of_decoding(shape):
    model = make_model(**shape).to("meta")
    decoder = Decoder(model, 3, compiled=True)
    with no_sync("meta"):
        assert decoder._read(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3, 12)
