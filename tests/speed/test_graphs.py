"""When layers are captured and replayed. There is no GPU here, so a capture gives back what it was given."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from loraplus.speed import LEVERS, graphs, slow_down, speed_up
from speed.models import adapted, apart, batch_of, step


def replayed(bound):
    """As a graph does: the layer's own forward, whatever stands in its place."""

    def replay(*tensors):
        call = vars(bound.layer).pop("_loraplus_graphed")
        try:
            return bound(*tensors)
        finally:
            object.__setattr__(bound.layer, "_loraplus_graphed", call)

    return replay


@pytest.fixture
def captured(monkeypatch):
    """How many layers were captured, each time."""
    found = []

    def capture(bound, samples, allow_unused_input):
        assert all(sample[0].requires_grad for sample in samples[1:])
        found.append(len(bound))
        return [replayed(one) for one in bound]

    def key(model, args, kwargs):
        shapes = [(name, value.shape) for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
        return (shapes, torch.is_grad_enabled()) if model.training and torch.is_grad_enabled() else None

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(graphs, "_key_of", key)
    return found


BATCH = batch_of("llama")


def agree(one, other, batch=BATCH):
    return apart(step(one, batch)[1], step(other, batch)[1]) < 1e-4


@pytest.fixture
def pair():
    plain = adapted("llama", use_cache=False)
    fast = copy.deepcopy(plain)
    report = speed_up(fast, levers=[*LEVERS, "graphs"])
    assert "layers replayed as CUDA graphs" in report.replaced.values()
    return plain, fast


def test_layers_are_captured_after_a_few_calls_of_one_shape_and_give_the_same_gradients(captured, pair):
    plain, fast = pair
    layers = len(plain.get_base_model().model.layers)
    for calls in range(1, 8):
        assert agree(fast, plain)
        assert captured == ([layers] if calls > graphs.CALLS_BEFORE_CAPTURE else [])


def test_another_shape_starts_anew(captured, pair):
    plain, fast = pair
    for _ in range(5):
        step(fast, BATCH)
    assert agree(fast, plain, batch_of("llama", length=12))
    assert len(captured) == 1


def test_a_second_pass_before_the_backward_pass_does_not_use_the_graphs(captured, pair):
    _, fast = pair
    for _ in range(5):
        step(fast, BATCH)
    state = fast.get_base_model().model._loraplus_graphs
    first = fast(**BATCH).loss
    assert state._awaits_backward
    second = fast(**BATCH).loss
    (first + second).backward()
    assert not state._awaits_backward


def test_gradients_that_wait_are_moved_out_of_the_buffers_of_a_replay(captured, pair):
    _, fast = pair
    for _ in range(5):
        step(fast, BATCH)
    fast(**BATCH).loss.backward()
    waiting = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    fast(**BATCH).loss.backward()
    for name, parameter in fast.named_parameters():
        if name in waiting:
            assert parameter.grad is not waiting[name]
            assert torch.allclose(parameter.grad, 2 * waiting[name], rtol=1e-4, atol=1e-6)


def test_without_a_gpu_nothing_is_captured(pair):
    plain, fast = pair
    for _ in range(6):
        assert agree(fast, plain)
    assert not fast.get_base_model().model._loraplus_graphs._graphs


def test_copies_and_pickles_start_anew_and_slow_down_takes_it_back(captured, pair):
    plain, fast = pair
    for _ in range(5):
        step(fast, BATCH)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not other.get_base_model().model._loraplus_graphs._graphs
    slow_down(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in plain.modules()]
    assert agree(fast, plain)


def test_a_cache_of_keys_keeps_layers_from_being_captured(captured):
    model = adapted("llama", use_cache=True)
    speed_up(model, levers=["graphs"])
    for _ in range(6):
        step(model, BATCH)
    assert not captured
