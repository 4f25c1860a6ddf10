r"""What a step of A and of B does to the output of an adapted layer: the sample it is measured on, and the measure.

    y = W x + s·B A x        δ1 = s·B ΔA x    δ2 = s·ΔB A x    δ3 = s·ΔB ΔA x

Source: Hayou, Ghosh, Yu, arXiv 2402.12354, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from loraplus.errors import NoLoraFactorsError
from loraplus.roles import clean_name

TOKENS = 128
"""Rows of a layer's input that are kept for a measurement."""


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer and its trainable pair of factors: y = base(x) + scaling·B(A(x))."""

    name: str
    layer: nn.Module
    a: nn.Module
    b: nn.Module
    scaling: float

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A's weight (r rows) and B's (r columns)."""
        return cast(nn.Parameter, self.a.weight), cast(nn.Parameter, self.b.weight)


@dataclass(frozen=True)
class Sample:
    """What a forward pass left for a measurement: some rows of the input, and the RMS of the output."""

    inputs: torch.Tensor
    output_rms: float


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Every layer whose A and B both train and are modules (linear and convolution; not embeddings), in PEFT's layout.

    Raises:
        NoLoraFactorsError: there is none.
    """
    found = []
    for path, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict):  # litgpt's is a parameter
            continue
        for name, a in factors.items():
            b, scaling = cast(Any, module).lora_B[name], cast(Any, module).scaling[name]
            title = clean_name(path) if name == "default" else f"{clean_name(path)} ({name})"
            entry = AdaptedLayer(title, module, a, b, float(scaling))
            if all(weight.requires_grad for weight in entry.weights):
                found.append(entry)
    if not found:
        raise NoLoraFactorsError(f"{type(model).__name__} has no layer with a trainable lora_A and lora_B to measure")
    return found


def rms(tensor: torch.Tensor) -> float:
    """Root of the mean square."""
    tensor = tensor.detach()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=wide)) / math.sqrt(max(1, tensor.numel()))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 has sharded; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


class Recorder:
    """Hooks that keep a `Sample` of each adapted layer while `on`; without it a forward pass runs as ever.

    Padding is left out where the model is called with a two-dimensional `attention_mask`. The rows are evenly spaced,
    so that no random number is drawn and training goes on as if nobody had looked.
    """

    def __init__(self, model: nn.Module, layers: list[AdaptedLayer], tokens: int = TOKENS) -> None:
        self.on = False
        self.samples: dict[str, Sample] = {}
        self.loss_terms = 0.0
        self._counted = False
        self._tokens = tokens
        self._real: torch.Tensor | None = None
        self._handles = [model.register_forward_pre_hook(self._take_mask, with_kwargs=True)]
        self._handles += [entry.layer.register_forward_hook(self._keeper(entry.name)) for entry in layers]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def forget(self) -> None:
        """Drops what was recorded."""
        self.samples.clear()
        self.loss_terms = 0.0

    def _take_mask(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.on:
            mask = kwargs.get("attention_mask")
            usable = isinstance(mask, torch.Tensor) and mask.dim() == 2
            self._real = mask.reshape(-1).nonzero().squeeze(1) if usable else None  # type: ignore[union-attr]

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self.on:
                return
            if not _in_backward():  # where activation checkpointing runs a layer again, it is the same forward pass
                self._counted = False
            if not torch.is_grad_enabled():
                return
            if output.requires_grad:
                output.register_hook(self._count)
            inputs, outputs = args[0].detach(), output.detach()
            if isinstance(getattr(module, "base_layer", module), nn.modules.conv._ConvNd):
                rows, out_rows = inputs, outputs  # the first dimension counts examples, which are few
                chosen = self._evenly(len(rows), inputs.device, max(1, self._tokens // 16))
            else:
                rows, out_rows = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
                real = self._real if self._real is not None and int(self._real[-1]) < len(rows) else None
                count = len(rows) if real is None else len(real)
                chosen = self._evenly(count, inputs.device, self._tokens)
                chosen = chosen if real is None else real.to(inputs.device)[chosen]
            self.samples[name] = Sample(rows[chosen], rms(out_rows[chosen]))

        return keep

    def _count(self, gradient: torch.Tensor) -> None:
        if not self._counted:  # the layer nearest to the loss is the first that its gradient reaches
            self._counted = True
            self.loss_terms += loss_terms(gradient)

    @staticmethod
    def _evenly(count: int, device: torch.device, wanted: int) -> torch.Tensor:
        return torch.linspace(0, count - 1, min(count, wanted), device=device).long()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def loss_terms(gradient: torch.Tensor) -> float:
    r"""How many independent terms of a loss a gradient by a layer's output g comes from.

    Σ_i (Σ_t ‖g_it‖)² / ‖Σ_t g_it‖² over examples i with positions t: 1 for an example whose positions are all drawn one
    way (a label read off one position, or off the mean of all), T where each of T positions has a target of its own.

    Args:
        gradient: (examples, …, features); of two dimensions, every row is an example. Of a convolution's output
            (examples, channels, …), each example counts once.
    """
    if gradient.dim() != 3:
        return float(len(gradient))
    g = gradient.detach().float()
    alone, together = g.norm(dim=-1), g.sum(1).norm(dim=-1)
    rows = (alone > 0).sum(-1)
    terms = alone.sum(-1).square() / together.square().clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.minimum(terms, rows).sum())


class StepWatcher:
    """Stands around every step of an optimizer, with a `Recorder` of the forward passes before it.

    Subclasses say what is done before and after a step, and when the recorder is on.

    Args:
        model: a PEFT model, wrapped or not.
        optimizer: the one that trains it, in Accelerate's wrapper or not.

    Raises:
        NoLoraFactorsError: no layer to measure.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._layers = adapted_layers(model)
        self._recorder = Recorder(model, self._layers)
        self._before: list[torch.Tensor] = []
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Takes all hooks off the model and the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._recorder.remove()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._recorder.on:
            self._before = [weight.detach().clone() for weight in factors(self._layers)]

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before = []
        self._recorder.forget()


@dataclass(frozen=True)
class Movement:
    """What steps ΔA and ΔB do to one layer, as root mean squares over tokens and features."""

    output: float  # y
    inner: float  # A x
    delta1: float  # s·B ΔA x
    delta2: float  # s·ΔB A x
    delta3: float  # s·ΔB ΔA x
    inner_change: float  # ΔA x

    def scaled(self, by_a: float, by_b: float) -> Movement:
        """The same steps, ΔA times `by_a` and ΔB times `by_b`."""
        return replace(
            self, delta1=self.delta1 * by_a, delta2=self.delta2 * by_b, delta3=self.delta3 * by_a * by_b,
            inner_change=self.inner_change * by_a,
        )  # fmt: skip


def movement(layer: AdaptedLayer, sample: Sample, delta_a: torch.Tensor, delta_b: torch.Tensor) -> Movement:
    """Measures steps of any size on a recorded sample.

    Args:
        layer: the layer.
        sample: recorded by a `Recorder`.
        delta_a: change of A's weight, its shape.
        delta_b: change of B's weight, its shape.
    """
    weight_a, weight_b = (full(weight) for weight in layer.weights)
    x = sample.inputs.to(weight_a.dtype)
    s = abs(layer.scaling)
    with torch.no_grad():
        z, dz = (_through(layer.a, weight, x) for weight in (weight_a, delta_a))
        return Movement(
            output=sample.output_rms,
            inner=rms(z),
            delta1=s * rms(_through(layer.b, weight_b, dz)),
            delta2=s * rms(_through(layer.b, delta_b, z)),
            delta3=s * rms(_through(layer.b, delta_b, dz)),
            inner_change=rms(dz),
        )


def _through(module: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The module's map with another weight, without the offset that LoraConfig(lora_bias=True) gives B."""
    bias = getattr(module, "bias", None)
    offset = {} if bias is None else {"bias": torch.zeros_like(bias)}
    return functional_call(module, {"weight": weight, **offset}, (x,))


def factors(layers: list[AdaptedLayer]) -> list[nn.Parameter]:
    """The weights A, B, A, B, … of the layers."""
    return [weight for entry in layers for weight in entry.weights]


def movements(
    layers: list[AdaptedLayer], samples: Mapping[str, Sample], before: Sequence[torch.Tensor]
) -> dict[str, Movement]:
    """What the step from the weights `before` to the present ones did to each layer that was sampled."""
    now = [weight.detach().clone() for weight in factors(layers)]
    found = {}
    with held(layers, before):
        for i, entry in enumerate(layers):
            if entry.name in samples:
                delta_a, delta_b = (full(now[j] - before[j]) for j in (2 * i, 2 * i + 1))
                found[entry.name] = movement(entry, samples[entry.name], delta_a, delta_b)
    return found


@contextmanager
def held(layers: list[AdaptedLayer], weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Puts other weights into the factors for a while."""
    now = [weight.detach().clone() for weight in factors(layers)]
    try:
        _put(layers, weights)
        yield
    finally:
        _put(layers, now)


def _put(layers: list[AdaptedLayer], weights: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(factors(layers), weights, strict=True):
            weight.copy_(value)
