r"""The paper's toy model, trained at many pairs of rates at once.

    f(x) = W_out φ(s·B A h),    h = φ(W_in x)

W_in and W_out are frozen; A starts random, B at zero. All pairs of rates share W_in, W_out, A's start and the order of
the data, so they are a batch dimension, and h is computed once. With z = A h, u = s·B z, w = W_outᵀ and e = ∂L/∂f, the
gradients are

    ∂L/∂B = s·w ∘ (φ'(u) (e ∘ z)ᵀ)        ∂L/∂z = s·e ∘ ((w ∘ B)ᵀ φ'(u))        ∂L/∂A = ∂L/∂z hᵀ

φ is SiLU, u·σ(u). With ReLU, B = 0 would put every unit on the kink, where the usual φ'(0) = 0 leaves it for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

INPUTS = 5
RANK = 4
SCALING = 1.0
NOISE = 0.05
TRAIN_POINTS = 1000
TEST_POINTS = 512
BETAS = (0.9, 0.999)
EPS = 1e-8
ELEMENTS = 1 << 19  # hidden units × points × pairs held at once: what stays in a core's cache

Optimizer = Literal["adam", "sgd"]


@dataclass(frozen=True)
class Frozen:
    """What all pairs of rates share.

    Args:
        features: h of the training points, shape (points, n).
        targets: of the training points.
        test_features, test_targets: without noise.
        readout: W_out, shape (n,).
        start: A at the start, shape (r, n).
    """

    features: Tensor
    targets: Tensor
    test_features: Tensor
    test_targets: Tensor
    readout: Tensor
    start: Tensor

    @property
    def width(self) -> int:
        """n."""
        return self.readout.numel()


def target(x: Tensor) -> Tensor:
    """The smooth function to learn, (points, d) → (points,): a sine along the diagonal of the inputs."""
    return torch.sin(x.sum(-1) / math.sqrt(x.shape[-1]))


def frozen(width: int, seed: int, readout_power: float, train_points: int = TRAIN_POINTS) -> Frozen:
    """Draws data and weights. W_in has variance 1/d, A 1/n, and W_out n^(−2·readout_power).

    Args:
        width: n.
        seed: Of data and weights.
        readout_power: ½ for the usual variance 1/n of W_out, 1 for entries of order 1/n.
        train_points: Training examples.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:  # of that shape (…)
        return torch.randn(*shape, generator=generator)

    x, test_x = normal(train_points, INPUTS), normal(TEST_POINTS, INPUTS)
    targets = target(x) + NOISE * normal(train_points)
    inputs = normal(INPUTS, width) / math.sqrt(INPUTS)
    return Frozen(
        features=silu(x @ inputs),
        targets=targets,
        test_features=silu(test_x @ inputs),
        test_targets=target(test_x),
        readout=normal(width) / width**readout_power,
        start=normal(RANK, width) / math.sqrt(width),
    )


@dataclass
class Factors:
    """A and B of all pairs: shapes (pairs, r, n) and (pairs, n, r)."""

    a: Tensor
    b: Tensor

    @classmethod
    def at_start(cls, model: Frozen, pairs: int) -> Factors:
        """The same A everywhere, B = 0."""
        return cls(
            model.start.expand(pairs, -1, -1).clone(), torch.zeros(pairs, model.width, RANK, dtype=model.start.dtype)
        )

    def copy(self) -> Factors:
        """As they are now."""
        return Factors(self.a.clone(), self.b.clone())


Look = Callable[[int, int, Factors, Factors], None]


def _inner(a: Tensor, features: Tensor) -> Tensor:
    """z = A h, shape (pairs, r, points)."""
    pairs, rank, width = a.shape
    return (a.reshape(pairs * rank, width) @ features.T).reshape(pairs, rank, -1)


def outputs(model: Frozen, factors: Factors, features: Tensor) -> Tensor:
    """f, shape (pairs, points)."""
    u = torch.bmm(SCALING * factors.b, _inner(factors.a, features))
    return model.readout @ silu(u)


def gradients(model: Frozen, factors: Factors, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error of each pair, shape (pairs,), and its gradients by A and B."""
    z = _inner(factors.a, features)
    u = torch.bmm(SCALING * factors.b, z)
    error = model.readout @ silu(u) - targets
    derivative = torch.ops.aten.silu_backward(torch.ones((), dtype=u.dtype).expand_as(u), u)
    slope = (2 * SCALING / targets.numel()) * error[:, None]
    by_b = torch.bmm(derivative, (slope * z).mT).mul_(model.readout[:, None])
    by_z = slope * torch.bmm((model.readout[:, None] * factors.b).mT, derivative)
    pairs, rank, width = factors.a.shape
    by_a = (by_z.reshape(pairs * rank, -1) @ features).reshape(pairs, rank, width)
    return error.square().mean(1), by_a, by_b


def changes(before: Factors, after: Factors, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """δ1, δ2 and δ3 of the layer's output, each of shape (pairs, n, points); their sum is the whole change."""
    z, moved = _inner(before.a, features), _inner(after.a - before.a, features)
    delta_b = after.b - before.b
    return SCALING * torch.bmm(before.b, moved), SCALING * torch.bmm(delta_b, z), SCALING * torch.bmm(delta_b, moved)


class Stepper:
    """Adam or SGD on A and B with rates of each pair's own."""

    def __init__(self, optimizer: Optimizer, factors: Factors, lr_a: Tensor, lr_b: Tensor) -> None:
        self._factors = (factors.a, factors.b)
        self._rates = (lr_a[:, None, None], lr_b[:, None, None])
        self._adam = optimizer == "adam"
        self._steps = 0
        self._moments = [(torch.zeros_like(f), torch.zeros_like(f)) for f in self._factors] if self._adam else []

    def step(self, grads: Sequence[Tensor], schedule: float = 1.0) -> None:
        """Moves both factors by `grads`, A's (pairs, r, n) and B's (pairs, n, r), which may be overwritten."""
        self._steps += 1
        if not self._adam:
            for factor, rate, grad in zip(self._factors, self._rates, grads, strict=True):
                factor.sub_(grad.mul_(rate * schedule))
            return
        first, second = (1 - beta**self._steps for beta in BETAS)
        for factor, rate, grad, (m, v) in zip(self._factors, self._rates, grads, self._moments, strict=True):
            m.lerp_(grad, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            denominator = torch.sqrt(v, out=grad).div_(math.sqrt(second)).add_(EPS)
            factor.sub_(torch.div(m, denominator, out=denominator).mul_(rate * (schedule / first)))


@dataclass(frozen=True)
class Losses:
    """Mean squared errors at the end of training, one a pair; infinite where it diverged."""

    train: Tensor
    test: Tensor


def train(
    model: Frozen,
    optimizer: Optimizer,
    lr_a: Tensor,
    lr_b: Tensor,
    *,
    steps: int,
    batch: int,
    seed: int,
    on_part: Callable[[int, int], None] = lambda done, total: None,
    look: Look | None = None,
    look_at: Container[int] = (),
) -> Losses:
    """Trains every pair of rates with a linear decay to zero, and gives the losses over all points.

    Args:
        model: As `frozen` gives it.
        optimizer: adam or sgd.
        lr_a, lr_b: Rates of each pair, shape (pairs,).
        steps: Optimizer steps.
        batch: Points a step, drawn without replacement; all of them if it is as many.
        seed: Of the order.
        on_part: Told how many of all pairs' steps are done.
        look: Called with (first pair, step, before, after) at the steps `look_at`, counted from 1, for each part of
            the pairs that is trained side by side.
        look_at: Steps at which to look.
    """
    size = max(1, min(len(lr_a), ELEMENTS // (model.width * batch)))
    parts = list(zip(lr_a.split(size), lr_b.split(size), strict=True))
    losses: list[Losses] = []
    for place, (rates_a, rates_b) in enumerate(parts):
        factors = Factors.at_start(model, len(rates_a))
        stepper = Stepper(optimizer, factors, rates_a, rates_b)
        for step, chosen in enumerate(_batches(len(model.targets), batch, steps, seed)):
            before = factors.copy() if look and step + 1 in look_at else None
            _, by_a, by_b = gradients(model, factors, model.features[chosen], model.targets[chosen])
            stepper.step((by_a, by_b), schedule=(steps - step) / steps)
            if look and before:
                look(place * size, step + 1, before, factors)
        on_train, on_test = (_loss(model, factors, *pair) for pair in _splits(model))
        losses.append(Losses(on_train, on_test))
        on_part(place + 1, len(parts))
    return Losses(torch.cat([part.train for part in losses]), torch.cat([part.test for part in losses]))


def _splits(model: Frozen) -> list[tuple[Tensor, Tensor]]:
    """Features (points, n) and targets (points,) of training and test."""
    return [(model.features, model.targets), (model.test_features, model.test_targets)]


def _loss(model: Frozen, factors: Factors, features: Tensor, targets: Tensor) -> Tensor:
    """Mean squared errors (pairs,) over features (points, n) and targets (points,); infinite where it diverged."""
    loss = (outputs(model, factors, features) - targets).square().mean(1)
    return torch.where(loss.isfinite(), loss, math.inf)


def _batches(points: int, batch: int, steps: int, seed: int) -> Iterator[Tensor | slice]:
    """Indices (batch,) of each step's points, or all of them; every point once before any comes again."""
    if batch >= points:
        for _ in range(steps):
            yield slice(None)
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(points, generator=generator)])
        chosen, order = order[:batch], order[batch:]
        yield chosen
