"""The results of a comparison as rows of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplus.bench.machine import in_words
from loraplus.bench.profiling import profile_lines

_NONE = "–"
HEADS = ("arm", "a second", "ms a step (quartiles)", "memory over idle", "share of the floor")
Cells = tuple[str, ...]


def machine_line(result: Mapping[str, Any]) -> str:
    """What it was measured on."""
    return in_words(dict(result["machine"]))


def arm_cells(row: Mapping[str, Any]) -> list[Cells]:
    """One line of cells an arm, under `HEADS`."""
    return [_cells(name, arm, row["unit"]) for name, arm in row["arms"].items()]


def _cells(name: str, arm: Mapping[str, Any], unit: str) -> Cells:
    if "failed" in arm:
        return (name, "does not run", str(arm["failed"]), _NONE, _NONE)
    step = arm["seconds_a_step"]
    memory, share = arm.get("memory_over_idle_mib"), arm.get("share_of_floor")
    return (
        name,
        f"{arm[f'{unit}_a_second']:,.0f} {unit}",
        f"{1e3 * step['median']:.1f} ({1e3 * step['quartile_1']:.1f}–{1e3 * step['quartile_3']:.1f})",
        _NONE if memory is None else f"{memory:,.0f} MiB",
        _NONE if share is None else f"{100 * share['ratio']:.0f}%",
    )


def findings(row: Mapping[str, Any]) -> list[str]:
    """What a row says, in sentences."""
    lines = []
    for name, ratio in row["ratios"].items():
        if name == "lambda":
            lines.append(f"time a step at λ = 16 against λ = 1: {_interval(ratio)}")
            continue
        memory = f", {ratio['memory']:.2f} × its memory over the idle model" if "memory" in ratio else ""
        lines.append(f"{_interval(ratio)} times as fast as {ratio['against']}{memory}")
    gradients = row.get("gradient_error", {})
    if "ours" in gradients:
        lines.append(
            f"gradients against float64: ours {gradients['ours']:.2e}, PEFT's {gradients['peft']:.2e} "
            f"({gradients['ratio']:.2f} ×)"
        )
    if "failed" in gradients:
        lines.append(f"gradients against float64: not measured ({gradients['failed']})")
    missing = {arm["memory"] for arm in row["arms"].values() if "memory" in arm}
    return [*lines, *(f"memory {why}" for why in sorted(missing))]


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def about(row: Mapping[str, Any]) -> str:
    """The row's title, and what a turn of it was."""
    return (
        f"{row['title']} (batches of {row['batch_size']}; a turn is {row['examples_a_turn']} texts, "
        f"{row['tokens_a_turn']:,} tokens)"
    )


def bars(row: Mapping[str, Any], width: int = 36) -> list[tuple[str, str, str]]:
    """(arm, bar, figure) of every arm that ran, the fastest arm's bar `width` long."""
    rates = {name: arm[f"{row['unit']}_a_second"] for name, arm in row["arms"].items() if "failed" not in arm}
    most = max(rates.values(), default=1.0)
    return [(name, "█" * max(1, round(width * rate / most)), f"{rate:,.0f}") for name, rate in rates.items()]


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result."""
    lines = [machine_line(result), ""]
    for row in result["rows"]:
        lines += [f"**{about(row)}**", "", _line(HEADS), _line(["---"] * len(HEADS))]
        lines += [*map(_line, arm_cells(row)), "", *(f"* {finding}" for finding in findings(row)), ""]
        for name, arm in row["arms"].items():
            if "profile" in arm:
                lines += [*profile_lines(name, arm["profile"])[1:], ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
