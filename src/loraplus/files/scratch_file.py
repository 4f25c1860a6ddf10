"""Bytes kept out of memory, in a temporary file that nobody has to remove."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from loraplus.errors import InputError


class ScratchFile:
    """Bytes in a temporary file without a name. It is gone when the process is, whatever ends that.

    Args:
        holding: what, for the message.
    """

    def __init__(self, holding: str) -> None:
        self._holding, self.size = holding, 0
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (open as long as this is)
        except OSError as error:
            raise self._no_room(error) from None

    def append(self, content: Any) -> int:
        """Writes bytes or an array behind what is there; returns where they start.

        Raises:
            InputError: the disk is full.
        """
        start, left = self.size, memoryview(content).cast("B")
        try:
            self._file.seek(start)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._no_room(error) from None
        self.size = self._file.tell()
        return start

    def read(self, start: int, size: int) -> bytearray:
        """A part of the content."""
        content = bytearray(size)
        left = memoryview(content)
        self._file.seek(start)
        while count := self._file.readinto(left):
            left = left[count:]
        return content

    def array(self, dtype: Any) -> np.ndarray:
        """All of the content, mapped: only the parts in use are in memory, and the system can drop them again."""
        return np.memmap(self._file, dtype, "r") if self.size else np.empty(0, dtype)

    def _no_room(self, error: OSError) -> InputError:
        return InputError(
            f"cannot keep {self._holding} in {tempfile.gettempdir()}: {error.strerror}; "
            "name a folder with more room in the environment variable TMPDIR"
        )
