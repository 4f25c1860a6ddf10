"""create_optimizer with every optimizer people use: the ratio is in B's step, not only in a group's entry.

One step from one state with one gradient: with ratio λ, B moves λ times as far as with ratio 1, and A just as far.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model

import loraplus
from loraplus.roles import Role, trainable_parameters

RATIO = 8.0


def adapted(**options):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options}))
    for entry in trainable_parameters(model):
        if entry.role is Role.B:
            torch.nn.init.normal_(entry.parameter, std=0.1)
    return model


def loss_of(model):
    ids = torch.arange(32).reshape(4, 8)
    return model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss


def step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def load(module, name):
    return getattr(pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed"), name)


def adamw(**options):
    return torch.optim.AdamW, options


CASES = {
    "AdamW": adamw,
    "AdamW foreach": partial(adamw, foreach=True),
    "AdamW fused": partial(adamw, fused=True),
    "AdamW amsgrad with decay": partial(adamw, weight_decay=0.1, amsgrad=True),
    "Adam": lambda: (torch.optim.Adam, {}),
    "SGD": lambda: (torch.optim.SGD, {"momentum": 0.9}),
    "SGD weight decay": lambda: (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop": lambda: (torch.optim.RMSprop, {}),
    "Muon": lambda: (load("torch.optim", "Muon"), {}),
    "Adafactor of transformers": lambda: (
        load("transformers.optimization", "Adafactor"), {"relative_step": False, "scale_parameter": False},
    ),
    "Adafactor of transformers, scaled": lambda: (
        load("transformers.optimization", "Adafactor"), {"relative_step": False, "scale_parameter": True},
    ),
    "AdamW8bit": lambda: (load("bitsandbytes.optim", "AdamW8bit"), {"min_8bit_size": 0}),
    "PagedAdamW8bit's plain twin, 32 bits": lambda: (load("bitsandbytes.optim", "AdamW"), {}),
}  # fmt: skip


def displacements(case, ratio):
    """How far each parameter moves in the third step, after two at ratio 1 that give the optimizer its state."""
    optimizer_cls, options = CASES[case]()
    model = adapted()
    start = loraplus.create_optimizer(model, optimizer_cls, lr=1e-3, lr_ratio=1.0, **options)
    for _ in range(2):
        step(model, start)
    optimizer = loraplus.create_optimizer(model, optimizer_cls, lr=1e-3, lr_ratio=ratio, **options)
    optimizer.state.update(start.state)
    loraplus.verify(model, optimizer, lr_ratio=ratio, lr=1e-3)
    before = {entry.name: entry.parameter.detach().clone() for entry in trainable_parameters(model)}
    step(model, optimizer)
    return {e.name: (e.role, e.parameter.detach() - before[e.name]) for e in trainable_parameters(model)}


def assert_ratio(plain, fast):
    """Every parameter moved, and in `fast` as far as in `plain`, B RATIO times as far."""
    # The weights are float32 near 0.1: their own rounding is 1e-8.
    for name, (role, moved) in fast.items():
        before = plain[name][1]
        assert before.abs().max() > 0 and moved.abs().max() > 0
        expected = before * (RATIO if role is Role.B else 1.0)
        torch.testing.assert_close(moved, expected, rtol=2e-3, atol=3e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_bs_step_is_ratio_times_its_step_at_ratio_one(case):
    assert_ratio(displacements(case, 1.0), displacements(case, RATIO))


def test_torchs_adafactor_caps_its_rate_so_the_ratio_holds_below_the_cap_only():
    # Its step is max(eps2, RMS of the weight) · min(lr, 1/√step): at lr = 1e-3 and ratio 8, B's rate is capped from
    # step 15,625 on.
    optimizer_cls = load("torch.optim", "Adafactor")
    moved = {}
    for ratio in (1.0, RATIO):
        model = adapted()
        optimizer = loraplus.create_optimizer(model, optimizer_cls, lr=1e-3, lr_ratio=ratio)
        before = {entry.name: entry.parameter.detach().clone() for entry in trainable_parameters(model)}
        step(model, optimizer)
        moved[ratio] = {e.name: (e.role, e.parameter.detach() - before[e.name]) for e in trainable_parameters(model)}
    assert_ratio(moved[1.0], moved[RATIO])


def test_schedule_free_keeps_the_ratio_in_the_point_that_it_steps_from():
    # Its weights are an average; z is the sequence that the rate acts on, and after one step from a fresh state it has
    # moved by the rate alone.
    optimizer_cls = load("schedulefree", "AdamWScheduleFree")
    moved = {}
    for ratio in (1.0, RATIO):
        model = adapted()
        optimizer = loraplus.create_optimizer(model, optimizer_cls, lr=1e-3, lr_ratio=ratio)
        optimizer.train()
        before = {entry.name: entry.parameter.detach().clone() for entry in trainable_parameters(model)}
        step(model, optimizer)
        loraplus.verify(model, optimizer, lr_ratio=ratio, lr=1e-3)
        moved[ratio] = {
            e.name: (e.role, optimizer.state[e.parameter]["z"] - before[e.name]) for e in trainable_parameters(model)
        }
        optimizer.eval()
        assert all(torch.isfinite(entry.parameter).all() for entry in trainable_parameters(model))
    assert_ratio(moved[1.0], moved[RATIO])


def test_prodigy_is_refused_before_training_and_the_split_one_estimates_by_role():
    prodigy = load("prodigyopt", "Prodigy")
    split = load("loraplus.tasks.prodigy", "SplitProdigy")
    model = adapted()
    with pytest.raises(loraplus.OptimizerSetupError, match="SplitProdigy"):
        loraplus.create_optimizer(model, prodigy, lr=1.0, lr_ratio=RATIO)
    loraplus.create_optimizer(model, prodigy, lr=1.0, lr_ratio=1.0)  # plain LoRA is Prodigy's own business
    optimizer = loraplus.create_optimizer(model, split, lr=1.0, lr_ratio=1.0)
    for _ in range(20):
        step(model, optimizer)
    estimates = {group["name"]: group["d"] for group in optimizer.param_groups}
    assert estimates["lora_A"] != estimates["lora_B"] and min(estimates.values()) >= 1e-6


def test_a_second_order_optimizer_with_one_group_is_refused():
    with pytest.raises(loraplus.OptimizerSetupError, match="LBFGS takes one parameter group"):
        loraplus.create_optimizer(adapted(), torch.optim.LBFGS, lr=1.0)


def test_an_optimizer_that_calls_a_closure_keeps_the_ratio():
    class Extragradient(torch.optim.SGD):
        """Looks one step ahead, then steps from where it was with the gradient found there; needs its closure."""

        def step(self, closure):
            with torch.enable_grad():
                closure()
            start = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            super().step()
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for p, old in zip((p for g in self.param_groups for p in g["params"]), start, strict=True):
                    p.copy_(old)
            super().step()
            return loss

    model = adapted()
    optimizer = loraplus.create_optimizer(model, Extragradient, lr=0.1, lr_ratio=RATIO)
    reference = adapted()
    rates = {e.name: 0.1 * (RATIO if e.role is Role.B else 1.0) for e in trainable_parameters(reference)}

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    entries = trainable_parameters(reference)
    start = {e.name: e.parameter.detach().clone() for e in entries}
    for _ in range(2):  # the same two half-steps by hand
        reference.zero_grad()
        loss_of(reference).backward()
        for e in entries:
            e.parameter.data = start[e.name] - rates[e.name] * e.parameter.grad
    for ours, by_hand in zip(trainable_parameters(model), entries, strict=True):
        torch.testing.assert_close(ours.parameter, by_hand.parameter, msg=ours.name)


def test_muon_refuses_what_is_no_matrix_and_shares_the_model_with_adamw():
    muon = load("torch.optim", "Muon")
    model = adapted(use_dora=True)
    with pytest.raises(loraplus.OptimizerSetupError, match="magnitude_vector"):
        loraplus.create_optimizer(model, muon, lr=1e-3, lr_ratio=RATIO)
    groups = loraplus.param_groups(model, lr=1e-3, lr_ratio=RATIO)  # the recipe of docs/optimizers.md
    factors = [group for group in groups if group["name"] in ("lora_A", "lora_B")]
    matrices = muon(factors, lr=1e-3)
    others = torch.optim.AdamW([group for group in groups if group["name"] not in ("lora_A", "lora_B")], lr=1e-3)
    before = copy.deepcopy(model)
    loss_of(model).backward()
    matrices.step()
    others.step()
    assert all(
        not torch.equal(entry.parameter, old.parameter)
        for entry, old in zip(trainable_parameters(model), trainable_parameters(before), strict=True)
    )
    rates = {
        e.role: e.lr for optimizer in (matrices, others) for e in loraplus.explain(model, optimizer).entries if e.lr
    }
    assert rates == {"lora_A": 1e-3, "lora_B": 1e-3 * RATIO, "magnitude": 1e-3}


@pytest.mark.parametrize("paper_compatible", [False, True])
def test_8_bit_optimizers_keep_the_states_of_embeddings_in_32_bits(paper_compatible):
    optimizer_cls = load("bitsandbytes.optim", "AdamW8bit")
    model = adapted(modules_to_save=["word_embeddings"], target_modules=["query", "position_embeddings"])
    optimizer = loraplus.create_loraplus_optimizer(
        model, optimizer_cls, lr=1e-3, loraplus_lr_ratio=RATIO, paper_compatible=paper_compatible, min_8bit_size=0
    )
    step(model, optimizer)
    entries = trainable_parameters(model)
    kinds = {entry.role: optimizer.state[entry.parameter]["state1"].dtype for entry in entries}
    assert kinds[Role.A] == kinds[Role.B] == torch.uint8
    assert kinds[Role.EMBEDDING] == kinds[Role.EMBEDDING_A] == kinds[Role.EMBEDDING_B] == torch.float32
