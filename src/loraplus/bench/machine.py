"""Describes the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "loraplus")


def machine() -> dict[str, Any]:
    """The processor, its cores and threads, memory, accelerator, and the versions of what runs."""
    import torch

    about: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: installed for name in LIBRARIES if (installed := _version(name))},
    }
    with suppress(OSError, AttributeError):
        about["load_at_start"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["accelerator"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return about


def in_words(about: dict[str, Any]) -> str:
    """One line about the machine."""
    if "accelerator" in about:
        parts = [about["accelerator"]["name"]]
    else:
        parts = [f"{about['processor']}, {about['cores']} cores, {about['threads']} threads"]
    return " · ".join([*parts, *(f"{name} {installed}" for name, installed in about["versions"].items())])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    with suppress(OSError, ValueError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
