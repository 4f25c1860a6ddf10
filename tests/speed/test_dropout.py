"""Masks that are drawn again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus.speed.dropout import Mask


@settings(max_examples=40, deadline=None)
@given(
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99), shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_a_mask_is_that_of_torch_and_the_same_again(p, seed, shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    torch.manual_seed(seed)
    expected = F.dropout(x, p)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    mask = Mask(p, x.shape, dtype, x.device)
    assert torch.equal(mask.draw(), expected)
    assert torch.equal(torch.get_rng_state(), after)
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(mask.again(), expected)
    assert torch.equal(torch.get_rng_state(), state)
