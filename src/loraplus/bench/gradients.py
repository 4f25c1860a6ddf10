"""One step of an arm, taken by hand, to compare its gradients with float64 and to profile it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loraplus.bench.arms import Arm, trainer_of
from loraplus.bench.prepared import Prepared
from loraplus.bench.profiling import costliest

_SPREAD = 0.02  # of B, which starts at zero and would leave A without a gradient


def gradient_errors(prepared: Prepared, reference: Arm, arms: list[Arm], output: str) -> dict[str, float]:
    """‖g − g₆₄‖ / ‖g₆₄‖ over all trained parameters together, of the first batch of a turn.

    Args:
        prepared: Model and data.
        reference: The arm that is computed in float64: PEFT's, with no dropout.
        arms: Each over the same examples, by its own trainer.
        output: A folder for the trainers.
    """
    exact = _gradients(prepared, reference, output, torch.float64)
    return {arm.name: _distance(_gradients(prepared, arm, output, None), exact) for arm in arms}


def _gradients(prepared: Prepared, arm: Arm, output: str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """{name: gradient (…) in float64} of all that an arm trains; the model computes in `dtype`, if one is given."""
    trainer = trainer_of(arm, prepared, output)
    model: Any = trainer.model
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * _SPREAD)
    if dtype is not None:
        model.to(dtype)
    _forth_and_back(trainer)()
    return {
        name: weight.grad.detach().double().cpu()
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is not None
    }


def _forth_and_back(trainer: Any) -> Callable[[], None]:
    """The first step of a turn up to its gradients, as Trainer's loop takes it."""
    count = trainer.args.gradient_accumulation_steps
    parts, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), count, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(parts)  # what Trainer's loop sets

    def step() -> None:
        for part in parts:
            trainer.training_step(trainer.model, dict(part), items)

    return step


def profile_of(prepared: Prepared, arm: Arm, output: str) -> list[dict[str, Any]]:
    """Profiles forward and backward pass of the first batch of a turn, without the optimizer's step."""
    trainer = trainer_of(arm, prepared, output)
    step = _forth_and_back(trainer)
    step()
    return costliest(step, torch.device(trainer.args.device))


def _distance(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """‖g − g₆₄‖ / ‖g₆₄‖ over all gradients together, each of its parameter's shape (…)."""
    if set(gradients) != set(exact):
        raise RuntimeError(f"gradients of other parameters: {sorted(set(gradients) ^ set(exact))[:3]}")
    off = sum(float(((gradients[name] - exact[name]) ** 2).sum()) for name in exact)
    return (off / sum(float((gradient**2).sum()) for gradient in exact.values())) ** 0.5
