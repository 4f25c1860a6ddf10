"""How a class is mixed into a module's own."""

from __future__ import annotations

import inspect
import pickle

import torch
from torch import nn

from loraplus.speed.fast import Fast, is_plain, make_fast, make_slow


class Twice(Fast):
    """Computes the same, and counts."""

    lever = "adapters"
    calls = 0

    def forward(self, x):
        Twice.calls += 1
        return super().forward(x)


class Own(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def made():
    module = Own(2, 2)
    make_fast(module, Twice)
    return module


def test_a_call_of_another_kind_is_the_module_s_own():
    module, x = made(), torch.ones(1, 2)
    before = Twice.calls
    assert torch.equal(module(x, 2.0), 2 * module(x=x))
    assert torch.equal(module(x, scale=2.0), 2 * module(x=x))
    assert Twice.calls == before
    module(x)
    assert Twice.calls == before + 1


def test_source_signature_name_and_class_are_its_own():
    module = made()
    assert isinstance(module, Own)
    assert inspect.getsource(module.forward) == inspect.getsource(Own.forward)
    assert inspect.signature(module.forward) == inspect.signature(Own(2, 2).forward)
    assert (type(module).__qualname__, type(module).__module__) == (Own.__qualname__, Own.__module__)
    assert type(pickle.loads(pickle.dumps(module))) is type(module) is type(made())


def test_a_class_made_of_it_stays_and_computes_as_the_first():
    module, x = made(), torch.ones(1, 2)
    sharded = type("FSDPOwn", (type(module),), {})
    module.__class__ = sharded
    assert make_slow(module)
    assert not make_slow(module)
    assert type(module) is sharded
    before = Twice.calls
    module(x)
    assert Twice.calls == before
    make_fast(module, Twice)
    module(x)
    assert Twice.calls == before + 1


def test_hooks_and_forwards_put_in_place_are_seen():
    module = made()
    assert is_plain([module])
    handle = module.register_forward_hook(lambda *_: None)
    assert not is_plain([module])
    handle.remove()
    assert is_plain([module])
    module.forward = lambda x: x
    assert not is_plain([module])
