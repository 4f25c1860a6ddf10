r"""Samples of what each adapted layer read and wrote in the passes that the present gradients come from.

Everything is taken when a gradient arrives, not when a layer is called: a pass that no gradient comes back from
(evaluation, generation, a reference model) leaves nothing, and what gradients that were since set to zero came from (a
step that the gradient scaler skipped) is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loraplus.steps.movement import TOKENS, AdaptedLayer, Sample, factors, local_part, size_of

_REMEMBERED = 64  # calls of one layer without gradients within one pass; checkpointing makes one

_alone: Recorder | None = None  # while feature_updates runs the model, others look away


@dataclass(eq=False)
class _Pass:
    """One call of the model, from the outermost of its modules on."""

    path: str
    trains: bool
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    decoder: str | None = None  # path of the module that is given the encoder's output
    encoded: int = 0  # address of that output
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)  # indices (rows,) of a mask, by its id
    read: tuple[weakref.ref[torch.Tensor], torch.Tensor | None, torch.Tensor] | None = None  # the last input, its rows

    def rows_of(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The rows (rows, d_in) that are kept of an input (…, d_in), if the layer before this one read it, too."""
        if self.read is None or self.read[0]() is not inputs or self.read[1] is not mask:
            return None
        return self.read[2]

    def mask_of(self, path: str, x: torch.Tensor) -> torch.Tensor | None:
        """The mask (examples, positions) of what the layer at `path` reads: x (examples, positions, d_in)."""
        decodes = self.decoder is not None and _inside(path, self.decoder) and x.data_ptr() != self.encoded
        return self.masks.get("decoder" if decodes else "encoder")


class _Hook:
    """A hook of ours, which does nothing in a compiled model and in a copy: pickled or deep-copied it is inert."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: object) -> None:
        if not torch.compiler.is_compiling():
            self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*args: object) -> None:
    """What a hook of ours is in a copy of the model."""


class Recorder:
    """Hooks that keep a `Sample` of each adapted layer while `on`; without it the model has none of them.

    Padding is left out where a two-dimensional mask of the rows' own shape is known: `attention_mask`, or in an
    encoder–decoder `decoder_attention_mask` or the labels. The rows are evenly spaced, so that no random number is
    drawn and training goes on as if nobody had looked.

    Args:
        model: holds the layers.
        layers: of `adapted_layers`.
        tokens: rows to keep of each.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AdaptedLayer], tokens: int = TOKENS) -> None:
        self.samples: dict[str, Sample] = {}
        self.loss_terms = 0.0
        self.process_group: Any = None  # DistributedDataParallel's, once it has called the model
        self._layers, self._tokens = list(layers), tokens
        # Every module that holds a layer: the outermost one that is called begins a pass, whichever that is.
        above = {"", *(entry.path for entry in layers)}
        above |= {path[:i] for path in above for i, character in enumerate(path) if character == "."}
        self.modules = {path: module for path, module in model.named_modules() if path in above}
        configs = (getattr(module, "config", None) for module in self.modules.values())
        self._two_sided = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        self._handles: list[Any] = []
        self._at_rest: list[nn.Parameter] = []
        self._pass: _Pass | None = None
        self._counted: set[_Pass] = set()
        self._task = -1
        # Where checkpointing runs a layer again in the backward pass, the pass that each call belonged to.
        self._unseen: dict[str, deque[_Pass]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    @property
    def on(self) -> bool:
        """Whether the model has our hooks."""
        return bool(self._handles)

    @on.setter
    def on(self, on: bool) -> None:
        if on and not self._handles:
            self._at_rest = factors(self._layers)
            for path, module in self.modules.items():
                enter = _Hook(functools.partial(self._enter, path))
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            for entry in self._layers:
                leave = _Hook(functools.partial(self._leave, entry))
                self._handles.append(entry.layer.register_forward_hook(leave, with_kwargs=True))
        elif not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._pass = None

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self.on = False
        self.forget()

    def forget(self) -> None:
        """Drops what was recorded."""
        self.samples.clear()
        self.loss_terms = 0.0
        self._counted.clear()
        self._unseen.clear()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this one looks, the others do not: what runs is no step of the training that they watch."""
        global _alone
        before, _alone = _alone, self
        try:
            yield
        finally:
            _alone = before

    def _looks_away(self) -> bool:
        return _alone is not None and _alone is not self

    def _enter(self, path: str, module: nn.Module, args: object, kwargs: Mapping[str, Any]) -> None:
        if self._looks_away() or _in_backward():  # checkpointing runs a module again: that is the same pass
            return
        current = self._pass
        if current is None or not _inside(path, current.path):
            current = self._pass = _Pass(path, torch.is_grad_enabled())
        if not current.masks:
            current.masks = _masks(kwargs, self._two_sided)
        encoded = kwargs.get("encoder_hidden_states")
        if self._two_sided and current.decoder is None and isinstance(encoded, torch.Tensor):
            current.decoder, current.encoded = path, encoded.data_ptr()
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is not None:
            self.process_group = ddp.process_group

    def _leave(
        self, entry: AdaptedLayer, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: object
    ) -> None:
        if self._looks_away():
            return
        if _in_backward():
            if not self._unseen[entry.name]:
                return  # the first call had gradients and was recorded
            current = self._unseen[entry.name].pop()
        else:
            current = self._pass
            if current is None or not current.trains:
                return
            if not torch.is_grad_enabled():
                self._unseen[entry.name].append(current)
                return
        tensor = _first_tensor(output)
        if tensor is None or not tensor.requires_grad:
            return
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        sample = None if inputs is None else self._sample(entry, inputs, tensor, current, (*args, *kwargs.values()))
        transposed = not getattr(entry.base, "batch_first", True)  # nn.MultiheadAttention's (positions, examples, …)

        def arrived(gradient: torch.Tensor) -> None:  # of the shape of the output, (…, d_out)
            self._arrived(current, gradient.transpose(0, 1) if transposed and gradient.dim() == 3 else gradient)
            if sample is not None:
                self.samples[entry.name] = sample

        tensor.register_hook(arrived)

    def _arrived(self, current: _Pass, gradient: torch.Tensor) -> None:
        """Counts a pass once: the layer nearest to the loss is the first whose output's gradient (…, d_out) arrives."""
        if current in self._counted:
            return
        task = torch._C._current_graph_task_id()
        if task != self._task and self._counted and self._gradients_are_new():
            self.forget()
        self._task = task
        self._counted.add(current)
        self.loss_terms += loss_terms(gradient)

    def _gradients_are_new(self) -> bool:
        """Whether no factor has a gradient yet, or zeros only: what was recorded before is of no account then."""
        # FSDP2's parameters are others within a backward pass than outside of it.
        for weight in (*factors(self._layers), *self._at_rest):
            if weight.grad is not None and bool(local_part(weight.grad).any()):
                return False
        return True

    def _sample(
        self, entry: AdaptedLayer, inputs: torch.Tensor, output: torch.Tensor, current: _Pass, given: Sequence[Any]
    ) -> Sample | None:
        """Some rows of x (…, d_in), and the size of y (…, d_out); None where these are not what A reads and B writes.

        A convolution's are (examples, channels, …), and whole examples are taken.
        """
        x, y = inputs.detach(), output.detach()
        if entry.experts or not x.is_floating_point():
            return None
        a, b = entry.weights
        if isinstance(entry.base, nn.modules.conv._ConvNd) and x.dim() == a.dim():
            # The first dimension counts examples, which are few.
            chosen = _evenly(len(x), x.device, max(1, self._tokens // 16))
            return Sample(x[chosen], size_of(y[chosen]))
        if a.dim() != 2 or x.shape[-1] != a.shape[1]:
            return None
        mask = current.mask_of(entry.path, x)
        chosen = self._chosen(x, mask, current.chosen)
        rows = current.rows_of(inputs, mask)  # query, key and value read one tensor
        if rows is None:
            rows = x.reshape(-1, x.shape[-1])[chosen]
            current.read = (weakref.ref(inputs), mask, rows)
        if isinstance(entry.base, nn.MultiheadAttention):  # A and B adapt its projection of query, key and value
            if any(value is not inputs for value in given[:3]):
                return None
            with torch.no_grad():
                projected = nn.functional.linear(rows.to(a.dtype), a.detach())
                change = entry.scaling * nn.functional.linear(projected, b.detach())
                weight, bias = entry.base.in_proj_weight, entry.base.in_proj_bias
                return Sample(rows, size_of(nn.functional.linear(rows, weight, bias) + change))
        outputs = y.reshape(-1, y.shape[-1])
        if y.shape[-1] != b.shape[0] or len(outputs) != x.numel() // x.shape[-1]:
            return None
        return Sample(rows, size_of(outputs[chosen]))

    def _chosen(self, x: torch.Tensor, mask: torch.Tensor | None, known: dict[int, torch.Tensor]) -> torch.Tensor:
        """Indices of evenly spaced rows that are no padding; of all rows where the mask is of another shape.

        Args:
            x: (examples, positions, inputs), or (rows, inputs).
            mask: (examples, positions).
            known: the rows of masks that were looked at in this pass; to find them stops a GPU.
        """
        count = x.numel() // x.shape[-1]
        if mask is not None and mask.numel() == count and (x.dim() != 3 or mask.shape == x.shape[:2]):
            if id(mask) not in known:
                real = mask.reshape(-1).nonzero().squeeze(1)
                known[id(mask)] = real[_evenly(len(real), real.device, self._tokens)]
            if len(known[id(mask)]):
                return known[id(mask)].to(x.device)
        return _evenly(count, x.device, self._tokens)


def _masks(kwargs: Mapping[str, Any], two_sided: bool) -> dict[str, torch.Tensor]:
    """Which (examples, positions) are no padding, as the model was told: of the input, or of encoder and decoder."""

    def given(name: str) -> torch.Tensor | None:  # (examples, positions)
        value = kwargs.get(name)
        return value if isinstance(value, torch.Tensor) and value.dim() == 2 else None

    masks = {"encoder": given("attention_mask")}
    if two_sided:
        labels = given("labels")
        mask = given("decoder_attention_mask")
        masks["decoder"] = labels != -100 if mask is None and labels is not None else mask
    return {side: mask != 0 for side, mask in masks.items() if mask is not None}


def _first_tensor(output: object) -> torch.Tensor | None:
    """What a layer puts out, (…, d_out): a tensor, or the first one in a tuple, a mapping or a data class."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    elif not isinstance(output, (tuple, list)):
        return None
    return next((tensor for value in output if (tensor := _first_tensor(value)) is not None), None)


def _inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(outer + "."))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _evenly(count: int, device: torch.device, wanted: int) -> torch.Tensor:
    """Indices (wanted,) of rows that lie evenly among `count`; (count,) if there are no more."""
    return torch.linspace(0, count - 1, min(count, wanted), device=device).long()


def loss_terms(gradient: torch.Tensor) -> float:
    r"""How many independent terms of a loss a gradient by a layer's output g comes from.

    Σ_i (Σ_t ‖g_it‖)² / ‖Σ_t g_it‖² over examples i with positions t: 1 for an example whose positions are all drawn one
    way (a label read off one position, or off the mean of all), T where each of T positions has a target of its own.

    Args:
        gradient: (examples, …, features); of two dimensions, every row is an example. Of a convolution's output
            (examples, channels, …), each example counts once.
    """
    if gradient.dim() != 3:
        return float(len(gradient)) if gradient.dim() else 1.0
    g = gradient.detach().float()
    alone, together = g.norm(dim=-1), g.sum(1).norm(dim=-1)
    rows = (alone > 0).sum(-1)
    terms = alone.sum(-1).square() / together.square().clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.minimum(terms, rows).sum())
