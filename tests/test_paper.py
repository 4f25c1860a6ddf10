"""paper_compatible: parameter by parameter what peft.optimizers.create_loraplus_optimizer does."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from test_groups import adapted
from test_roles import Convolutions, tiny_gpt2

import loraplus

MODELS = {
    "linear": lambda: adapted(modules_to_save=None),
    "head": adapted,
    "DoRA": lambda: adapted(use_dora=True),
    "bias of all": lambda: adapted(bias="all"),
    "bias of adapted layers": lambda: adapted(bias="lora_only"),
    "bias of B": lambda: adapted(lora_bias=True),
    "norms": lambda: adapted(modules_to_save=["LayerNorm", "classifier"]),
    "embedding": lambda: adapted(target_modules=["query", "word_embeddings"]),
    "DoRA on an embedding": lambda: adapted(target_modules=["query", "word_embeddings"], use_dora=True),
    "embedding in full": lambda: adapted(modules_to_save=["word_embeddings"]),
    "trainable tokens": lambda: adapted(trainable_token_indices={"word_embeddings": [1, 2]}),
    "GPT-2": lambda: get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    "convolutions": lambda: get_peft_model(Convolutions(), LoraConfig(r=2, target_modules=["c1", "c2", "c3"])),
    "embedding and its bias": lambda: get_peft_model(
        tiny_bert(), LoraConfig(r=2, target_modules=["word_embeddings", "dense"], bias="all")
    ),
}


def by_parameter(model, optimizer):
    """{name: (rate, decay)}, and the same of each group in order, empty ones too."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    held = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return held, groups


@pytest.mark.parametrize("options", [{}, {"loraplus_weight_decay": 0.1}, {"loraplus_lr_embedding": 3e-4}])
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_paper_compatible_is_pefts_grouping_parameter_by_parameter(case, options):
    model = MODELS[case]()
    given = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "betas": (0.8, 0.9), **options}
    theirs = peft_optimizer(model, torch.optim.AdamW, **given)
    ours = loraplus.create_loraplus_optimizer(model, torch.optim.AdamW, paper_compatible=True, **given)
    assert by_parameter(model, ours) == by_parameter(model, theirs)
    assert len(ours.param_groups) == 4
    assert [g["params"] == [] for g in ours.param_groups] == [g["params"] == [] for g in theirs.param_groups]


def test_paper_compatible_honours_a_decay_given_the_usual_way():
    optimizer = loraplus.create_loraplus_optimizer(
        adapted(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.1, paper_compatible=True
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]


def test_paper_compatible_still_refuses_a_model_without_adapter_and_rates_that_cannot_be_used():
    with pytest.raises(loraplus.NoLoraFactorsError):
        loraplus.create_loraplus_optimizer(
            tiny_bert(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, paper_compatible=True
        )
    for wrong in ({"lr": -1.0}, {"loraplus_lr_ratio": 0.0}, {"loraplus_lr_embedding": 0}, {"weight_decay": -0.1}):
        given = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, **wrong}
        with pytest.raises(loraplus.InvalidRateError):
            loraplus.create_loraplus_optimizer(adapted(), torch.optim.AdamW, paper_compatible=True, **given)
