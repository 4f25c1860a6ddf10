r"""What a step of A and of B does to the output of an adapted layer: the layers, a sample of each, and the measure.

    y = W x + s·B A x        δ1 = s·B ΔA x    δ2 = s·ΔB A x    δ3 = s·ΔB ΔA x

Source: Hayou, Ghosh, Yu, arXiv 2402.12354, section 3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import nn
from torch.func import functional_call

from loraplus.errors import NoLoraFactorsError
from loraplus.roles import clean_name

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TOKENS = 128
"""Rows of a layer's input that are kept for a measurement."""


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer and its pair of factors, of which one trains or both do: y = base(x) + scaling·B(A(x))."""

    name: str
    layer: nn.Module
    a: nn.Module
    b: nn.Module
    scaling: float
    path: str = ""

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A's weight (r rows) and B's (r columns)."""
        return cast(nn.Parameter, self.a.weight), cast(nn.Parameter, self.b.weight)

    @property
    def base(self) -> nn.Module:
        """The layer that is adapted."""
        return cast(nn.Module, getattr(self.layer, "base_layer", self.layer))

    @property
    def experts(self) -> bool:
        """Whether A and B stand for a bank of experts, whose inputs no forward pass shows."""
        return int(getattr(self.layer, "num_experts", 1)) > 1


class Size(NamedTuple):
    """A root mean square that waits on its device: to read each one by itself would stop a GPU each time.

    Args:
        norm: (), of all entries.
        root: √(number of entries).
    """

    norm: torch.Tensor
    root: float


def size_of(tensor: torch.Tensor) -> Size:
    """The root mean square of a tensor of any shape (…), not read yet."""
    tensor = tensor.detach()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return Size(torch.linalg.vector_norm(tensor, dtype=wide), math.sqrt(max(1, tensor.numel())))


def read(sizes: Sequence[Size]) -> list[float]:
    """The values of sizes, on any devices, in one transfer for each device."""
    norms: dict[int, float] = {}
    by_device: dict[torch.device, list[int]] = {}
    for place, size in enumerate(sizes):
        by_device.setdefault(size.norm.device, []).append(place)
    for places in by_device.values():
        norms |= zip(places, torch.stack([sizes[place].norm for place in places]).tolist(), strict=True)
    return [norms[place] / size.root for place, size in enumerate(sizes)]


@dataclass(frozen=True)
class Sample:
    """What a forward pass left for a measurement: some rows of the input, and the size of the output.

    Args:
        inputs: (tokens, inputs of the layer); of a convolution (examples, channels, …).
        output: root mean square over tokens and outputs.
    """

    inputs: torch.Tensor
    output: Size


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Every layer with an A or B that trains, both being modules (linear and convolution; not embeddings), as in PEFT.

    Raises:
        NoLoraFactorsError: there is none.
    """
    layers = []
    for path, module in model.named_modules():
        pairs = getattr(module, "lora_A", None)
        if not isinstance(pairs, nn.ModuleDict):  # litgpt's is a parameter
            continue
        for name, a in pairs.items():
            b, scaling = cast(Any, module).lora_B[name], cast(Any, module).scaling[name]
            title = clean_name(path) if name == "default" else f"{clean_name(path)} ({name})"
            entry = AdaptedLayer(title, module, a, b, float(scaling), path)
            if any(weight.requires_grad for weight in entry.weights):
                layers.append(entry)
    if not layers:
        raise NoLoraFactorsError(f"{type(model).__name__} has no layer with a trainable lora_A or lora_B to measure")
    return layers


def factors(layers: Sequence[AdaptedLayer]) -> list[nn.Parameter]:
    """The weights A, B, A, B, … of the layers."""
    return [weight for entry in layers for weight in entry.weights]


def rms(tensor: torch.Tensor) -> float:
    """Root of the mean square over all elements of a tensor of any shape (…)."""
    return read([size_of(tensor)])[0]


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether FSDP2 has sharded a tensor: it says its whole shape (d, …), and one process has (d / processes, …)."""
    module = sys.modules.get("torch.distributed.tensor")  # to import it takes half as long as torch
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole (d, …) of a tensor that FSDP2 has sharded; any other as it is. All processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part (d / processes, …) of a tensor that FSDP2 has sharded; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@dataclass(frozen=True)
class Movement:
    """What steps ΔA and ΔB do to one layer, as root mean squares over tokens and features."""

    output: float  # y
    inner: float  # A x
    delta1: float  # s·B ΔA x
    delta2: float  # s·ΔB A x
    delta3: float  # s·ΔB ΔA x
    inner_change: float  # ΔA x

    @property
    def finite(self) -> bool:
        """Whether every value is a number."""
        return all(math.isfinite(value) for value in vars(self).values())

    def scaled(self, by_a: float, by_b: float) -> Movement:
        """The same steps, ΔA times `by_a` and ΔB times `by_b`."""
        a_alone = replace(self, delta1=self.delta1 * by_a, inner_change=self.inner_change * by_a)
        return replace(a_alone, delta2=self.delta2 * by_b, delta3=self.delta3 * by_a * by_b)


def movement(
    layer: AdaptedLayer,
    sample: Sample,
    delta_a: torch.Tensor,
    delta_b: torch.Tensor,
    weights: Sequence[torch.Tensor] | None = None,
) -> Movement:
    """Measures the steps ΔA (r, d_in) and ΔB (d_out, r), of any size, on a recorded sample: `movement_sizes`, read."""
    return movement_of(layer, read(movement_sizes(layer, sample, delta_a, delta_b, weights)))


def movement_of(layer: AdaptedLayer, values: Sequence[float]) -> Movement:
    """A layer's movement from what `movement_sizes` gave, read."""
    s = abs(layer.scaling)
    output, inner, delta1, delta2, delta3, inner_change = values
    return Movement(output, inner, s * delta1, s * delta2, s * delta3, inner_change)


def movement_sizes(
    layer: AdaptedLayer,
    sample: Sample,
    delta_a: torch.Tensor,
    delta_b: torch.Tensor,
    weights: Sequence[torch.Tensor] | None = None,
) -> list[Size]:
    """What steps of any size do to a recorded sample: y, A x, B ΔA x, ΔB A x, ΔB ΔA x and ΔA x, without the scaling s.

    Args:
        layer: the layer.
        sample: recorded by a `Recorder`.
        delta_a: change of A's weight, (rank, inputs).
        delta_b: change of B's weight, (outputs, rank).
        weights: A and B before the step, of the same shapes. Default: as they are now.
    """
    weight_a, weight_b = (gathered(weight.detach()) for weight in (layer.weights if weights is None else weights))
    x = sample.inputs.to(weight_a.dtype)
    with torch.no_grad():
        z, dz = (_through(layer.a, weight, x) for weight in (weight_a, delta_a))
        through_b = ((weight_b, dz), (delta_b, z), (delta_b, dz))
        moved = [size_of(_through(layer.b, weight, inner)) for weight, inner in through_b]
    return [sample.output, size_of(z), *moved, size_of(dz)]


def _through(module: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The module's map with another weight, without the offset that LoraConfig(lora_bias=True) gives B.

    Args:
        module: A or B.
        weight: (outputs, inputs) of the module, or a convolution's.
        x: (tokens, inputs); of a convolution (examples, channels, …).

    Returns:
        (tokens, outputs); of a convolution (examples, channels, …).
    """
    if type(module) is nn.Linear:  # a tenth of the time of a functional call
        return nn.functional.linear(x, weight)
    bias = getattr(module, "bias", None)
    offset = {} if bias is None else {"bias": torch.zeros_like(bias, dtype=weight.dtype)}
    return functional_call(module, {"weight": weight, **offset}, (x,))


def movements(
    layers: Sequence[AdaptedLayer], samples: Mapping[str, Sample], before: Sequence[torch.Tensor]
) -> dict[str, Movement]:
    """What the step from the weights `before` to the present ones did to each layer that was sampled.

    Args:
        layers: all of them.
        samples: {layer's name: what was recorded of it}.
        before: A, B, A, B, … of all layers: (rank, inputs), (outputs, rank), …
    """
    now, moved_by_layer = factors(layers), {}
    for i, entry in enumerate(layers):
        a, b = (gathered(before[j]) for j in (2 * i, 2 * i + 1))  # in every process, sampled there or not
        delta_a, delta_b = gathered(now[2 * i].detach()) - a, gathered(now[2 * i + 1].detach()) - b
        if entry.name in samples:
            moved = movement(entry, samples[entry.name], delta_a, delta_b, (a, b))
            if moved.finite:
                moved_by_layer[entry.name] = moved
    return moved_by_layer
