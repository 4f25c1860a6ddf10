"""Prodigy that estimates a rate for A, for B and for the head, each from its own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prodigyopt import Prodigy

_NO_DECAY = "_no_decay"


class SplitProdigy(Prodigy):
    """Prodigy with one estimate d for each role instead of one for the whole model.

    Prodigy is Adam at the rate lr·d, where d estimates the distance to the solution from below:

        d ← max(d, Σ lr·d²·⟨g, x₀ − x⟩ / ‖Σ lr·d²·g‖₁)

    prodigyopt sums both over all groups. It keeps the estimate in the groups, so a step over the groups of one role at
    a time gives every role its own. Groups that differ in nothing but weight decay share one.

    Args:
        params: groups with names, as `loraplus.param_groups` makes them, all at one rate.
        lr: factor on the estimate; leave it at 1.
        **options: of prodigyopt's Prodigy.

    Example:
        >>> import torch
        >>> groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "name": name} for name in ("lora_A", "lora_B")]
        >>> [group["name"] for group in SplitProdigy(groups).param_groups]
        ['lora_A', 'lora_B']

    Source: Mishchenko and Defazio, arXiv 2306.06101, algorithm 4.
    """

    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every role."""
        loss = closure() if closure is not None else None
        groups = self.param_groups
        roles: dict[str, list[dict[str, Any]]] = {}
        for group in groups:
            roles.setdefault(group["name"].removesuffix(_NO_DECAY), []).append(group)
        try:
            for self.param_groups in roles.values():
                super().step()
        finally:
            self.param_groups = groups
        return loss
