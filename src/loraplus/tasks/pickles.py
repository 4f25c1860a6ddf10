"""Files that torch wrote: tensors and plain values, read without running anything in them."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from loraplus.errors import InputError


def load_pickle(path: Path) -> Any:
    """What torch wrote, tensors mapped rather than read; nothing in the file is executed.

    Raises:
        InputError: it cannot be read, is damaged, or holds more than tensors and plain values.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write; that it says below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise InputError(f"cannot read {path}: permission denied") from None
    except Exception:  # a changed opcode fails as whatever the next one makes of it
        raise InputError(f"cannot read {path}: damaged, or no file of tensors that torch wrote") from None


def check_archive(path: Path) -> None:
    """Refuses a compressed archive: torch never writes one, and a small one may unpack to far more than memory holds.

    Raises:
        InputError: it does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # torch's own reading says what is wrong with it
        return
    if packed:
        raise InputError(f"{path} is compressed, which torch never does; it is no file of tensors")


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor (…) has memory for every number of its shape: strides can make one number count many times."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
