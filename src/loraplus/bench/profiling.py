"""Where the time of one step goes: the costliest kernels on a GPU, the costliest operators on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def costliest(step: Callable[[], object], device: torch.device, rows: int = 12) -> list[dict[str, Any]]:
    """Profiles one call.

    Args:
        step: Has run before, so that nothing is set up in it.
        device: Of the model.
        rows: How many of them.

    Returns:
        [{"name", "ms", "calls"}], the sum of all first. Time within an operator that another one calls is the latter's.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    cost = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    where = "CUDA" if on_gpu else "CPU"
    events: list[Any] = [e for e in record.key_averages() if e.device_type.name == where and getattr(e, cost) > 0]
    events = [e for e in events if not e.is_user_annotation]  # spans over kernels that are counted themselves
    events.sort(key=lambda e: -getattr(e, cost))
    total = {"name": "all", "ms": sum(getattr(e, cost) for e in events) / 1e3, "calls": sum(e.count for e in events)}
    return [total, *({"name": e.key[:90], "ms": getattr(e, cost) / 1e3, "calls": e.count} for e in events[:rows])]


def profile_lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A profile as lines of Markdown."""
    lines = ["", f"{name}, one step:", "", "| what | ms | calls |", "|---|---|---|"]
    return [*lines, *(f"| `{row['name']}` | {row['ms']:.2f} | {row['calls']} |" for row in rows)]
