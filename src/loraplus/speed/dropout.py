"""Dropout whose mask is drawn again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def drawn(p: float, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask of `shape` (…): 0 for an entry to drop, else 1 / (1 − p); the generator moves on, as in `F.dropout`."""
    return torch.nn.functional.dropout(torch.ones(tuple(shape), dtype=dtype, device=device), p, training=True)


class Mask:
    """The mask that `F.dropout` draws from the generator's present state.

    Args:
        p: probability that an entry is dropped.
        shape: of the tensor whose entries would be dropped.
        dtype: of that tensor; the numbers drawn depend on it.
        device: of that tensor.
    """

    def __init__(self, p: float, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.p, self._shape, self._dtype, self._device = p, shape, dtype, device
        self._state = self._generator_state()

    def draw(self) -> Tensor:
        """The mask, of its shape (…), see `drawn`."""
        return drawn(self.p, self._shape, self._dtype, self._device)

    def again(self) -> Tensor:
        """The same mask (…); the generator stays where it is."""
        now = self._generator_state()
        self._set_generator(self._state)
        try:
            return self.draw()
        finally:
            self._set_generator(now)

    def _generator_state(self) -> Tensor:
        """That of the device's generator: (bytes in all,)."""
        if self._device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self._device.type).get_rng_state(self._device)

    def _set_generator(self, state: Tensor) -> None:
        """Puts a state, (bytes in all,), back."""
        if self._device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self._device.type).set_rng_state(state, self._device)
