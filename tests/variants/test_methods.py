"""Each method beside another implementation of it, or beside what its paper proves."""

from __future__ import annotations

import pytest
import torch
from peft.optimizers import create_riemannian_optimizer

from loraplus import variants
from loraplus.errors import DivergedError, OptimizerSetupError
from loraplus.steps.movement import adapted_layers
from loraplus.variants.lora_rite import LoraRite
from loraplus.variants.muon import polar
from loraplus.variants.pair_optimizer import adam

from .test_contract import adapted, train


def test_what_is_no_factor_takes_the_steps_of_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer, state = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0), {}
    for step in range(1, 6):
        gradient = torch.randn(5)
        theirs.grad, state["step"] = gradient, step
        optimizer.step()
        ours.data.sub_(1e-2 * adam(gradient, state, {"betas": (0.9, 0.999), "eps": 1e-8}))
    torch.testing.assert_close(ours, theirs)


def test_riemannian_takes_pefts_steps():
    ours, theirs = adapted(), adapted()
    one = train(ours, variants.create_optimizer(ours, "riemannian", lr=1e-3, weight_decay=0.0), 5)
    peft = create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    for name, weight in train(theirs, peft, 5).items():
        torch.testing.assert_close(one[name], weight, atol=2e-5, rtol=1e-4)


def test_lora_rite_takes_the_steps_of_pytorch_optimizer():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = adapted(), adapted()
    one = train(ours, variants.create_optimizer(ours, "lora-rite", lr=1e-3), 5)
    pairs = [weight for entry in adapted_layers(theirs) for weight in reversed(entry.weights)]
    plain = {"clip_unmagnified_grad": 0.0, "update_skipping": 0.0, "lora_l_dim": -1, "lora_r_dim": 0}
    rite = pytorch_optimizer.LoRARite(pairs, lr=1e-3, **plain)
    for name, weight in train(theirs, rite, 5).items():
        torch.testing.assert_close(one[name], weight, atol=2e-5, rtol=1e-3)


def test_lora_rite_steps_the_product_alike_however_it_is_split():
    products = []
    for size in (1.0, 5.0):
        torch.manual_seed(1)
        model = adapted()
        mix = torch.randn(4, 4) + 3 * torch.eye(4)
        for entry in adapted_layers(model):
            a, b = entry.weights
            a.data, b.data = size * torch.linalg.solve(mix, a.data), b.data @ mix / size
        train(model, variants.create_optimizer(model, "lora-rite", lr=1e-3, weight_decay=0.0), 4)
        products.append([entry.weights[1] @ entry.weights[0] for entry in adapted_layers(model)])
    # Second-order terms of a step, ΔB·ΔA, are all that the split may change.
    for one, other in zip(*products, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-2)


def test_muon_makes_all_directions_equally_long():
    torch.manual_seed(0)
    matrix = torch.randn(40, 4) @ torch.diag(torch.tensor([100.0, 1.0, 0.1, 0.01]))
    torch.testing.assert_close(polar(matrix).T @ polar(matrix), torch.eye(4), atol=1e-4, rtol=0)
    flat = matrix.clone()
    flat[:, 0] = 0
    assert torch.linalg.matrix_rank(polar(flat)) == 3 and bool(polar(torch.zeros(3, 2)).eq(0).all())


def test_muon_is_torchs_up_to_the_rounding_of_its_iteration():
    ours, theirs = adapted(), adapted()
    weights = [weight for entry in adapted_layers(theirs) for weight in entry.weights]
    torchs = torch.optim.Muon(weights, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    before = {entry.name: [w.detach().clone() for w in entry.weights] for entry in adapted_layers(ours)}
    train(ours, variants.create_optimizer(ours, "muon", lr=1e-2, weight_decay=0.0), 1)
    train(theirs, torchs, 1)
    for mine, other in zip(adapted_layers(ours), adapted_layers(theirs), strict=True):
        for one, two, start in zip(mine.weights, other.weights, before[mine.name], strict=True):
            moved, others = (one.detach() - start).flatten(), (two.detach() - start).flatten()
            alike = float(torch.nn.functional.cosine_similarity(moved, others, dim=0))
            # Its iteration leaves singular values between 0.68 and 1.13.
            assert alike > 0.9 and 0.75 < float(moved.norm() / others.norm()) < 1.5


def test_the_formula_of_the_width():
    model = adapted()
    width = adapted_layers(model)[0].weights[0].shape[1]
    rate = variants.create_optimizer(model, "tinker").param_groups[0]["lr"]
    assert rate == pytest.approx(5e-4 * (2000 / width) ** 0.781)


def test_a_factor_that_is_frozen_stays_and_its_partner_moves():
    model = adapted()
    for entry in adapted_layers(model):
        entry.weights[0].requires_grad_(False)
    before = [entry.weights[0].clone() for entry in adapted_layers(model)]
    after = train(model, LoraRite([e.weights[1] for e in adapted_layers(model)], factors_of=model, lr=1e-2), 2)
    assert after and all(torch.equal(one, e.weights[0]) for one, e in zip(before, adapted_layers(model), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("riemannian", {"dampingg": 1.0}, "Riemannian has no option dampingg"),
        ("riemannian", {"damping": 0.0}, "Riemannian needs damping > 0"),
        ("muon", {"momentum": 1.0}, r"Muon needs momentum in \[0, 1\)"),
        ("lora-rite", {"betas": (0.9, 1.5)}, r"LoraRite needs betas in \[0, 1\)"),
        ("lora-rite", {"momentum": 0.9}, "LoraRite has no option momentum"),
    ],
)
def test_an_option_that_a_method_does_not_have_or_cannot_use_is_refused(name, options, told):
    with pytest.raises(OptimizerSetupError, match=told):
        variants.create_optimizer(adapted(), name, **options)


def test_a_method_without_the_model_says_what_to_call():
    model = adapted()
    with pytest.raises(OptimizerSetupError, match=r"build it with loraplus.create_optimizer\(model, Muon"):
        variants.Muon([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("name", ["lora-rite", "muon"])
def test_a_gradient_that_is_not_finite_is_said_and_moves_nothing(name):
    model = adapted()
    optimizer = variants.create_optimizer(model, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(DivergedError, match="is not finite; lower the rate"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
