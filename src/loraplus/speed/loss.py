"""The loss of a causal language model from the positions that have a label, a chunk of them at a time.

Where labels are given, the output layer hands on `LazyLogits`, which are computed when somebody looks at them. The loss
does not: it takes the hidden states, leaves out the positions without a label, and keeps no logits. Each chunk gives
its part of the loss and, since the output layer is frozen, of the gradient of the hidden states at once:

    L = Σ −log softmax(W h)_label / n,   dh = (softmax(W h) − onehot) W / n
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from loraplus.speed.fast import Fast, computed_in, is_plain, is_sharded, once

_CHUNK_BYTES = 2**26
"""Of logits in 32 bits at once."""
_IGNORED = -100


class FastCausal(Fast):
    """A causal language model; where it is given labels, its output layer may hand on `LazyLogits`.

    Without labels somebody else makes the loss, of logits that are there.
    """

    lever = "loss"
    what = "loss in chunks, without the logits of masked labels"
    only_input = False

    def forward(self, *args: object, **kwargs: object) -> Any:
        model: Any = self
        if kwargs.get("labels") is None:
            return super().forward(*args, **kwargs)
        token = _judged_by_labels.set(model.get_output_embeddings())
        try:
            return super().forward(*args, **kwargs)
        finally:
            _judged_by_labels.reset(token)


_judged_by_labels: ContextVar[nn.Module | None] = ContextVar("output layer of a model with labels", default=None)


class FastOutput(Fast):
    """A frozen output layer, which hands on `LazyLogits` in training."""

    lever = "loss"
    what = "loss in chunks, without the logits of masked labels"

    def forward(self, hidden: Tensor) -> Tensor:
        head: Any = self
        if not head.training or not hidden.requires_grad or type(hidden) is not Tensor:
            return super().forward(hidden)
        if _judged_by_labels.get() is not head or not torch.is_grad_enabled() or not is_plain((head,)):
            return super().forward(hidden)
        if type(head.weight) is not nn.Parameter or any(value.requires_grad for value in head.parameters()):
            return super().forward(hidden)
        if is_sharded(head):  # whose weight is gone when somebody looks at the logits
            return super().forward(hidden)
        product = computed_in(hidden)
        if product is not head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            return super().forward(hidden)
        return lazy_logits(hidden, head.weight, head.bias, product, product)


class ChunkedLoss:
    """transformers' loss of causal language models, which takes `LazyLogits` in chunks.

    Args:
        own: the model's loss function, for all other logits.
    """

    def __init__(self, own: Callable[..., Tensor]) -> None:
        self.own = own

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        shift_labels = kwargs.get("shift_labels")
        targets = labels if shift_labels is None else shift_labels
        if (
            args
            or kwargs.keys() & {"weight", "label_smoothing", "reduction"}
            or not isinstance(logits, LazyLogits)
            or logits.seen is not None  # and perhaps changed
            or logits.shape[:-1] != targets.shape
            or logits.shape[-1] != vocab_size
        ):
            return self.own(logits, labels, vocab_size, *args, **kwargs)
        known = {name: kwargs[name] for name in _OF_LOSS if name in kwargs}
        return chunked_loss(logits, labels, **known)


_OF_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


class LazyLogits(Tensor):
    """Logits that are computed once somebody looks at them: h Wᵀ + b, (…, vocabulary).

    From then on it stands for the computed tensor, in-place changes included. Code that does not go through Python,
    such as autograd, finds it at the place of the logits in the graph.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    product: torch.dtype
    seen: Tensor | None

    def now(self) -> Tensor:
        """The logits, (…, vocabulary)."""
        if self.seen is not None:
            return self.seen
        with torch._C.DisableTorchFunctionSubclass():
            kind, dtype = self.device.type, self.dtype
            bias = None if self.bias is None else self.bias.to(self.product)
            with torch.autocast(kind, enabled=False), torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
                logits = F.linear(self.hidden.to(self.product), self.weight.to(self.product), bias).to(dtype)
        if not torch.is_inference(logits):
            self.seen = logits
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTS and args[0].seen is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.float and args[0].seen is None:  # as Accelerate does with all outputs
            lazy = args[0]
            return lazy_logits(lazy.hidden, lazy.weight, lazy.bias, lazy.product, torch.float32)
        args, kwargs = _looked_at((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _looked_at((args, kwargs or {}))
        return func(*args, **kwargs)


_FACTS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "grad_fn", "is_leaf")
    ),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__,
}  # fmt: skip


def lazy_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype, dtype: torch.dtype
) -> LazyLogits:
    """Logits that are not computed yet.

    Args:
        hidden: h, (…, width).
        weight: W, (vocabulary, width).
        bias: b, (vocabulary,), or None.
        product: type that the matrix product is computed in.
        dtype: of the logits.
    """
    lazy: Any = _Unseen.apply(hidden, weight, product, dtype)
    lazy.hidden, lazy.weight, lazy.bias, lazy.product, lazy.seen = hidden, weight, bias, product, None
    return lazy


class _Unseen(torch.autograd.Function):
    """The place of logits in the graph: dh = g W."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, product: torch.dtype, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.types = product, hidden.dtype
        shape = (*hidden.shape[:-1], weight.shape[0])
        return torch.Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> Any:
        (weight,), (product, dtype) = ctx.saved_tensors, ctx.types
        return (g.to(product) @ weight.to(product)).to(dtype), None, None, None


def _looked_at(values: object) -> Any:
    return tree_map(lambda value: value.now() if isinstance(value, LazyLogits) else value, values)


def literal(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = _IGNORED) -> Tensor:
    """What `chunked_loss` computes, with all logits at once.

    Args:
        hidden: last hidden states, (batch, positions, width).
        weight: of the output layer, (vocabulary, width).
        labels: (batch, positions).
        ignore_index: a label that counts for nothing.
    """
    logits = F.linear(hidden, weight).float()[:, :-1].reshape(-1, weight.shape[0])
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=ignore_index)


def chunked_loss(
    logits: LazyLogits,
    labels: Tensor,
    *,
    num_items_in_batch: object = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = _IGNORED,
) -> Tensor:
    """The mean cross-entropy of the next token over the positions that have a label.

    Args:
        logits: (batch, positions, vocabulary), not computed yet.
        labels: (batch, positions); each is the label of the position before.
        num_items_in_batch: what to divide by, if not by the number of labels.
        shift_labels: labels in their positions, instead.
        ignore_index: a label that counts for nothing.

    Returns:
        The loss, a scalar in 32 bits.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden = logits.hidden
    targets = shift_labels.reshape(-1).to(hidden.device)
    at = (targets != ignore_index).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, at)
    count: Any = at.numel() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, dtype=torch.float32, device=hidden.device)
    return _MeanLoss.apply(rows, logits.weight, logits.bias, targets.index_select(0, at), count, logits.product)


class _MeanLoss(torch.autograd.Function):
    """Σ −log softmax(W h + b)_label / n; the gradient of h is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, count: Tensor,
        product: torch.dtype,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        gradient = torch.empty_like(rows)
        chunk = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        weight, bias = weight.to(product), None if bias is None else bias.to(product)
        # In float16 1/n times a small probability would be zero; the loss is scaled for that, which comes afterwards.
        ctx.late = 1.0 / count if product is torch.float16 else None
        each = torch.ones_like(count) if product is torch.float16 else 1.0 / count
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, rows.shape[0], chunk):
                part = slice(start, start + chunk)
                label = targets[part].unsqueeze(1)
                logged = F.linear(rows[part].to(product), weight, bias).float().log_softmax(-1)
                total -= logged.gather(1, label).sum()
                of_logits = logged.exp_().mul_(each)
                of_logits.scatter_add_(1, label, -each.expand(label.shape))
                gradient[part] = of_logits.to(product) @ weight
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        scale = g if ctx.late is None else g * ctx.late
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return (wide * scale).to(gradient.dtype), None, None, None, None, None


def fits(model: Any, head: Any) -> bool:
    """Whether a model's loss is the known one, and its output layer a frozen linear one.

    Args:
        model: of transformers.
        head: its output layer.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    frozen = type(head) is nn.Linear and not any(value.requires_grad for value in head.parameters())
    return frozen and is_plain((head,)) and getattr(model, "loss_function", None) is ForCausalLMLoss
