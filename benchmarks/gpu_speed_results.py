"""What the results of gpu_speed.py say: ours against PEFT's best configuration, and a table."""

from __future__ import annotations

from typing import Any

from loraplus.bench.machine import in_words
from loraplus.bench.profiling import profile_lines
from loraplus.bench.timing import ratio


def conclude(results: dict[str, Any]) -> None:
    """Ours against the fastest and the leanest of PEFT's configurations, within each phase."""
    for phase, timed in results["phases"].items():
        arms = results["arms"]
        references = [name for name in timed if arms[name]["reference"]]
        rows = {}
        for ours in (name for name in timed if arms[name]["ours"]):
            if not references:
                break
            best = min(references, key=lambda name: timed[name]["median"])
            rows[ours] = {
                "against": best,
                "times_faster": ratio(timed[best]["rounds"], timed[ours]["rounds"]).to_dict(),
                "memory_ratio": divided(arms[ours].get("peak_over_idle_mib"), arms[best].get("peak_over_idle_mib")),
            }
        results.setdefault("conclusions", {})[phase] = rows


def divided(a: float | None, b: float | None) -> float | None:
    return round(a / b, 4) if a and b else None


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"{results['settings']} · {in_words(results['machine'])}", "",
        "| arm | ms a step (quartiles) | peak over idle, MiB | gradients against float32 |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, arm in results["arms"].items():
        timed = [phase[name] for phase in results["phases"].values() if name in phase]
        step = ", again ".join(
            f"{1e3 * t['median']:.1f} ({1e3 * t['quartile_1']:.1f}–{1e3 * t['quartile_3']:.1f})" for t in timed
        )
        memory = f"{arm['peak_over_idle_mib']:.0f}" if "peak_over_idle_mib" in arm else "–"
        error = f"{arm['gradient_error']:.2e}" if "gradient_error" in arm else "–"
        lines.append(f"| {name} | {step or results['errors'].get(name, '–')[:80]} | {memory} | {error} |")
    for phase, rows in results.get("conclusions", {}).items():
        for ours, row in rows.items():
            faster = row["times_faster"]
            memory = f", {row['memory_ratio']:.2f} × its memory" if row["memory_ratio"] else ""
            lines.append(
                f"\n{phase}: {ours} is {faster['ratio']:.2f} [{faster['low']:.2f}, {faster['high']:.2f}] times as fast "
                f"as {row['against']}{memory}."
            )
    for name, arm in results["arms"].items():
        if "kernels" in arm:
            lines += profile_lines(name, arm["kernels"])
    return "\n".join(lines)
