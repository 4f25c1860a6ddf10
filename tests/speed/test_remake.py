"""Tensors that are made again."""

from __future__ import annotations

import gc
import io
import weakref

import pytest
import torch

from loraplus.speed import remake
from loraplus.speed.remake import mark, recipe_of


class Square(torch.autograd.Function):
    """Σ x²/2, whose backward pass makes x again."""

    @staticmethod
    def forward(ctx, x, other):
        remake.keep(ctx, recipe_of(x), other, None)
        return x.pow(2).sum() / 2

    @staticmethod
    def backward(ctx, g):
        x, (other, none) = remake.kept(ctx)
        assert none is None
        assert other.numel() == 1
        return x * g, None


def marked(source):
    x = source * 2
    return mark(x, lambda value: value * 2, source)


def test_a_marked_tensor_is_not_kept_and_made_again():
    source, kept = torch.randn(5, requires_grad=True), []
    x = marked(source * 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.data_ptr()) or value, lambda v: v):
        y = Square.apply(x, torch.ones(1))
    assert x.data_ptr() not in kept
    y.backward()
    assert torch.allclose(source.grad, source * 4)


def test_a_marked_tensor_is_made_once_for_all_that_read_it_and_then_let_go():
    source, made = torch.randn(5, requires_grad=True), []

    def make(value):
        made.append(value * 2)
        return made[-1]

    x = source * 2
    mark(x, make, source)
    y = sum(Square.apply(x, torch.ones(1)) for _ in range(3))
    y.backward(retain_graph=True)
    assert torch.allclose(source.grad, source * 12)
    assert len(made) == 1
    seen = weakref.ref(made.pop())
    gc.collect()
    assert seen() is None
    source.grad = None
    y.backward()
    assert torch.allclose(source.grad, source * 12)


def test_a_reader_whose_gradient_nobody_asks_for_changes_nothing():
    source = torch.randn(5, requires_grad=True)
    x = marked(source)
    first, second = (Square.apply(x, torch.ones(1)) for _ in range(2))
    for loss in (first, first, second):
        source.grad = None
        loss.backward(retain_graph=True)
        assert torch.allclose(source.grad, source * 4)


def test_a_marked_tensor_that_was_changed_in_place_is_kept_as_it_is():
    source = torch.randn(5, requires_grad=True)
    x = marked(source * 1).mul_(3)
    Square.apply(x, torch.ones(1)).backward()
    assert torch.allclose(source.grad, source * 36)


def test_views_and_results_have_no_mark():
    x = marked(torch.randn(5, requires_grad=True) * 1)
    for other in (x[:2], x.detach(), x * 1, x.view(5, 1)):
        assert len(recipe_of(other).sources) == 1
        assert recipe_of(other).sources[0].data_ptr() == other.data_ptr()


def test_a_source_that_is_changed_in_place_is_an_error():
    source = torch.randn(5, requires_grad=True) * 1
    y = Square.apply(marked(source), torch.ones(1))
    source.detach().mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.backward()


def test_a_marked_tensor_is_saved_like_any_other():
    x, saved = marked(torch.randn(5, requires_grad=True) * 1), io.BytesIO()
    torch.save(x, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=True), x)
    assert vars(x) == {}


def test_a_mark_goes_with_its_tensor():
    source = torch.randn(5)
    seen = weakref.ref(source)
    x = marked(source.requires_grad_(True)).detach()
    x = mark(x, lambda value: value, source)
    del source
    assert recipe_of(x).sources[0].numel() == 5
    del x
    gc.collect()
    assert seen() is None
