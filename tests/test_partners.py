"""A factor is one beside its partner: a name alone is no evidence.

The witness is the construction: what is called like a factor by chance is a layer of the base model, and learns at lr.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import loraplus
from loraplus import Role, UnknownAdapterParameterError
from loraplus.adapters.partners import fit, partner_names
from loraplus.roles import register_layout, trainable_parameters, unregister_layout


class Holder(nn.Module):
    """A layer with parts under given names."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns))


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, bias=False)


def roles(base: nn.Module) -> dict[str, Role]:
    """Of a base model that is trained in full, beside an adapter on a layer of its own."""
    model = get_peft_model(Holder(base=base, q=nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["q"]))
    base.requires_grad_(True)
    found = {entry.name: entry.role for entry in trainable_parameters(model)}
    return {name.removeprefix("base_model.model.base."): role for name, role in found.items() if ".base." in name}


BY_CHANCE = {
    "lora_A": lambda: Holder(lora_A=linear(8, 8)),
    "lora_B": lambda: Holder(lora_B=linear(8, 8)),
    "a parameter": lambda: Holder(lora_B=matrix(8, 8)),
    "kohya": lambda: Holder(lora_up=linear(8, 8)),
    "one of several": lambda: Holder(lora_up=nn.ModuleList([linear(8, 8)])),
    "diffusers": lambda: Holder(x_lora=Holder(up=linear(8, 8))),
    "torchtune": lambda: Holder(lora_b=linear(8, 8)),
    "Megatron": lambda: Holder(adapter=Holder(linear_out=linear(8, 8))),
    "DyLoRA": lambda: Holder(lora_x=Holder(up_list=nn.ParameterList([matrix(8, 8)]))),
    "LoHa": lambda: Holder(hada_w1_a=matrix(8, 8)),
    "LoKr": lambda: Holder(lokr_w2_b=matrix(8, 8), lokr_w1_a=matrix(8, 2)),
    "embeddings": lambda: Holder(lora_embedding_B=matrix(8, 8)),
    "a magnitude": lambda: Holder(lora_magnitude_vector=nn.Parameter(torch.ones(8))),
    "in a dict": lambda: nn.ModuleDict({"lora_B": linear(8, 8), "other": linear(8, 8)}),
    "in a dict of parameters": lambda: nn.ParameterDict({"lora_B": matrix(8, 8)}),
    "a letter that no library has": lambda: Holder(lora_C=linear(8, 8)),
    "layers that do not follow each other": lambda: Holder(lora_A=linear(8, 4), lora_B=linear(8, 2)),
    "the sum of two layers": lambda: Holder(lora_a=linear(8, 16), lora_b=linear(8, 16)),
    "convolutions that do not": lambda: Holder(lora_down=convolution(8, 4), lora_up=convolution(8, 2)),
    "parameters that do not": lambda: Holder(lora_A=matrix(8, 4), lora_B=matrix(6, 2)),
    "a partner of another layout": lambda: Holder(lora_A=linear(8, 8), lora_b=linear(8, 8)),
    "a partner at another place": lambda: Holder(first=Holder(lora_A=linear(8, 8)), then=Holder(lora_B=linear(8, 8))),
    "a partner of another number": lambda: Holder(
        lora_down=nn.ModuleList([linear(8, 8)]), lora_up=nn.ModuleDict({"1": linear(8, 8)})
    ),
    "a block under the partner's name": lambda: Holder(lora_A=linear(8, 8), lora_B=nn.Sequential(linear(8, 8))),
    "nothing under the partner's name": lambda: Holder(lora_A=linear(8, 8), lora_B=nn.Identity()),
    "down and up": lambda: Holder(down=linear(8, 2), up=linear(2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_CHANCE)
def test_what_is_called_like_a_factor_and_has_no_partner_is_none(case):
    found = roles(BY_CHANCE[case]())
    assert found and set(found.values()) == {Role.OTHER}


FACTORS_ALL_THE_SAME = {
    "modules": lambda: Holder(lora_A=linear(8, 2), lora_B=linear(2, 6)),
    "x A B": lambda: Holder(lora_A=matrix(8, 2), lora_B=matrix(2, 6)),
    "of full rank": lambda: Holder(lora_A=linear(8, 8), lora_B=linear(8, 8)),
    "a diffusers layer": lambda: Holder(to_q_lora=Holder(down=linear(8, 2), up=linear(2, 6))),
    "convolutions": lambda: Holder(lora_down=convolution(8, 4), lora_up=convolution(4, 6)),
    "the Tucker form": lambda: Holder(hada_w1_a=matrix(2, 6), hada_w1_b=matrix(2, 8)),
    "a table and a layer": lambda: Holder(lora_A=nn.Embedding(9, 2), lora_B=linear(2, 6)),
    "several in one": lambda: Holder(lora_A=matrix(4, 8), lora_B=matrix(12, 2), enable_lora=[True, False, True]),
    "experts": lambda: Holder(lora_A=nn.Parameter(torch.ones(3, 2, 8)), lora_B=nn.Parameter(torch.ones(3, 6, 2))),
    "numbered": lambda: Holder(
        lora_down=nn.ModuleList([linear(8, 2)] * 2), lora_up=nn.ModuleList([linear(2, 6), linear(2, 6)])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORS_ALL_THE_SAME)
def test_a_pair_that_makes_a_product_is_one(case):
    found = roles(FACTORS_ALL_THE_SAME[case]())
    assert found and set(found.values()) == {Role.A, Role.B}


class Packed(nn.Module):
    """A weight in a format of its own, as quantised layers keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("a", [linear(8, 2).requires_grad_(False), Packed()], ids=["frozen", "packed"])
def test_b_is_a_factor_whatever_has_become_of_a(a):
    model = nn.Sequential(Holder(lora_A=a, lora_B=linear(2, 6)))
    assert [entry.role for entry in trainable_parameters(model)] == [Role.B]


def test_flattened_and_gathered_later_shapes_are_no_reason_to_refuse():
    down, up = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(5))
    down._fsdp_flattened = True  # FSDP1's mark
    assert fit((nn.Module(), down), (nn.Module(), up))
    down, up = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(0))
    for shard, shape in ((down, (2, 8)), (up, (6, 2))):
        shard.ds_shape = shape  # ZeRO-3's
    assert fit((nn.Module(), down), (nn.Module(), up))
    up.ds_shape = (6, 4)
    assert not fit((nn.Module(), down), (nn.Module(), up))
    lazy = nn.LazyLinear(6)
    assert fit((linear(8, 2), None), (lazy, lazy.weight))


def test_a_wrapped_pair_stands_where_it_stood():
    pair = nn.ModuleDict({name: torch.compile(layer) for name, layer in
                          (("lora_A", linear(8, 2)), ("lora_B", linear(2, 6)))})  # fmt: skip
    assert {e.name: e.role for e in trainable_parameters(nn.DataParallel(pair))} == {
        "lora_A.weight": Role.A, "lora_B.weight": Role.B,
    }  # fmt: skip


def test_what_stands_beside_a_pair_and_is_named_like_it_is_refused():
    with pytest.raises(UnknownAdapterParameterError, match="lora_E"):
        roles(Holder(lora_A=linear(8, 2), lora_B=linear(2, 6), lora_E=matrix(2, 1)))
    with pytest.raises(UnknownAdapterParameterError, match="lora_down"):  # halves of two layouts make a low rank
        roles(Holder(lora_down=linear(8, 2), lora_B=linear(2, 6)))


def test_a_layout_of_the_users_own_needs_no_partner():
    register_layout("mine", lambda name, owner: Role.B if name.endswith("lora_B.weight") and len(name) < 40 else None)
    try:
        assert roles(Holder(lora_B=linear(8, 8))) == {"lora_B.weight": Role.B}
    finally:
        unregister_layout("mine")


def test_a_layer_by_chance_learns_at_lr_and_verify_shows_it():
    model = get_peft_model(Holder(lora_B=linear(8, 8), q=linear(8, 8)), LoraConfig(r=2, target_modules=["q"]))
    model.base_model.model.lora_B.requires_grad_(True)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16)
    entries = {entry.name: entry for entry in loraplus.verify(model, optimizer, 16).entries}
    by_chance = entries["base_model.model.lora_B.weight"]
    assert (by_chance.role, by_chance.lr) == (Role.OTHER, 1e-3)
    assert entries["base_model.model.q.lora_B.default.weight"].lr == pytest.approx(16e-3)


def test_a_block_trained_in_full_is_a_head_whatever_its_layers_are_called():
    base = Holder(q=linear(8, 8), block=Holder(lora_B=linear(8, 8)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], modules_to_save=["block"]))
    found = {entry.name: entry.role for entry in trainable_parameters(model)}
    assert found["base_model.model.block.modules_to_save.default.lora_B.weight"] is Role.HEAD


def test_an_adapters_name_is_no_place_for_a_partner():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]), adapter_name="lora_A")
    model.add_adapter("lora_B", LoraConfig(r=4, target_modules=["0"]))
    for active in ("lora_A", "lora_B"):
        model.set_adapter(active)
        assert {e.role for e in trainable_parameters(model)} == {Role.A, Role.B}
    assert next(partner_names("q.lora_B.lora_A.weight", nn.Linear(2, 8), nn.ModuleDict())) == "q.lora_A.lora_A.weight"
