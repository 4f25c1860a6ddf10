"""LoRA-RITE: steps of B·A that do not depend on how the product is split between the two factors."""

from __future__ import annotations

from typing import Any

import torch

from loraplus.variants.pair_optimizer import PairOptimizer


class LoraRite(PairOptimizer):
    r"""Adam with an r×r second moment, in a basis that only the product B·A decides.

    With the partner's Q = U·R (U orthonormal), the gradient freed from the partner's size is ∇ = ∂L/∂P · R⁻¹, and

        V ← β₂·T V Tᵀ + (1 − β₂)·∇ᵀ∇ / d      T = UᵀU_before turns what was measured in the last step's basis
        M ← β₁·M Tᵀ + (1 − β₁)·∇·V^(−1/2)
        u = M·R⁻ᵀ

    both moments with Adam's correction for their start at zero. Where P·Qᵀ is written as (P·C)(Q·C⁻ᵀ)ᵀ, the product
    takes the same step.

    Args:
        params, factors_of, lr, betas, eps, weight_decay: as `PairOptimizer`.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, LoraRite, lr=1e-3, lr_ratio=1)  # doctest: +SKIP

    Source: Yen and others, arXiv 2410.20625, without the correction for what a turn of the basis leaves out ("escape"),
    and without clipping.
    """

    def __init__(self, params: Any, *, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(params, eps=eps, **options)

    def direction(
        self,
        factor: torch.Tensor,
        partner: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        options: dict[str, Any],
    ) -> torch.Tensor:
        """As `PairOptimizer.direction`: u (d, r) of P (d, r), Q (d', r) and ∂L/∂P (d, r)."""
        (beta1, beta2), step = options["betas"], state["step"]
        basis, triangle = torch.linalg.qr(partner)
        inverse = torch.linalg.pinv(triangle)
        free = gradient @ inverse
        second, first = free.T @ free / len(free), torch.zeros_like(free)
        keep1, keep2 = (_weight_of_the_past(beta, step) for beta in (beta1, beta2))
        if "basis" in state:
            turn = basis.T @ state["basis"]
            second = torch.lerp(second, turn @ state["v"] @ turn.T, keep2)
            first = state["m"] @ turn.T
        state["basis"], state["v"] = basis, second
        state["m"] = torch.lerp(free @ _inverse_root(second, options["eps"]), first, keep1)
        return state["m"] @ inverse.T


def _weight_of_the_past(beta: float, step: int) -> float:
    """The weight of the average so far, with Adam's correction: 0 at the first step, β in the end."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _inverse_root(matrix: torch.Tensor, eps: float) -> torch.Tensor:
    """matrix^(−1/2) of a symmetric (r, r)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors / ((values.clamp(min=0) + eps**2).sqrt() + eps)) @ vectors.T
