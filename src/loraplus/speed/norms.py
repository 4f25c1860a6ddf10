"""Norms that keep their input and nothing else, and say how their output is made again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraplus.speed.fast import Fast, is_sharded, once
from loraplus.speed.remake import mark


class FastLayerNorm(Fast):
    """torch's `nn.LayerNorm`: its own kernel; what reads the output need not keep it."""

    lever = "recompute"
    what = "output made again where a gradient needs it"

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        y = super().forward(x)
        if not y.requires_grad or _is_trained(norm):
            return y
        shape, eps, dtype = norm.normalized_shape, norm.eps, y.dtype
        frozen = [_lasting(norm, parameter) for parameter in (norm.weight, norm.bias) if parameter is not None]

        def again(x: Tensor, *parameters: Tensor) -> Tensor:  # (…, *shape) from the same and each of `shape`
            if dtype is not x.dtype:  # autocast computes it in 32 bits
                x, *parameters = (value.to(dtype) for value in (x, *parameters))  # type: ignore[assignment]
            weight = parameters[0] if norm.weight is not None else None
            bias = parameters[-1] if norm.bias is not None else None
            with torch.autocast(x.device.type, enabled=False):
                return F.layer_norm(x, shape, weight, bias, eps)

        return mark(y, again, x, *frozen)


class FastRMSNorm(Fast):
    """The norm of Llama and its kin: w ⊙ round(x / √(mean(x²) + ε)), computed in 32 bits and rounded to x's type."""

    lever = "norms"
    what = "RMSNorm in one step"

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        if type(x) is not Tensor or type(norm.weight) is not nn.Parameter or norm.weight.requires_grad:
            return super().forward(x)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        eps = norm.variance_epsilon
        y: Tensor
        y, rho = _RMSNorm.apply(x, norm.weight, eps)
        if not y.requires_grad:
            return y

        def again(x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:  # (…, width) from that, (width,) and (…, 1)
            return _normed(x, weight, eps)[0] if _is_fused(x, weight) else _scaled(x, weight, rho)

        return mark(y, again, x, _lasting(norm, norm.weight), rho)


def literal_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `FastRMSNorm` computes, as transformers writes it.

    Args:
        x: (…, width).
        weight: (width,).
        eps: added to the mean square.

    Returns:
        The same shape and type as x.
    """
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With n = x·ρ, ρ = 1/√(mean(x²) + ε) and h = g ⊙ w:  dx = ρ·(h − n · mean(h ⊙ n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rho = _normed(x, weight, eps)
        ctx.mark_non_differentiable(rho)
        ctx.save_for_backward(x, weight, rho)
        return y, rho

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor, of_rho: object) -> Any:
        x, weight, rho = ctx.saved_tensors
        if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
            dx, _ = torch.ops.aten._fused_rms_norm_backward(
                g.contiguous(), x, [x.shape[-1]], rho, weight.to(x.dtype), [True, False]
            )
            return dx, None, None
        h = (g * weight).to(torch.float32)
        n = x.to(torch.float32) * rho
        mean = (h * n).mean(-1, keepdim=True)
        return h.addcmul_(n, mean, value=-1.0).mul_(rho).to(x.dtype), None, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm's output, (…, width), and ρ of each row, (…, 1), from x, (…, width), and the weight, (width,)."""
    if _is_fused(x, weight):
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    rho = x.to(torch.float32).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _scaled(x, weight, rho), rho


def _is_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a kernel for the norm of x, (…, width), with a weight, (width,)."""
    return x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm") and weight.dtype is x.dtype


def _scaled(x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    """w ⊙ round(x·ρ), (…, width), with ρ of each row, (…, 1)."""
    n = (x.to(torch.float32) * rho).to(x.dtype)
    return n.mul_(weight) if n.dtype is weight.dtype else n * weight


def _lasting(norm: nn.Module, parameter: Tensor) -> Tensor:
    """A parameter, (width,), that is still there in the backward pass of what reads the norm's output.

    FSDP frees its own once the norm has run, so there it is a copy.
    """
    return parameter.detach().clone() if is_sharded(norm) else parameter


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
