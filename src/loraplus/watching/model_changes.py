"""Whether a model may have other trainable parameters than before, without a walk through it.

A parameter comes to train in one of two ways: one that was frozen is unfrozen, or one is put into a module. The frozen
ones are few enough to be asked each; torch says when any module is given a parameter or a module.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch


class ModelChanges:
    """A model as it is at this moment. Holds neither it nor its parameters alive.

    Args:
        model: any module.

    Example:
        >>> layer = nn.Linear(2, 2).requires_grad_(False)
        >>> since = ModelChanges(layer)
        >>> since.may_be(), layer.weight.requires_grad_() is layer.weight, since.may_be()
        (False, True, True)
    """

    def __init__(self, model: nn.Module) -> None:
        _have_registrations_counted()
        self._registered = _registered
        self._frozen = [weakref.ref(parameter) for parameter in model.parameters() if not parameter.requires_grad]

    def may_be(self) -> bool:
        """Whether a frozen parameter trains by now, or some module, perhaps another model's, was given anything."""
        return self._registered != _registered or any(
            parameter is not None and parameter.requires_grad for parameter in (known() for known in self._frozen)
        )


_registered = 0


@functools.cache
def _have_registrations_counted() -> None:
    _torch.register_module_parameter_registration_hook(_count)
    _torch.register_module_module_registration_hook(_count)


def _count(*_: Any) -> None:
    global _registered
    _registered += 1
