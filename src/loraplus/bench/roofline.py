"""The least time that a step's products of matrices need on this machine, at their own shapes.

Counted is what a step must compute, for tokens that are no padding:

    a frozen layer      y = W x and the gradient of x               2 products of 2·in·out·tokens operations
    a trained matrix    and the gradient of its own weight          3 of them
    attention           Q Kᵀ and P V, forth once and back twice     6 products of 2·length·width·tokens, half if causal

The output layer of a decoder counts tokens that are learnt; the head of a classifier counts texts, as does what a last
layer does behind its attention and to its queries, since nothing else of it is read. The first layer's projections need
no gradient of their input. Each shape is then timed as a bare product, in turns with the arms, and the sum of the times
is the floor.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loraplus.bench.prepared import Prepared
from loraplus.tasks.config import CLASSIFICATION

_INPUTS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")
_KEPT = ("key", "value", "k_proj", "v_proj", "k_lin", "v_lin")  # of a last layer: read at every position
Product = tuple[int, int, int]  # rows, inner, columns


@dataclass
class Floor:
    """What a step must compute, and how fast this machine does it.

    Args:
        products: How often a mean step computes each.
        attention: Operations of attention in a mean step; they count at the rate of the fastest product.
        device: Of the model.
        dtype: That it computes in.
    """

    products: Counter[Product]
    attention: float
    device: torch.device
    dtype: torch.dtype
    fastest: float = field(default=0.0, init=False)

    @property
    def operations(self) -> float:
        """Of a mean step."""
        return sum(count * _operations(shape) for shape, count in self.products.items()) + self.attention

    def turn(self) -> float:
        """Computes each product once.

        Returns:
            The seconds of a step that did nothing else. It takes turns with the arms, at the same speed of the machine.
        """
        seconds, best = 0.0, 0.0
        for shape, count in self.products.items():
            taken = self._seconds(shape)
            seconds += count * taken
            best = max(best, _operations(shape) / taken)
        self.fastest = max(self.fastest, best)
        return seconds + self.attention / best

    def _seconds(self, shape: Product) -> float:
        rows, inner, columns = shape
        sizes = ((rows, inner), (columns, inner))
        x, w = (torch.randn(size, device=self.device).to(self.dtype) for size in sizes)
        torch.nn.functional.linear(x, w)
        self._wait()
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def floor_of(prepared: Prepared) -> Floor:
    """The floor of a mean step of a turn."""
    model = prepared.model(dropout=False, lora_dropout=0.0)
    weights = next(p for p in model.parameters() if p.is_floating_point())
    dtype = torch.bfloat16 if prepared.config.bf16 else weights.dtype
    return Floor(_products(prepared, model), _attention(prepared, model), weights.device, dtype)


def _operations(shape: Product) -> float:
    return 2.0 * shape[0] * shape[1] * shape[2]


def _products(prepared: Prepared, model: Any) -> Counter[Product]:
    """How often each product is computed in a mean step."""
    steps = prepared.steps
    tokens, texts = round(prepared.tokens / steps), round(prepared.examples / steps)
    classifies = prepared.config.task == CLASSIFICATION
    learnt = texts if classifies else _learnt(prepared) // steps
    first, last = _ends(model)
    head = model.get_base_model().get_output_embeddings()
    products: Counter[Product] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        path = name.removesuffix(".base_layer").split(".")
        role = next((part for part in path if part in _INPUTS), "")
        rows = tokens
        if module is head or "modules_to_save" in path or "original_module" in path:
            if "original_module" in path:
                continue  # a copy that is kept and not run
            rows = learnt
        elif classifies and last and name.startswith(last) and role not in _KEPT:
            rows = texts
        inner, outer = module.in_features, module.out_features
        reads_embedding = bool(first) and name.startswith(first) and role in _INPUTS and "lora_B" not in path
        products[(rows, inner, outer)] += 1
        if not reads_embedding:
            products[(rows, outer, inner)] += 1
        if module.weight.requires_grad:
            products[(inner, rows, outer)] += 1
    return products


def _ends(model: nn.Module) -> tuple[str, str]:
    """Where the names of the first and the last layer begin; empty if there is no list of layers."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        return "", ""
    name, layers = max(lists, key=lambda named: len(named[1]))
    return f"{name}.0.", f"{name}.{len(layers) - 1}."


def _learnt(prepared: Prepared) -> int:
    """Target tokens of a turn."""
    return sum(sum(label != -100 for label in row["labels"]) for row in prepared.rows(grouped=True))


def _attention(prepared: Prepared, model: Any) -> float:
    """Operations of attention in a mean step."""
    config = model.get_base_model().config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    squares = sum(length**2 for length in prepared.lengths)
    if prepared.config.task == CLASSIFICATION:  # the last layer asks from one position
        return 12.0 * width * ((layers - 1) * squares + prepared.tokens) / prepared.steps
    return 6.0 * width * layers * squares / prepared.steps
