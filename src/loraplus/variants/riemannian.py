"""Riemannian preconditioning: the gradient of each factor, seen through the metric of its partner."""

from __future__ import annotations

from typing import Any

import torch

from loraplus.variants.pair_optimizer import PairOptimizer, adam


class Riemannian(PairOptimizer):
    """AdamW on gradients multiplied by an r×r matrix of the partner.

    u = Adam(∂L/∂P · (QᵀQ + δ·I)⁻¹)      for a factor P and its partner Q

    Both factors then move the product B·A at a speed that depends less on how its size is split between the two.

    Args:
        params, factors_of, lr, betas, eps, weight_decay: as `PairOptimizer`.
        damping: δ, which holds where Q is zero or lacks a rank.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, Riemannian, lr=3e-4, lr_ratio=1)  # doctest: +SKIP

    Source: Zhang and Pilanci, arXiv 2402.02347, with Adam after the preconditioner, as PEFT's
    `create_riemannian_optimizer` (0.21), whose steps these are.
    """

    like_adam = True

    def __init__(self, params: Any, *, damping: float = 1e-2, **options: Any) -> None:
        self.require(damping > 0, f"damping > 0, got {damping}")  # B is 0 at first
        super().__init__(params, damping=damping, **options)

    def direction(
        self,
        factor: torch.Tensor,
        partner: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        options: dict[str, Any],
    ) -> torch.Tensor:
        """As `PairOptimizer.direction`: u (d, r) of P (d, r), Q (d', r) and ∂L/∂P (d, r)."""
        metric = partner.T @ partner
        metric.diagonal().add_(options["damping"])
        return adam(torch.linalg.solve(metric, gradient, left=False), state, options)
