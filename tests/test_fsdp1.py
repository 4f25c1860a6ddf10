"""FSDP1: shards are 1-D and names grow; flat parameters are read where they hold one role, and refused where not.

One process is enough for that; two of them are in tests/stacks/test_wrapping.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_groups import adapted
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import loraplus
from loraplus.roles import Role, trainable_parameters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def by_policy(model, monkeypatch):
    """Every trainable layer by itself, as Accelerate wraps PEFT's models."""
    from peft.utils.other import fsdp_auto_wrap_policy

    monkeypatch.setitem(os.environ, "FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer")
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(model, use_orig_params=False, auto_wrap_policy=policy, device_id=CPU)


@pytest.mark.filterwarnings("ignore")
def test_original_parameters_keep_their_roles():
    model = adapted(use_dora=True)
    plain = [(entry.name, entry.role) for entry in trainable_parameters(model)]
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU)
    assert [(entry.name, entry.role) for entry in trainable_parameters(wrapped)] == plain


@pytest.mark.filterwarnings("ignore")
def test_a_flat_parameter_of_one_role_has_that_role(monkeypatch):
    wrapped = by_policy(adapted(), monkeypatch)
    entries = trainable_parameters(wrapped)
    assert [entry.role for entry in entries] == [Role.A, Role.B] * 4 + [Role.HEAD]
    assert all(entry.parameter.ndim == 1 and "_flat_param" not in entry.name for entry in entries)
    optimizer = loraplus.create_optimizer(wrapped, torch.optim.AdamW, lr=1e-3, lr_ratio=16.0)
    loraplus.verify(wrapped, optimizer, lr_ratio=16.0)


@pytest.mark.filterwarnings("ignore")
def test_a_bias_flattened_with_its_weight_is_refused_where_decay_is_asked_for(monkeypatch):
    wrapped = by_policy(adapted(), monkeypatch)
    with pytest.raises(loraplus.FlattenedParametersError, match="classifier.*use_orig_params=True"):
        loraplus.param_groups(wrapped, lr=1e-3, weight_decay=0.1)
    loraplus.param_groups(wrapped, lr=1e-3, weight_decay=0.0)
    loraplus.param_groups(by_policy(adapted(modules_to_save=None), monkeypatch), lr=1e-3, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_flat_parameter_of_several_roles_is_refused_with_what_to_do():
    pair = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("lora_A", "lora_B")})
    wrapped = FullyShardedDataParallel(nn.Sequential(pair), use_orig_params=False, device_id=CPU)
    with pytest.raises(loraplus.FlattenedParametersError, match=r"lora_A.*lora_B.*use_orig_params=True.*fully_shard"):
        loraplus.param_groups(wrapped, lr=1e-3)
