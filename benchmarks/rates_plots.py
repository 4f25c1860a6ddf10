"""The plots of the rates benchmark: loss over (η_A, η_B) with the automatic path on it, and regret by setting."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from rates_results import RESULTS, grid_losses, read, summary
from rates_settings import Setting
from rates_tables import FIRST_SETTINGS

from loraplus.study.search.grid import lr_of

COLUMNS = 4
WORST = 0.3  # losses more than 30% above the best share one colour


def _landscape(axes: plt.Axes, setting: Setting) -> None:
    losses = {point: loss for point, loss in grid_losses(read(setting.name)).items() if math.isfinite(loss)}
    best = min(losses.values())
    xs, ys = zip(*((lr_of(point), lr_of(point) * point[0]) for point in losses), strict=True)
    regret = [min(loss / best - 1, WORST) for loss in losses.values()]
    axes.scatter(xs, ys, c=regret, cmap="viridis_r", vmin=0, vmax=WORST, s=60, edgecolors="none")
    at = min(losses, key=lambda point: losses[point])
    axes.scatter([lr_of(at)], [lr_of(at) * at[0]], s=130, facecolors="none", edgecolors="tab:red", linewidths=1.5)
    path_file = RESULTS / f"{setting.name}-path-0.json"
    if path_file.exists():
        path = [row for row in json.loads(path_file.read_text()) if row["lr_a"] and row["lr_b"]]
        axes.plot([row["lr_a"] for row in path], [row["lr_b"] for row in path], color="black", linewidth=1)
        axes.plot(path[-1]["lr_a"], path[-1]["lr_b"], "k.", markersize=7)
    low, high = min(*xs, *ys), max(*xs, *ys)
    axes.plot([low, high], [low, high], ":", color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", title=setting.name)
    axes.title.set_fontsize(8)
    axes.tick_params(labelsize=7)


def landscapes(target: Path) -> None:
    """One panel a setting."""
    shown = [setting for setting in FIRST_SETTINGS if grid_losses(read(setting.name))]
    rows = math.ceil(len(shown) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 2.7 * rows), squeeze=False)
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    for panel, setting in zip(axes.flat, shown, strict=False):
        _landscape(panel, setting)
    figure.supxlabel("η_A", fontsize=9)
    figure.supylabel("η_B", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=90)
    plt.close(figure)


def regrets(target: Path) -> None:
    """Automatic over the best grid point and over tuned LoRA, the two halves apart."""
    summaries = [(setting, value) for setting in FIRST_SETTINGS if (value := summary(setting))]
    if not summaries:
        return
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(summaries) + 1.2))
    for i, (setting, value) in enumerate(summaries):
        colour = "tab:blue" if setting.part == "untouched" else "tab:grey"
        axes.plot([1, value["to_grid"]], [i, i], color=colour, linewidth=1)
        axes.plot(value["to_grid"], i, "o", color=colour, label="over the grid's best" if i == 0 else None)
        axes.plot(value["to_lora"], i, "x", color=colour, label="over tuned LoRA" if i == 0 else None)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(1.03, color="tab:red", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(summaries)), [f"{setting.name} ({setting.part})" for setting, _ in summaries], fontsize=8)
    axes.set_xlabel("loss of one automatic run, mean of three seeds, over …")
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(target, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent.parent / "docs" / "research"
    folder.mkdir(parents=True, exist_ok=True)
    landscapes(folder / "rates-landscapes.png")
    regrets(folder / "rates-regret.png")
