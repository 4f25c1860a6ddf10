"""Activations that keep what they are computed from, and nothing that can be computed again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplus.speed.fast import Fast, is_plain, once
from loraplus.speed.remake import mark

_TANH = {"NewGELUActivation", "PytorchGELUTanh", "GELUTanh", "FastGELUActivation"}
_GELU, _SILU = {"GELUActivation", "GELU"}, {"SiLUActivation", "SiLU"}


def kind_of(activation: object) -> str | None:
    """ "gelu", "tanh" (GELU by tanh) or "silu"; None for what is not known here.

    Args:
        activation: a module without parameters, or a function.
    """
    name = type(activation).__name__
    if name in _TANH or getattr(activation, "approximate", None) == "tanh":
        return "tanh"
    return "gelu" if name in _GELU else "silu" if name in _SILU else None


class FastActivation(Fast):
    """GELU or SiLU by torch's kernel; what reads the output need not keep it."""

    lever = "recompute"
    what = "output made again where a gradient needs it"

    def forward(self, x: Tensor) -> Tensor:
        kind = kind_of(self)
        if kind is None or (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        y = _act(x, kind)
        return mark(y, lambda x: _act(x, kind), x) if y.requires_grad else y


class FastGatedMLP(Fast):
    """down(act(gate(x)) ⊙ up(x)), keeping gate(x) and up(x)."""

    lever = "recompute"
    what = "gated layer that keeps its two inputs"

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self
        kind = kind_of(mlp.act_fn)
        if kind is None or not is_plain((mlp.act_fn,)):
            return super().forward(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        h: Tensor = _Gated.apply(gate, up, kind)
        if h.requires_grad:
            mark(h, lambda gate, up: _act(gate, kind).mul_(up), gate, up)
        return mlp.down_proj(h)


def literal_activation(x: Tensor, kind: str) -> Tensor:
    """What `FastActivation` computes.

    Args:
        x: (…), any shape.
        kind: as `kind_of` says.
    """
    return _act(x, kind)


def literal_gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """What `FastGatedMLP` puts between its layers.

    Args:
        gate: (…, width).
        up: (…, width).
        kind: as `kind_of` says.
    """
    return _act(gate, kind) * up


class _Gated(torch.autograd.Function):
    """h = a(gate) ⊙ up:  d up = g ⊙ a(gate),  d gate = g ⊙ up ⊙ a′(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _act(gate, kind).mul_(up)

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = d_up = None
        if ctx.needs_input_grad[0]:
            d_gate = _act_backward(g * up, gate, ctx.kind)
        if ctx.needs_input_grad[1]:
            d_up = _act(gate, ctx.kind) * g
        return d_gate, d_up, None


def _act(x: Tensor, kind: str) -> Tensor:
    """a(x), (…)."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def _act_backward(g: Tensor, x: Tensor, kind: str) -> Tensor:
    """g ⊙ a′(x), (…), from the gradient g of the output and the input x, each (…)."""
    if kind == "silu":
        return torch.ops.aten.silu_backward(g, x)
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh" if kind == "tanh" else "none")
