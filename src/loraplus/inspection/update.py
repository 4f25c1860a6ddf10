r"""The size of a low-rank update s·B A, without forming it.

With B = Q_B R_B and Aᵀ = Q_A R_A, the n×m product B A = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values σ of the r×r
matrix R_B R_Aᵀ. Then ‖B A‖_F = √Σσ², ‖B A‖₂ = max σ, and the effective rank is exp(−Σ p log p) with p = σ / Σσ.

Source of the effective rank: Roy and Vetterli, EUSIPCO 2007.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UpdateSize:
    """Norms of s·B A and the effective rank of B A (0 if B A is zero)."""

    frobenius: float
    spectral: float
    effective_rank: float


def update_size(a: torch.Tensor, b: torch.Tensor, scaling: float) -> UpdateSize | None:
    """Measures s·B A.

    Args:
        a: r × in, or the weight of a convolution with r outputs.
        b: out × r, or the weight of a 1×1 convolution; of a grouped one, out × r/groups.
        scaling: s.

    Returns:
        None if the factors do not multiply, or hold NaN or infinity, or numbers whose product is.

    Example:
        >>> size = update_size(torch.eye(2, 3), torch.eye(4, 2), scaling=0.5)
        >>> round(size.frobenius, 4), round(size.spectral, 4), round(size.effective_rank, 4)
        (0.7071, 0.5, 2.0)
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    rank = len(flat_a)
    if b.dim() > 2 and flat_b.shape[1] != rank and rank % flat_b.shape[1] == 0:
        # Grouped: each block of outputs reads its own block of A's. A is an ordinary convolution.
        flat_b = torch.block_diag(*flat_b.chunk(rank // flat_b.shape[1]))
    if flat_b.shape[1] != rank or not (flat_a.isfinite().all() and flat_b.isfinite().all()):
        return None
    core = torch.linalg.qr(flat_b).R @ torch.linalg.qr(flat_a.T).R.T
    if not core.isfinite().all():
        return None
    values = torch.linalg.svdvals(core)
    total = values.sum()
    if not total:
        return UpdateSize(0.0, 0.0, 0.0)
    parts = values / total
    entropy = -torch.special.xlogy(parts, parts).sum()
    s = abs(scaling)
    return UpdateSize(s * float(torch.linalg.vector_norm(values)), s * float(values[0]), float(entropy.exp()))
