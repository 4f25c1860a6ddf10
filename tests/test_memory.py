"""Parameters that are different objects on one memory are one: one role, one rate, counted once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_roles import tiny_gpt2
from torch import nn

import loraplus
from loraplus.adapters.memory import overlapping
from loraplus.roles import trainable_parameters

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)), max_size=5))
def test_overlap_is_that_of_the_elements(views):
    memory = torch.arange(80)
    tensors = [memory.as_strided((rows, columns), (stride, 2), start) for start, rows, columns, stride in views]
    groups = overlapping(tensors)
    elements = [set(tensor.flatten().tolist()) for tensor in tensors]
    together = {(a, b) for group in groups for a in group for b in group}
    for a, one in enumerate(elements):
        for b in range(a):
            if one & elements[b]:
                assert (a, b) in together
    for group in groups:  # nobody is in a group without meeting one of it
        assert all(any(elements[a] & elements[b] for b in group if b != a) for a in group)


def test_what_has_no_memory_of_its_own_overlaps_with_nothing():
    nothing = [torch.zeros(0), torch.zeros(0), torch.zeros(3, device="meta"), torch.zeros(3, 2, device="meta").T]
    whole = torch.zeros(8)
    assert overlapping([*nothing, whole[:4], whole[4:], whole.clone()]) == []
    assert overlapping([whole, whole.view(torch.int32)[2:3]]) == [[0, 1]]


class Pair(nn.Module):
    """A layer's A and B as plain parameters, from what holds their memory."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)


def tied() -> nn.Module:
    """PEFT's own tie: the factors of the embedding are those of the output layer, transposed."""
    return get_peft_model(
        tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn", "wte", "lm_head"], ensure_weight_tying=True)
    )


def buffers() -> nn.Module:
    """B of one layer is a transposed view of another's; two layers share A; a third pair fills one flat buffer."""
    b, a, flat = torch.zeros(8, 2), torch.randn(2, 8), torch.randn(32)
    return nn.ModuleList([Pair(a, b), Pair(a.view(2, 8), b.T.T), Pair(flat[:16].view(2, 8), flat[16:].view(8, 2))])


def views_of_several_roles() -> nn.Module:
    memory = torch.randn(8, 2)
    return nn.ModuleList([Pair(torch.randn(2, 8), memory), Pair(memory.T, torch.zeros(8, 2))])


@pytest.mark.parametrize("model", [tied, buffers, views_of_several_roles])
def test_one_memory_has_one_rate_and_both_objects_are_stepped(model):
    model = model()
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=1e-3, lr_ratio=16.0)
    table = loraplus.verify(model, optimizer, 16.0, lr=1e-3)
    held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = overlapping(trainable)
    assert groups and len(held) == len(trainable)
    for group in groups:
        assert len({held[id(trainable[place])] for place in group}) == 1
    counted = sum(p.numel() for p in trainable) - sum(trainable[place].numel() for g in groups for place in g[1:])
    assert sum(row["parameters"] for row in table.groups()) == counted
    assert sum(entry.shares is not None for entry in table.entries) == sum(len(group) - 1 for group in groups)


def test_a_tied_adapter_of_embedding_and_output_layer_learns_at_the_embeddings_rate():
    model = tied()
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=1e-3, lr_ratio=16.0, lr_embedding=2e-4)
    loraplus.verify(model, optimizer, 16.0, lr_embedding=2e-4)
    rates = {entry.name: entry.lr for entry in loraplus.explain(model, optimizer).entries}
    assert {rate for name, rate in rates.items() if "wte" in name or "lm_head" in name} == {2e-4}
    assert {rate for name, rate in rates.items() if "c_attn.lora_B" in name} == {16 * 1e-3}


def test_where_the_roles_agree_they_stay_and_where_they_do_not_the_rate_is_lr():
    assert [entry.role.value for entry in trainable_parameters(buffers())] == ["lora_A", "lora_B"] * 3
    roles = [entry.role.value for entry in trainable_parameters(views_of_several_roles())]
    assert roles == ["lora_A", "other", "other", "lora_B"]


def test_a_pattern_for_one_of_the_names_goes_by_the_first():
    model = buffers()
    groups = loraplus.param_groups(model, lr=1e-3, lr_ratio=16.0, lr_overrides={r"^0\.": 0.5, r"^1\.": 0.1})
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model[1].lora_B)] == rates[id(model[0].lora_B)] == pytest.approx(8e-3)


def test_verify_notices_one_memory_at_two_rates():
    model = tied()
    names = dict(model.named_parameters())
    fast = [p for name, p in names.items() if p.requires_grad and "lora_B" in name]
    slow = [p for name, p in names.items() if p.requires_grad and "lora_B" not in name]
    optimizer = torch.optim.SGD([{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 16e-3}])
    with pytest.raises(loraplus.RateMismatchError, match="lm_head.lora_B"):
        loraplus.verify(model, optimizer, 16.0)


def test_groups_of_the_users_own_may_hold_one_memory_at_one_rate_only():
    model = tied()
    names = dict(model.named_parameters())
    embedding = [p for name, p in names.items() if p.requires_grad and "wte" in name]
    rest = [p for name, p in names.items() if p.requires_grad and "wte" not in name]

    def split(lr):
        groups = [{"params": embedding, "lr": lr, "name": "wte"}, {"params": rest, "lr": 1e-3, "name": "rest"}]
        return groups, loraplus.split_groups(model, groups, lr_ratio=16.0)

    groups, parts = split(1e-3)
    rates = {id(p): part["lr"] for part in parts for p in part["params"]}
    assert {rates[id(p)] for name, p in names.items() if "lm_head.lora" in name} == {1e-3}
    loraplus.verify(model, torch.optim.SGD(parts), 16.0, groups=groups)
    with pytest.raises(loraplus.ParameterGroupError, match=r"wte.* \(group wte, lr 0.0001\) and .*lm_head.*one memory"):
        split(1e-4)
