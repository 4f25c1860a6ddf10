"""Tensors that are cheap to make again are not kept for the backward pass.

A norm keeps its input h and hands x = norm(h) on. A layer that needs x for its gradient can keep h instead, which is
there anyway, and make x again. `mark` notes how x was made, `keep` keeps what is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_recipes = WeakTensorKeyDictionary()  # no attribute, which would go into a saved tensor


class Maker:
    """Makes a tensor again, once for all that need it, and drops it after the last of them.

    Args:
        make: called with the sources; gives the same values again.
    """

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        self._make, self._waiting = make, 0
        self._made: torch.Tensor | None = None

    def expect(self) -> None:
        """One more will need it."""
        self._waiting += 1

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        made = self._make(*sources) if self._made is None else self._made
        self._waiting -= 1  # below zero where a graph is gone through twice: then each makes its own
        self._made = made if self._waiting > 0 else None
        return made


@dataclass(frozen=True)
class Recipe:
    """How a tensor was made.

    Args:
        make: gives the same values again, from the sources.
        sources: tensors that the graph keeps in any case.
        version: of the tensor, when it was made.
    """

    make: Maker
    sources: tuple[torch.Tensor, ...]
    version: int = 0


def mark(tensor: torch.Tensor, make: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
    """Says of a tensor how it can be made again.

    Args:
        tensor: made of the sources, of any shape (…).
        make: gives it again; it draws no random numbers.
        sources: what the graph keeps anyway; they are not changed in place.

    Returns:
        The same tensor.
    """
    if not torch.is_inference(tensor):
        _recipes[tensor] = Recipe(Maker(make), tuple(source.detach() for source in sources), tensor._version)
    return tensor


def recipe_of(tensor: torch.Tensor) -> Recipe:
    """How a tensor (…) can be made again; of one without a mark, or changed in place since, by keeping it."""
    recipe = _recipes.get(tensor)
    if recipe is not None and recipe.version == tensor._version:
        return recipe
    return Recipe(Maker(_itself), (tensor.detach(),))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor (…) that was kept."""
    return tensor


def keep(ctx: Any, recipe: Recipe, *tensors: torch.Tensor | None) -> None:
    """Has an autograd function keep tensors and what a recipe needs.

    Args:
        ctx: of the function.
        recipe: of the one that is not kept.
        tensors: that are, each of any shape (…).
    """
    ctx.save_for_backward(*tensors, *recipe.sources)
    ctx.make, ctx.kept = recipe.make, len(tensors)
    recipe.make.expect()


def kept(ctx: Any) -> tuple[torch.Tensor, Sequence[Any]]:
    """(the tensor that was not kept, those that were), in the backward pass."""
    saved = ctx.saved_tensors
    return ctx.make(*saved[ctx.kept :]), saved[: ctx.kept]
