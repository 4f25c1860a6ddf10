"""A last encoder layer that is computed at the first position only, where the head of a classifier reads.

Keys and values are needed at every position; the query, the attention's output and the feed-forward part at one. Where
the layer drops out, masks are drawn for all positions, as if they were there: the same random numbers, the same loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraplus.speed.adapters import whole_weight
from loraplus.speed.dropout import drawn
from loraplus.speed.fast import Fast, is_plain

_short: ContextVar[nn.Module | None] = ContextVar("layer that is read at its first position only", default=None)


class FastClassifier(Fast):
    """A model for the classification of sequences; where nobody asks for hidden states, its last layer may be short."""

    lever = "last_layer"
    what = "last layer only where the head reads"
    only_input = False

    def forward(self, *args: object, **kwargs: object) -> Any:
        model: Any = self
        layer = last_layer(model)
        asked = any(
            kwargs.get(name) or getattr(model.config, name, False)
            for name in ("output_hidden_states", "output_attentions")
        )
        if layer is None or asked or not is_plain(readers(model, layer)):
            return super().forward(*args, **kwargs)
        token = _short.set(layer)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _short.reset(token)


class FastLastLayer(Fast):
    """A layer of the BERT family."""

    lever = "last_layer"
    what = "last layer only where the head reads"
    only_input = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: object, **kwargs: object
    ) -> Any:
        layer: Any = self
        attention = layer.attention.self
        usable = (
            _short.get() is layer
            and not (layer.training and getattr(layer, "gradient_checkpointing", False))
            and not any(value is not None for value in args)
            and kwargs.get("encoder_hidden_states") is None
            and kwargs.get("cache") is None
            and kwargs.get("past_key_values") is None
            and attention.config._attn_implementation in ("sdpa", "eager")
            and (attention_mask is None or attention_mask.dim() == 4)
            and not getattr(attention, "is_causal", False)
            and not (_drops_out(layer) and _draws_otherwise(hidden_states))
            and not any(_drops_out(part) for part in _at_first(layer))
        )
        if not usable:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return _first_position(layer, hidden_states, attention_mask)


def last_layer(model: nn.Module) -> nn.Module | None:
    """The last layer of a BERT-like encoder inside a model, None where there is none of that form."""
    encoder = getattr(getattr(model, getattr(model, "base_model_prefix", ""), None), "encoder", None)
    layers = getattr(encoder, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    layer: Any = layers[-1]
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")  # fmt: skip
    try:
        for name in parts:
            layer.get_submodule(name)
    except AttributeError:
        return None
    return layer


def readers(model: Any, layer: nn.Module) -> Iterator[nn.Module]:
    """The modules that could notice a short last layer: those that hold it, are in it, or come after it."""
    base = getattr(model, model.base_model_prefix)
    yield from (base, base.encoder, base.encoder.layer)
    yield from layer.modules()
    for parent, inner in ((model, base), (base, base.encoder)):
        for name, child in parent.named_children():
            if child is not inner and name != "embeddings":
                yield from child.modules()


def _at_first(layer: Any) -> tuple[nn.Module, ...]:
    """The modules that see the first position only, and so cannot draw dropout masks for the others."""
    return layer.attention.self.query, layer.attention.output.dense, layer.intermediate, layer.output.dense


def _drops_out(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in layer.modules())


def _draws_otherwise(x: Tensor) -> bool:
    """Whether attention to x, (batch, tokens, width), drops out by other random numbers than `F.dropout`'s."""
    return x.device.type != "cpu" or torch.is_autocast_enabled(x.device.type)


def _first_position(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """The layer's output at position 0: (batch, 1, width)."""
    length, first = x.shape[1], x[:, :1]
    attended = layer.attention.output.dense(_attended(layer.attention.self, x, first, mask))
    attended = _dropped(layer.attention.output.dropout, attended, length)
    attended = layer.attention.output.LayerNorm(attended + first)
    output = layer.output.dense(layer.intermediate(attended))
    return layer.output.LayerNorm(_dropped(layer.output.dropout, output, length) + attended)


def _attended(attention: Any, x: Tensor, first: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the first position to all: (batch, 1, width)."""
    query = attention.query(first).view(x.shape[0], 1, attention.num_attention_heads, attention.attention_head_size)
    mask = None if mask is None else mask[:, :, :1]
    of_key, of_value = whole_weight(attention.key), whole_weight(attention.value)
    if of_key is None or of_value is None or torch.is_autocast_enabled(x.device.type):
        out = _by_keys(attention, query.transpose(1, 2), x, mask)
    else:
        out = _by_weights(attention, query.squeeze(1), x, mask, of_key, of_value)
    return out.reshape(x.shape[0], 1, -1)


def _by_keys(attention: Any, query: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """From the keys and values of all positions: (batch, heads, 1, size)."""
    heads, size = attention.num_attention_heads, attention.attention_head_size
    key, value = (
        projection(x).view(*x.shape[:2], heads, size).transpose(1, 2) for projection in (attention.key, attention.value)
    )
    if not (attention.training and attention.dropout.p):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
    return _chances(attention, (query @ key.transpose(2, 3)) * attention.scaling, mask) @ value


def _by_weights(
    attention: Any, query: Tensor, x: Tensor, mask: Tensor | None, of_key: tuple[Tensor, Tensor | None],
    of_value: tuple[Tensor, Tensor | None],
) -> Tensor:  # fmt: skip
    """Without keys and values, of which one query needs no more than their sums: (batch, heads, size).

    q·(Wₖ xₗ) = (Wₖᵀ q)·xₗ and Σₗ pₗ Wᵥ xₗ = Wᵥ Σₗ pₗ xₗ, so a head of size d costs a d-th of the products
    with every row of x.
    """
    heads, size, width = attention.num_attention_heads, attention.attention_head_size, x.shape[-1]
    query = query * attention.scaling
    through_key = torch.bmm(query.transpose(0, 1), of_key[0].view(heads, size, width)).transpose(0, 1)
    scores = through_key @ x.transpose(1, 2)
    if of_key[1] is not None:
        scores = scores + (query * of_key[1].view(heads, size)).sum(-1, keepdim=True)
    chances = _chances(attention, scores.unsqueeze(2), mask).squeeze(2)
    mean = (chances @ x).transpose(0, 1)
    out = torch.bmm(mean, of_value[0].view(heads, size, width).transpose(1, 2)).transpose(0, 1)
    if of_value[1] is not None:
        out = out + chances.sum(-1, keepdim=True) * of_value[1].view(heads, size)
    return out


def _chances(attention: Any, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Of scores (batch, heads, 1, length): what each position counts, dropped out."""
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    return _dropped(attention.dropout, F.softmax(scores, dim=-1, dtype=wide).to(scores.dtype), scores.shape[-1], dim=2)


def _dropped(dropout: nn.Dropout, x: Tensor, length: int, dim: int = 1) -> Tensor:
    """Dropout at position 0 of what would have `length` positions along a dimension; x has one, (batch, 1, width)."""
    if not dropout.training or dropout.p == 0.0:
        return x
    shape = [*x.shape]
    shape[dim] = length
    return x * drawn(dropout.p, shape, x.dtype, x.device).narrow(dim, 0, 1)
