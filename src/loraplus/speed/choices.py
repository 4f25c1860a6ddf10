"""For each lever, which modules it changes: those whose own forward was seen to compute the same.

Names and shapes only suggest. Before the first module of a class and settings changes, its own forward is run beside
the literal twin of the faster one, on a few numbers; one that computes something else is left alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraplus.speed.activations import FastActivation, FastGatedMLP, kind_of, literal_activation, literal_gated
from loraplus.speed.adapters import FastLinear
from loraplus.speed.fast import Fast, is_plain, make_fast, make_slow
from loraplus.speed.graphs import GraphedLayer, GraphedStack
from loraplus.speed.last_layer import FastClassifier, FastLastLayer, last_layer, readers
from loraplus.speed.loss import ChunkedLoss, FastCausal, FastOutput, fits
from loraplus.speed.norms import FastLayerNorm, FastRMSNorm, literal_rms_norm

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_REPLACED = "another forward stands in its place"


def _other(module: nn.Module) -> str:
    hooked = not is_plain(module.modules())
    return "hooks on it would be run in trying it" if hooked else f"{type(module).__name__} computes something else"


@dataclass(frozen=True)
class Change:
    """The change of a module's class.

    Args:
        module: which.
        fast: what is mixed in.
    """

    module: nn.Module
    fast: type[Fast]

    def make(self) -> None:
        """Changes it, unless that was done before."""
        make_fast(self.module, self.fast)


class Judged:
    """Which classes compute what their faster form does: each is tried once."""

    def __init__(self) -> None:
        self._same: dict[Any, bool] = {}

    def same(self, module: nn.Module, own: Callable[[], Tensor], literal: Callable[[], Tensor]) -> bool:
        """Whether two computations give the same numbers, (…, width), in training and out of it.

        Neither draws from the script's random numbers. A module is judged with others of its class and settings.
        """
        if not is_plain(module.modules()):
            return False  # a hook of the script's is not for us to run
        settings = [f"{name}={value}" for name, value in sorted(vars(module).items()) if type(value) in _SETTINGS]
        kind = (type(module), *(one for one in settings if not one.startswith(("training=", "layer_idx="))))
        if kind not in self._same:
            self._same[kind] = all(_agree(module, own, literal, training) for training in (True, False))
        return self._same[kind]


_SETTINGS = (bool, int, float, str)


def _agree(module: nn.Module, own: Callable[[], Tensor], literal: Callable[[], Tensor], training: bool) -> bool:
    """Whether both give the same, (…, width), from the same random numbers; False if either cannot be called."""
    try:
        with _quiet(module, training=training):
            result = own()
        with _quiet(module, training=training):
            return _is_close(result, literal())
    except Exception:  # a module of another form, or one that cannot be called by itself
        return False


def _is_close(result: Tensor, expected: Tensor) -> bool:
    """Whether two results, (…, width), are the same to rounding, each row by its own size."""
    if result.shape != expected.shape or result.dtype is not expected.dtype:
        return False
    size = expected.abs().amax(-1, keepdim=True) + 1.0
    return bool(((result - expected).abs() <= _TOLERANCE.get(expected.dtype, 0.0) * size).all())


@contextlib.contextmanager
def _quiet(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Without gradients, and with the random numbers as they were, each time."""
    modes = [(inner, inner.training) for inner in module.modules()]
    module.train(training)
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
            yield
    finally:
        for inner, mode in modes:
            inner.training = mode


_SCALES = torch.tensor([0.1, 1.0, 100.0])[:, None]
"""Sizes of the rows that a module is tried on. Large ones show a module that cuts numbers off."""


def _numbers(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers of a shape (…), the same each time, with the type and device of `like`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _adapters(module: nn.Module, judged: Judged) -> Iterator[Change | str]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not isinstance(module, tuners.BaseTunerLayer):
        return
    layer: Any = module
    if type(layer) not in _known_linear() and not isinstance(module, FastLinear):
        yield f"{type(layer).__name__}: PEFT's own form is kept"
    elif "forward" in vars(layer):
        yield _REPLACED
    elif layer.lora_variant and set(layer.lora_variant) >= set(layer.lora_A):
        yield f"{type(next(iter(layer.lora_variant.values()))).__name__}: PEFT's own form is kept"
    else:
        yield Change(layer, FastLinear)


def _known_linear() -> list[type]:
    """PEFT's layers that add s·B A x to what a linear layer gives, whatever that holds its weight in."""
    places = {"layer": ["Linear"], "bnb": ["Linear4bit", "Linear8bitLt"]}
    modules = {sys.modules.get(f"peft.tuners.lora.{place}"): names for place, names in places.items()}
    return [getattr(module, name) for module, names in modules.items() for name in names if hasattr(module, name)]


def _recompute(module: nn.Module, judged: Judged) -> Iterator[Change | str]:
    if isinstance(module, Fast) and module.lever == "recompute":
        yield Change(module, type(module))
    elif "forward" in vars(module):
        return
    elif type(module) is nn.LayerNorm:
        yield Change(module, FastLayerNorm)
    elif (kind := kind_of(module)) is not None and not list(module.parameters()):
        x = torch.linspace(-4.0, 4.0, 33)[None] * _SCALES
        if judged.same(module, lambda: module(x), lambda: literal_activation(x, kind)):
            yield Change(module, FastActivation)
    elif all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        yield from _gated(module, judged)


def _gated(mlp: Any, judged: Judged) -> Iterator[Change | str]:
    kind = kind_of(getattr(mlp, "act_fn", None))
    weight = next(mlp.gate_proj.parameters(), None)
    width = getattr(mlp.gate_proj, "in_features", None)
    if kind is None or weight is None or width is None:
        yield _other(mlp)
        return

    def numbers() -> Tensor:  # (1, 3, width), a row for each of `_SCALES`
        x = _numbers(1, 3, width, like=weight)
        return x / mlp.gate_proj(x).std() * _SCALES.to(x)

    def literal() -> Tensor:  # (1, 3, width)
        x = numbers()
        return mlp.down_proj(literal_gated(mlp.gate_proj(x), mlp.up_proj(x), kind))

    if judged.same(mlp, lambda: mlp(numbers()), literal):
        yield Change(mlp, FastGatedMLP)
    else:
        yield _other(mlp)


def _norms(module: nn.Module, judged: Judged) -> Iterator[Change | str]:
    norm: Any = module
    if isinstance(norm, FastRMSNorm):
        yield Change(norm, FastRMSNorm)
    if isinstance(norm, Fast) or not type(norm).__name__.endswith("RMSNorm") or "forward" in vars(norm):
        return
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
        yield _other(norm)
        return
    x = torch.linspace(-3.0, 4.0, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    if judged.same(norm, lambda: norm(x), lambda: literal_rms_norm(x, weight, eps)):
        yield Change(norm, FastRMSNorm)
    else:
        yield _other(norm)


def _is_model(module: nn.Module, *ends: str) -> bool:
    """Whether a module is a model of transformers whose name ends so; PEFT's models, which hold one, are none."""
    transformers = sys.modules.get("transformers.modeling_utils")
    known = transformers is not None and isinstance(module, transformers.PreTrainedModel)
    return known and type(module).__name__.endswith(ends)


def _last_layer(module: nn.Module, judged: Judged) -> Iterator[Change | str]:
    model: Any = module
    if not _is_model(model, "ForSequenceClassification"):
        return
    if isinstance(model, FastClassifier):
        yield Change(model, FastClassifier)
        return
    layer = last_layer(model)
    if layer is None or not is_plain(readers(model, layer)):
        yield "last layer: of another form"
        return
    ids = torch.arange(10, device=next(model.parameters()).device).view(2, 5) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0

    def logits() -> Tensor:  # (2, labels)
        return model(input_ids=ids, attention_mask=mask).logits

    with _quiet(model):
        try:
            expected = logits()
            changes = [Change(layer, FastLastLayer), Change(model, FastClassifier)]
            for change in changes:
                change.make()
            result = logits()
            same = _is_close(result, expected)
        except Exception:  # the head reads other positions, say
            same = False
    if same:
        yield Change(model, FastClassifier)
        return
    for part in (layer, model):
        make_slow(part)
    yield "last layer: the head reads other positions, too"


def _loss(module: nn.Module, judged: Judged) -> Iterator[Change | str]:
    model: Any = module
    if not _is_model(model, "ForCausalLM", "LMHeadModel"):
        return
    head = model.get_output_embeddings()
    if not isinstance(module, FastCausal) and ("forward" in vars(model) or not fits(model, head)):
        yield "loss: it, or the output layer, is trained or of another form"
        return
    if not isinstance(model.loss_function, ChunkedLoss):
        model.loss_function = ChunkedLoss(model.loss_function)
    yield Change(head, FastOutput)
    yield Change(model, FastCausal)


def _graphs(module: nn.Module, judged: Judged) -> Iterator[Change | str]:
    layers = getattr(module, "layers", None)
    if not _is_model(module, "Model") or not isinstance(layers, nn.ModuleList) or not len(layers):
        return
    if any("forward" in vars(part) for part in (module, *layers)):
        yield _REPLACED
        return
    for layer in layers:
        Change(layer, GraphedLayer).make()
    yield Change(module, GraphedStack)


CHOICES: dict[str, Callable[[nn.Module, Judged], Iterator[Change | str]]] = {
    "adapters": _adapters, "recompute": _recompute, "norms": _norms, "last_layer": _last_layer, "loss": _loss,
    "graphs": _graphs,
}  # fmt: skip
"""{lever: what it makes of a module}."""
