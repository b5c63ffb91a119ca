"""Attention of one token per text, which is computed differently, equals that of several."""

import pytest
import torch

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.attention import QKVBlock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
def test_a_single_token_attends_as_within_a_batch_of_tokens(heads, shared, dtype):
    torch.manual_seed(0)
    shape = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": shared}
    attention = QKVBlock(ModelConfig(vocab_size=8, **shape))
    q, k, v = (
        torch.randn(3, count, length, 8, dtype=dtype) for count, length in ((heads, 2), (shared, 7), (shared, 7))
    )
    mask = torch.zeros(3, 1, 2, 7, dtype=dtype).masked_fill_(torch.rand(3, 1, 2, 7) < 0.4, -torch.inf)
    mask[..., 0] = 0
    both = attention(q, k, v, mask)
    one = attention(q[:, :, 1:], k, v, mask[:, :, 1:])
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-8, 2**-7)
    torch.testing.assert_close(one, both[:, 1:], atol=atol, rtol=rtol)
