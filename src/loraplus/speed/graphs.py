"""Decoder layers as CUDA graphs: one launch a layer and direction instead of hundreds.

A step of small kernels waits for the processor that launches them. Once a stack of layers was called a few times in a
row with inputs of one shape, torch captures every layer's forward and backward pass, and replays them from then on.
Calls of another shape, without gradients, with dropout, hooks or a cache of keys (use_cache) run as before.

Source: `torch.cuda.make_graphed_callables`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraplus.speed.fast import Fast, is_plain

CALLS_BEFORE_CAPTURE = 3
"""With one shape: optimizers make their states and kernels are chosen in the first ones."""
_STATE, _CALL = "_loraplus_graphs", "_loraplus_graphed"


class GraphedStack(Fast):
    """A model that calls its `layers` one after another."""

    lever = "graphs"
    what = "layers replayed as CUDA graphs"
    only_input = False

    def forward(self, *args: object, **kwargs: object) -> Any:
        model: Any = self
        state = vars(model).get(_STATE)
        if state is None:
            state = Graphs()
            object.__setattr__(model, _STATE, state)
        with state.watching(model, args, kwargs):
            return super().forward(*args, **kwargs)


class GraphedLayer(Fast):
    """A layer of such a model: replays its graph while its stack says so."""

    lever = "graphs"
    what = "layers replayed as CUDA graphs"
    only_input = False

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        own = super().forward
        call = vars(self).get(_CALL)
        if call is None or args:
            return own(hidden_states, *args, **kwargs)
        return call(own, hidden_states, kwargs)


class Graphs:
    """When a stack's layers are captured, and when they are replayed. A copy of a model starts anew."""

    def __init__(self) -> None:
        self._key: Any = None
        self._calls = 0
        self._seen: list[tuple[nn.Module, Tensor, bool, dict[str, Any]]] = []
        self._graphs: dict[int, tuple[Any, Callable[..., Tensor]]] = {}
        self._awaits_backward = False

    def __deepcopy__(self, memo: object) -> Graphs:
        return Graphs()

    def __reduce__(self) -> Any:
        return Graphs, ()

    @contextlib.contextmanager
    def watching(self, model: Any, args: object, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """While it lasts, the layers of a model are recorded or replayed, if the call is one that can be."""
        layers = list(model.layers)
        call = self._next(model, _key_of(model, args, kwargs))
        last = layers[-1]
        if call is not None:
            for layer in layers:
                object.__setattr__(layer, _CALL, functools.partial(call, layer, is_last=layer is last))
        try:
            yield
        finally:
            for layer in layers:
                vars(layer).pop(_CALL, None)

    def _next(self, model: Any, key: object) -> Callable[..., Any] | None:
        """What the layers do in this call; None for what they always do."""
        if key is None:
            return None
        if self._awaits_backward:  # another pass still needs what is in the graphs
            return self._observe
        if key != self._key:
            self._key, self._calls, self._graphs, self._seen = key, 0, {}, []
        self._calls += 1
        if self._calls == CALLS_BEFORE_CAPTURE:
            return self._record
        if self._calls == CALLS_BEFORE_CAPTURE + 1 and len(self._seen) == len(model.layers):
            self._capture()
        if not self._graphs:
            return None
        _move_gradients(model)
        return self._replay

    def _observe(self, layer: nn.Module, own: Any, hidden: Tensor, kwargs: dict[str, Any], *, is_last: bool) -> Any:
        """The layer's own forward, of (batch, tokens, width); its backward pass is waited for."""
        return self._told(own(hidden, **kwargs), is_last)

    def _record(self, layer: nn.Module, own: Any, hidden: Tensor, kwargs: dict[str, Any], *, is_last: bool) -> Any:
        """The layer's own forward; what it was called with, (batch, tokens, width), is kept for the capture."""
        if all(map(_is_constant, kwargs.values())):
            self._seen.append((layer, hidden.detach(), hidden.requires_grad, kwargs))
        return own(hidden, **kwargs)

    def _replay(self, layer: nn.Module, own: Any, hidden: Tensor, kwargs: dict[str, Any], *, is_last: bool) -> Any:
        """The layer's graph instead of its own forward, both of (batch, tokens, width)."""
        form, graph = self._graphs[id(layer)]
        if form != _form(hidden, kwargs):  # with a mask that was not there before, say
            return own(hidden, **kwargs)
        self._awaits_backward = True
        return self._told(graph(hidden, *_tensors(kwargs)), is_last)

    def _told(self, output: Tensor, is_last: bool) -> Tensor:
        """The same output, (batch, tokens, width). A hook on the last layer's says when the backward pass begins."""
        if is_last and output.requires_grad:
            output.register_hook(self._backward_begins)
        return output

    def _backward_begins(self, gradient: Tensor) -> None:
        """Called with the last layer's gradient, (batch, tokens, width): the graphs are free for another pass."""
        self._awaits_backward = False

    def _capture(self) -> None:
        seen, self._seen = self._seen, []
        bound = tuple(_Bound(layer, kwargs) for layer, _, _, kwargs in seen)
        samples = tuple(
            (hidden.clone().requires_grad_(wanted), *_tensors(kwargs)) for _, hidden, wanted, kwargs in seen
        )
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
            graphs: Any = torch.cuda.make_graphed_callables(bound, samples, allow_unused_input=True)
        self._graphs = {
            id(layer): (_form(sample[0], kwargs), graph)
            for (layer, _, _, kwargs), sample, graph in zip(seen, samples, graphs, strict=True)
        }


def _move_gradients(model: nn.Module) -> None:
    """Moves gradients that wait for more to be added out of the buffers that a replay writes to."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


class _Bound(nn.Module):
    """A layer as a function of tensors: what else it was called with stays as it was."""

    def __init__(self, layer: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.layer, self._kwargs = layer, dict(kwargs)
        self.train(layer.training)

    def forward(self, hidden: Tensor, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        kwargs = {name: _filled(value, rest) for name, value in self._kwargs.items()}
        output = self.layer(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _tensors(kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors (…) among a layer's arguments, those in tuples too, in the order in which `_filled` takes them."""
    tensors: list[Tensor] = []
    for value in kwargs.values():
        tensors += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
    return tensors


def _filled(value: Any, tensors: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_filled(part, tensors) for part in value)
    return next(tensors) if isinstance(value, Tensor) else value


def _is_constant(value: object) -> bool:
    """Whether a layer's argument is a tensor, or the same each time; a cache of keys is neither."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _form(hidden: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """What must be the same for a layer's graph to serve: all but the numbers in `hidden` (…) and in the arguments."""

    def of(value: object) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return (value.shape, value.dtype) if isinstance(value, Tensor) else value

    return of(hidden), hidden.requires_grad, {name: of(value) for name, value in kwargs.items()}


def _key_of(model: nn.Module, args: object, kwargs: Mapping[str, Any]) -> Any:
    """What must not change between calls; None for a call that cannot be captured."""
    weight = next(model.parameters())
    if weight.device.type != "cuda" or not model.training or not torch.is_grad_enabled() or args:
        return None
    if getattr(model, "gradient_checkpointing", False) or torch.cuda.is_current_stream_capturing():
        return None
    if any(kwargs.get(name) for name in ("output_hidden_states", "output_attentions", "past_key_values", "cache")):
        return None
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            return None
        if not is_plain((module,)):
            return None
    shapes = tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in sorted(kwargs.items())
    )
    trained = tuple(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    kind = "cuda"
    return shapes, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), hash(trained)
