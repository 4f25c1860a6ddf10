"""LoRA's linear layer as one step: y = x Wᵀ + b + s·(x Aᵀ) Bᵀ.

PEFT computes it in six, and keeps more than the gradients need. Here

* in 32 bits W + s·B A is formed where that is cheaper than two products with every row of x (as RunLoRA does);
* in 16 bits s·(x Aᵀ) Bᵀ is added by the matrix product itself;
* the input is kept as it came, neither cast nor dropped out, or not at all if it can be made again (`remake`);
* products with a thin matrix are laid out so that the long side is contiguous, which is four times as fast on a CPU.

The gradients are those of autograd, to rounding:

    g = ∂L/∂y,  dB = s·gᵀ (x Aᵀ),  dA = s·(g B)ᵀ x,  dx = g (W + s·B A)

Source: Cherniuk et al., "Run LoRA Run", arXiv 2312.03415.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraplus.speed.dropout import Mask
from loraplus.speed.fast import Fast, computed_in, is_plain, once
from loraplus.speed.remake import Recipe, keep, kept, recipe_of

_WIDE = (torch.float32, torch.float64)  # W + s·B A would lose B A in 16 bits


class FastLinear(Fast):
    """The forward of PEFT's `lora.Linear`."""

    lever = "adapters"
    what = "LoRA in one step"
    only_input = False

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        layer: Any = self
        if args or kwargs or layer.disable_adapters or layer.merged:
            return super().forward(x, *args, **kwargs)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if not names or not _is_usable(layer, names, x):
            return super().forward(x)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not _drops_out(layer, names):
            # Two adapters' parts of dx would be added in 16 bits, where PEFT adds them in 32.
            return _without_cast(layer, names[0], x) if len(names) == 1 else super().forward(x)
        base, y = layer.base_layer, None
        plain = _holds_plain_weight(base) and _multiplies(base.weight, x)
        if not plain:
            y = base(x)
        for name in names:
            y = _step(x, y, _rows(base) if plain else None, base.bias if plain else None, layer, name)
        return y  # type: ignore[return-value]


def literal(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """What `FastLinear` computes, written down as PEFT does it: the twin that it is held against.

    Args:
        x: (…, in).
        weight: W, (out, in).
        bias: (out,), or None.
        a: A, (r, in).
        b: B, (out, r).
        scale: s.
        p: dropout on the input of A.

    Returns:
        y, (…, out).
    """
    return F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, p), a), b) * scale


def whole_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """W + s·B A and b of a layer, for autograd to go through; None where that is not what the layer multiplies by.

    Args:
        layer: linear, with adapters or without.

    Returns:
        (out, in) and (out,), if nothing drops out and the numbers have 32 bits or more.
    """
    if type(layer) is nn.Linear:
        return (layer.weight, layer.bias) if layer.weight.dtype in _WIDE else None
    if not isinstance(layer, FastLinear):
        return None
    lora: Any = layer
    base = lora.base_layer
    names = (
        [] if lora.disable_adapters or lora.merged else [name for name in lora.active_adapters if name in lora.lora_A]
    )
    if type(base) is not nn.Linear or base.weight.dtype not in _WIDE or _drops_out(lora, names):
        return None
    weight = base.weight
    for name in names:
        if not _are_plain_factors(lora, name) or lora.lora_A[name].weight.dtype is not weight.dtype:
            return None
        weight = torch.addmm(weight, lora.lora_B[name].weight, lora.lora_A[name].weight, alpha=lora.scaling[name])
    return weight, base.bias


def _is_usable(layer: Any, names: list[str], x: Tensor) -> bool:
    """Whether weights may be used for x, (…, in), without calling the modules that hold them."""
    if type(x) is not Tensor or not x.is_floating_point() or x.dim() < 2:
        return False
    if not layer.cast_input_dtype_enabled or (_drops_out(layer, names) and not x.is_contiguous()):
        return False  # the numbers drawn depend on an input's type and layout
    autocast = torch.is_autocast_enabled(x.device.type)
    for name in names:
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if (
            not _are_plain_factors(layer, name)
            or (autocast and not _multiplies(a.weight, x))
            or (len(names) > 1 and not autocast and a.weight.dtype is not x.dtype)  # PEFT rounds the sum once
            or type(dropout) not in (nn.Identity, nn.Dropout)
            or not is_plain((a, b, dropout))
        ):
            return False
    return True


def _are_plain_factors(layer: Any, name: str) -> bool:
    """Whether an adapter is s·B A x, with A and B the weights of plain linear layers and of one type."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    return (
        name not in layer.lora_variant
        and all(type(part) is nn.Linear and type(part.weight) is nn.Parameter and part.bias is None for part in (a, b))
        and a.weight.dtype is b.weight.dtype
    )


def _holds_plain_weight(base: nn.Module) -> bool:
    """Whether a base layer is x Wᵀ + b with W and b frozen."""
    if type(base) is not nn.Linear and type(base).__name__ != "Conv1D":
        return False
    weight, bias = base.weight, base.bias
    frozen = type(weight) is nn.Parameter and not weight.requires_grad
    return frozen and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad)) and is_plain((base,))


def _multiplies(weight: Tensor, x: Tensor) -> bool:
    """Whether torch multiplies x, (…, in), and a weight, (out, in), of these types; where not, its error is wanted."""
    if torch.is_autocast_enabled(x.device.type):
        return (weight.dtype is torch.float64) is (x.dtype is torch.float64)
    return weight.dtype is x.dtype


def _without_cast(layer: Any, name: str, x: Tensor) -> Tensor:
    """PEFT's own steps but for the cast of x, (…, in), that autocast undoes: the same bits, (…, out)."""
    y = layer.base_layer(x)
    return (y + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]).to(y.dtype)


def _drops_out(layer: Any, names: list[str]) -> bool:
    dropouts = [layer.lora_dropout[name] for name in names]
    return any(isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0 for dropout in dropouts)


def _rows(base: Any) -> Tensor:
    """W as (out, in); transformers' Conv1D holds it the other way around."""
    return base.weight if type(base) is nn.Linear else base.weight.t()


def _step(x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, layer: Any, name: str) -> Tensor:
    """y, (…, out), plus what an adapter adds for x, (…, in); without y, the base layer's product in the same step."""
    a, b, dropout = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
    mask = Mask(dropout.p, x.shape, a.dtype, x.device) if _drops_out(layer, [name]) else None
    product, scale = computed_in(x), layer.scaling[name]
    thin = product if torch.is_autocast_enabled(x.device.type) else a.dtype
    step, made = _Settings(scale, product, thin, mask), recipe_of(x)
    if y is None:
        return _Whole.apply(x, weight, bias, a, b, step, made)
    return _Added.apply(y, x, a, b, step, made)


class _Settings(NamedTuple):
    """What a step has besides tensors."""

    scale: float
    product: torch.dtype  # of x Wᵀ
    thin: torch.dtype  # of the products with A and B
    mask: Mask | None


class _Whole(torch.autograd.Function):
    """y = x Wᵀ + b + s·(x Aᵀ) Bᵀ with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, step: _Settings, made: Recipe
    ) -> Tensor:
        rows, w, (a_, b_) = x.reshape(-1, x.shape[-1]).to(step.product), weight.to(step.product), _cast(step, a, b)
        outputs, inputs = weight.shape
        ctx.formed = (
            step.mask is None
            and step.product in _WIDE
            and step.thin is step.product
            and rows.shape[0] * (inputs + outputs) > inputs * outputs
        )
        if ctx.formed:
            w = torch.addmm(w, b_, a_, alpha=step.scale)
        y = F.linear(rows, w, None if bias is None else bias.to(step.product))
        through_a = None
        if not ctx.formed:
            through_a = F.linear(_dropped(rows, x, step), a_)
            _add_product(y, through_a, b_.t(), step.scale)
        ctx.step, ctx.of = step, (a.dtype, b.dtype)
        keep(ctx, made, weight, a_, b_, through_a)
        return y.view(*x.shape[:-1], outputs)

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> Any:
        x, (weight, a, b, through_a) = kept(ctx)
        g = g.reshape(-1, g.shape[-1])
        gradients = _Gradients(ctx, x, g, a, b, through_a, needs=ctx.needs_input_grad[3:5])
        dx = None
        if ctx.needs_input_grad[0]:
            w = weight.to(ctx.step.product)
            dx = g @ torch.addmm(w, b, a, alpha=ctx.step.scale) if ctx.formed else gradients.add_to_input(g @ w)
            dx = dx.to(x.dtype).view(x.shape)
        return dx, None, None, gradients.a, gradients.b, None, None


class _Added(torch.autograd.Function):
    """y + s·(x Aᵀ) Bᵀ, where the base layer is of another kind, or another adapter has been added before."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, step: _Settings, made: Recipe) -> Tensor:
        rows, (a_, b_) = x.reshape(-1, x.shape[-1]).to(step.product), _cast(step, a, b)
        through_a = F.linear(_dropped(rows, x, step), a_)
        total = y.reshape(-1, y.shape[-1])
        if total.dtype is step.thin:
            total = torch.addmm(total, through_a, b_.t(), alpha=step.scale)
        else:
            total = total.clone()
            _add_product(total, through_a, b_.t(), step.scale)
        ctx.step, ctx.of = step, (a.dtype, b.dtype)
        keep(ctx, made, a_, b_, through_a)
        return total.reshape(y.shape)

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> Any:
        x, (a, b, through_a) = kept(ctx)
        gradients = _Gradients(ctx, x, g.reshape(-1, g.shape[-1]), a, b, through_a, needs=ctx.needs_input_grad[2:4])
        dx = None
        if ctx.needs_input_grad[1]:
            zeros = torch.zeros((g.numel() // g.shape[-1], x.shape[-1]), dtype=ctx.step.product, device=x.device)
            dx = gradients.add_to_input(zeros).to(x.dtype).view(x.shape)
        return g, dx, gradients.a, gradients.b, None, None


class _Gradients:
    """dA and dB, and what the adapter adds to dx.

    Args:
        ctx: of the function.
        x: the input, (…, in).
        g: ∂L/∂y, (rows, out).
        a: A, (r, in), as it was multiplied by.
        b: B, (out, r), likewise.
        through_a: x Aᵀ, (rows, r), if it was kept.
        needs: whether dA and dB are wanted.
    """

    def __init__(
        self, ctx: Any, x: Tensor, g: Tensor, a: Tensor, b: Tensor, through_a: Tensor | None, *, needs: Sequence[bool]
    ) -> None:
        step: _Settings = ctx.step
        g, rows, on_cpu = g.to(step.thin), x.reshape(-1, x.shape[-1]), g.device.type == "cpu"
        self._through_b = _through(g, b).mul_(step.scale)  # s·g B, (rows, r)
        self._input_factor, self.a, self.b = a, None, None
        self._mask = step.mask.again().view(rows.shape) if step.mask is not None else None
        needs_a, needs_b = needs
        if needs_a or (needs_b and through_a is None):
            rows = _masked(rows.to(step.product) if self._mask is None else rows, self._mask, step.thin)
        if needs_a:
            self.a = _product(self._through_b.t(), rows, ctx.of[0])
        if needs_b:
            through_a = F.linear(rows, a) if through_a is None else through_a
            if on_cpu:
                self.b = (through_a.t() @ g).mul_(step.scale).t().to(ctx.of[1]).contiguous()
            else:
                self.b = _product(g.t(), through_a, ctx.of[1]).mul_(step.scale)

    def add_to_input(self, dx: Tensor) -> Tensor:
        """dx + s·(g B) A, in place: (rows, in)."""
        if self._mask is None:
            _add_product(dx, self._through_b, self._input_factor, 1.0)
            return dx
        return dx.add_((self._through_b @ self._input_factor).mul_(self._mask.to(self._input_factor.dtype)))


def _through(g: Tensor, b: Tensor) -> Tensor:
    """g B, (rows, r) from (rows, out) and (out, r), by the product that is quickest where it is computed."""
    if g.device.type != "cpu":
        return g @ b
    if g.dtype in _WIDE:  # few rows and many columns take half the time of the reverse
        return (b.t() @ g.t()).t()
    return F.linear(g, b.t().contiguous())


def _cast(step: _Settings, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B, (out, r), in the type that their products are computed in."""
    return a.to(step.thin), b.to(step.thin)


def _dropped(rows: Tensor, x: Tensor, step: _Settings) -> Tensor:
    """The input of A in the forward pass, (rows, in): cast, and dropped out."""
    if step.mask is None:
        return rows.to(step.thin)
    return _masked(x.reshape(rows.shape), step.mask.draw().view(rows.shape), step.thin)


def _masked(rows: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(rows, in) times a mask of that shape, cast."""
    return rows.to(dtype) if mask is None else (rows * mask).to(dtype)  # PEFT drops out after its cast


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, (m, k) by (k, n), in another type, rounded once."""
    if left.dtype is not dtype and left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale · left right, (m, n) from (m, k) and (k, n), in place, rounded once where total is narrower."""
    wide = torch.promote_types(left.dtype, total.dtype)
    left, right = left.to(wide), right.to(wide)
    if wide is total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.copy_(total.to(wide).addmm_(left, right, alpha=scale))
