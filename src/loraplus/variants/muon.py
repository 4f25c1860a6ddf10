"""Muon on the factors: a momentum whose directions are all made equally long."""

from __future__ import annotations

from typing import Any

import torch

from loraplus.variants.pair_optimizer import PairOptimizer

_LIKE_ADAM = 0.2  # RMS of a step per unit of rate, about that of AdamW's


class Muon(PairOptimizer):
    """Orthogonal steps for A and B, of the size of AdamW's.

    M ← μ·M + G,      u = 0.2·√max(d, r) · O·(OᵀO)^(−1/2),      O = G + μ·M      (d×r)

    The rank is small, so the root is taken exactly, where Muon for whole weights iterates (Newton–Schulz).

    Args:
        params, factors_of, lr, betas, eps, weight_decay: as `PairOptimizer`; betas and eps serve what is no
            factor.
        momentum: μ.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, Muon, lr=1e-3, lr_ratio=1)  # doctest: +SKIP

    Source: Jordan and others, https://kellerjordan.github.io/posts/muon; the size is that of Moonlight, arXiv
    2502.16982, which torch's `torch.optim.Muon` has as `match_rms_adamw`.
    """

    def __init__(self, params: Any, *, momentum: float = 0.95, **options: Any) -> None:
        self.require(0 <= momentum < 1, f"momentum in [0, 1), got {momentum}")
        super().__init__(params, momentum=momentum, **options)

    def direction(
        self,
        factor: torch.Tensor,
        partner: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        options: dict[str, Any],
    ) -> torch.Tensor:
        """As `PairOptimizer.direction`: u (d, r) of P (d, r), Q (d', r) and ∂L/∂P (d, r)."""
        momentum = options["momentum"]
        state["m"] = torch.lerp(state["m"], gradient, 1 - momentum) if "m" in state else gradient * (1 - momentum)
        return _LIKE_ADAM * max(factor.shape) ** 0.5 * polar(torch.lerp(gradient, state["m"], momentum))


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix (d, r) with orthonormal columns (or rows, where r > d); directions that are zero stay zero."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = sizes > sizes.max() * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return (left * kept) @ right
