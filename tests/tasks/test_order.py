"""The order of a pass is that of transformers, whatever is held of it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from loraplus.tasks.data_parallel import OrderByPass


@given(st.lists(st.integers(1, 9), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 99))
def test_batches_of_like_length_come_as_transformers_lays_them_out(lengths, batch_size, seed):
    wanted = get_length_grouped_indices(lengths, batch_size, generator=torch.Generator().manual_seed(seed))
    order = OrderByPass(lengths, batch_size, lambda: seed)
    assert list(order) == wanted == list(order) and len(order) == len(wanted)
