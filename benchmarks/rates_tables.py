"""The tables of the rates benchmark, from the committed results."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from statistics import fmean, median

from rates_results import (
    GROWN,
    NOT_GROWN,
    PARTS,
    SEEDS,
    UNTRAINED,
    counted,
    finalists,
    grid_losses,
    judged,
    mean_loss,
    of_method,
    read,
    summary,
)
from rates_settings import BLOCK, FIRST, LATER, SETTINGS

from loraplus.study.search.grid import HALF_DECADE, Point, lr_of
from loraplus.study.statistics import t_interval

FIRST_SETTINGS = [setting for setting in SETTINGS.values() if setting.part in FIRST]
VARIANTS = ("lora-rite-tuned", "riemannian-tuned", "muon-tuned")


def variants() -> None:
    """Prints optimizers with a direction of their own, at their best rate, over tuned LoRA and tuned LoRA+."""
    for setting in SETTINGS.values():
        rows, value = read(setting.name), summary(setting)
        for method in VARIANTS if value else ():
            mine = [row for row in rows if row["method"] == method]
            first = {row["lr"]: row["eval_loss"] for row in mine if row["seed"] == SEEDS[0]}
            lr = min(first, key=lambda lr: first[lr], default=None)
            losses = [counted(rows, row["eval_loss"]) for row in mine if row["lr"] == lr]
            if value and len(losses) == len(SEEDS):
                print(f"{setting.name:30s} {method:16s} η {lr}: {fmean(losses):.4f}, / LoRA "
                      f"{fmean(losses) / value['lora']:.3f}, / grid {fmean(losses) / value['grid']:.3f}")  # fmt: skip


def table() -> None:
    """Prints all settings, the first fourteen by halves."""
    first()
    later()
    variants()
    steps()
    growth()


def growth() -> None:
    """Prints automatic runs with growth beside those without, seed by seed on the same networks."""
    print(f"\n{'setting':32s} {'part':13s} {'without':>8s} {'with':>8s}  ratio")
    ratios: dict[str, dict[str, float]] = {}
    for setting in SETTINGS.values():
        rows = read(setting.name)
        without, with_growth = mean_loss(rows, NOT_GROWN), mean_loss(rows, GROWN)
        if math.isfinite(without) and math.isfinite(with_growth):
            ratios.setdefault(setting.part, {})[setting.name] = with_growth / without
            print(
                f"{setting.name:32s} {setting.part:13s} {without:8.4f} {with_growth:8.4f}  {with_growth / without:.4f}"
            )
    for part, known in ratios.items():
        values = list(known.values())
        print(f"{part}: {len(known)} settings, mean ratio {fmean(values):.4f}, worst {max(values):.4f}")


def steps() -> None:
    """Prints the smallest part of the length, with a schedule of its own, at which auto does as tuned LoRA."""
    print(f"\n{'setting':32s} {'LoRA':>8s} " + " ".join(f"{part:8g}" for part in (*PARTS, 1)) + "  enough")
    for setting in SETTINGS.values():
        rows, full = read(setting.name), summary(setting)
        losses = {part: mean_loss(rows, f"auto-{part:g}") for part in PARTS}
        if full and math.isfinite(losses[PARTS[0]]):
            losses[1] = full["auto"]
            shown = " ".join(f"{loss:8.4f}" if math.isfinite(loss) else f"{'':8s}" for loss in losses.values())
            enough = next((f"{part:g}" for part, loss in losses.items() if loss <= full["lora"]), "none")
            print(f"{setting.name:32s} {full['lora']:8.4f} {shown}  {enough}")


def first() -> None:
    """Prints the settings that the constants were chosen on, tuned and untouched half apart."""
    for half in FIRST:
        print(f"\n{half} half")
        print(
            f"{'setting':40s} {'grid':>8s} {'η_A':>9s} {'λ':>5s} {'LoRA':>8s} {'auto':>8s} {'/grid':>7s} {'/LoRA':>7s}"
        )
        summaries = {s.name: summary(s) for s in SETTINGS.values() if s.part == half}
        done = [value for value in summaries.values() if value]
        for name, v in summaries.items():
            if v is None:
                print(f"{name:40s} runs are missing")
                continue
            print(f"{name:40s} {v['grid']:8.4f} {v['best_lr']:9.3g} {v['best_ratio']:5g} {v['lora']:8.4f} "
                  f"{v['auto']:8.4f} {v['to_grid']:7.3f} {v['to_lora']:7.3f}")  # fmt: skip
        if done:
            ratios = [v["to_grid"] for v in done]
            level = sum(v["to_lora"] <= 1 for v in done)
            print(f"{half}: auto / grid mean {fmean(ratios):.4f}, worst {max(ratios):.4f}; "
                  f"auto ≤ LoRA in {level} of {len(done)}")  # fmt: skip


def later() -> None:
    """Prints the settings that were written down before their first run, against the grid, constants and peers."""
    print(f"\n{'setting':30s} {'untrained':>9s} {'grid':>8s} {'η_A':>9s} {'λ':>5s} {'LoRA':>8s} {'auto':>8s} "
          f"{'/grid':>7s} {'/LoRA':>7s} {'/search':>8s} {'fails':>5s}")  # fmt: skip
    known: dict[str, dict[str, float]] = {}
    for part in LATER:
        print(part)
        for setting in (one for one in SETTINGS.values() if one.part == part):
            rows = read(setting.name)
            value = summary(setting)
            if value is None:
                print(f"{setting.name:30s} runs are missing")
                continue
            nothing = of_method(rows, UNTRAINED)[SEEDS[0]]
            first = grid_losses(rows)
            searched = judged(rows, min(finalists(rows), key=lambda point: first[point]))
            auto = of_method(rows, "auto")
            value["to_search"] = fmean(counted(rows, auto[seed]) for seed in SEEDS[1:]) / (searched or math.nan)
            value["fails"] = sum(not loss < nothing for loss in auto.values())
            known[setting.name] = value
            print(f"{setting.name:30s} {nothing:9.4f} {value['grid']:8.4f} {value['best_lr']:9.3g} "
                  f"{value['best_ratio']:5g} {value['lora']:8.4f} {value['auto']:8.4f} {value['to_grid']:7.3f} "
                  f"{value['to_lora']:7.3f} {value['to_search']:8.3f} {value['fails']:5.0f}")  # fmt: skip
    if known:
        for key, name in (("to_grid", "auto / grid's best"), ("to_lora", "auto / tuned LoRA"),
                          ("to_search", "auto / a search, judged on other seeds")):  # fmt: skip
            ratios = [value[key] for value in known.values()]
            print(f"{name}: mean {fmean(ratios):.4f}, median {median(ratios):.4f}, worst {max(ratios):.4f}")
        constants(known)
        peers(known)


def constants(known: Collection[str]) -> None:
    """Prints the constants (η_A, λ) that would have been best over all settings, known only afterwards, beside auto.

    All on the first seed, over the grid's best there. SGD and Lion have rates of another size, so the settings with
    AdamW stand apart, too.
    """
    for what, names in (("all", list(known)), ("AdamW", [n for n in known if SETTINGS[n].optimizer == "adamw"])):
        ratios: dict[Point, list[float]] = {point: [] for point in BLOCK}
        fails = dict.fromkeys(BLOCK, 0)
        auto = []
        for name in names:
            rows = read(name)
            losses, nothing = grid_losses(rows), of_method(rows, UNTRAINED)[SEEDS[0]]
            best = min(losses.values())
            auto.append(counted(rows, of_method(rows, "auto")[SEEDS[0]]) / best)
            for point in BLOCK:
                ratios[point].append(counted(rows, losses.get(point, math.nan)) / best)
                fails[point] += not losses.get(point, math.inf) < nothing
        print(
            f"{what} ({len(names)}), seed 0, over the grid's best: auto mean {fmean(auto):.4f}, worst {max(auto):.4f}"
        )
        for point in sorted(ratios, key=lambda point: fmean(ratios[point]))[:3]:
            print(f"  constant η_A {lr_of(point):.3g}, λ {point[0]:g}: mean {fmean(ratios[point]):.4f}, worst "
                  f"{max(ratios[point]):.4f}, fails in {fails[point]}")  # fmt: skip


def peers(known: Mapping[str, Mapping[str, float]]) -> None:
    """Prints each method that needs no search over the grid's best, and `auto` over each; settings with AdamW only."""
    print(
        f"{'method':22s} {'/grid mean':>10s} {'worst':>7s} {'fails':>5s}   auto over it, geometric mean [95%], ahead in"
    )
    methods = sorted(
        {row["method"] for name in known for row in read(name)} - {"grid", UNTRAINED, GROWN, NOT_GROWN, *VARIANTS}
    )
    for method in methods:
        over, beside, fails = [], [], 0
        for name, value in known.items():
            rows = read(name)
            losses = of_method(rows, method) if SETTINGS[name].optimizer == "adamw" else {}
            if len(losses) == len(SEEDS):
                mean = fmean(counted(rows, loss) for loss in losses.values())
                fails += sum(not loss < of_method(rows, UNTRAINED)[SEEDS[0]] for loss in losses.values())
                over.append(mean / value["grid"])
                beside.append(math.log(fmean(counted(rows, x) for x in of_method(rows, "auto").values()) / mean))
        if len(over) > 1:
            interval = t_interval(beside).through(math.exp)
            print(
                f"{method:22s} {fmean(over):10.4f} {max(over):7.3f} {fails:5d}   {interval.mean:.4f} "
                f"[{interval.low:.4f}, {interval.high:.4f}], {sum(one < 0 for one in beside)} of {len(beside)}"
            )


def arms() -> None:
    """Prints LoRA+ over LoRA: the best points of either on the first seed, judged on the others; and at one usual rate.

    The usual rate is η_A = 1e-3 for LoRA and 7.9e-4 with λ = 16 for LoRA+, on the first seed. Last, one λ held and η_A
    tuned, against λ = 1 tuned, both on the first seed.
    """
    tuned: dict[str, float] = {}
    untuned: dict[str, float] = {}
    held: dict[float, dict[str, float]] = {4.0: {}, 16.0: {}}
    print(f"{'setting':40s} {'LoRA':>8s} {'LoRA+':>8s} {'λ':>5s} {'ratio':>7s} {'untuned':>8s}")
    for setting in FIRST_SETTINGS:
        rows = read(setting.name)
        first = grid_losses(rows)
        known = {point: loss for point in first if (loss := judged(rows, point)) is not None}
        lora, plus = (
            min((p for p in known if (p[0] == 1.0) == tied), key=lambda p: first[p]) for tied in (True, False)
        )
        tuned[setting.name] = known[plus] / known[lora]
        untuned[setting.name] = first[16.0, HALF_DECADE] / first[1.0, 0]
        best_of = {ratio: min(loss for point, loss in first.items() if point[0] == ratio) for ratio in (1.0, *held)}
        for ratio, by_setting in held.items():
            by_setting[setting.name] = best_of[ratio] / best_of[1.0]
        print(f"{setting.name:40s} {known[lora]:8.4f} {known[plus]:8.4f} {plus[0]:5g} {tuned[setting.name]:7.3f} "
              f"{untuned[setting.name]:8.3f}")  # fmt: skip
    for name, ratios in {"tuned": tuned, "untuned": untuned, **{f"λ = {r:g}": one for r, one in held.items()}}.items():
        print_ratios(name, ratios)


def print_ratios(name: str, ratios: dict[str, float]) -> None:
    """Geometric means over the settings with their intervals: of all, of a kind of model, without the farthest off."""
    farthest = max(ratios, key=lambda setting: abs(math.log(ratios[setting])))
    kinds = {
        "all": list(ratios),
        "MiniLM": [setting for setting in ratios if setting.startswith("minilm")],
        "decoders": [setting for setting in ratios if not setting.startswith("minilm")],
        f"all but {farthest}": [setting for setting in ratios if setting != farthest],
    }
    for kind, settings in kinds.items():
        values = [ratios[setting] for setting in settings]
        interval = t_interval([math.log(value) for value in values]).through(math.exp)
        print(f"{name}, {kind}: LoRA+ / LoRA {interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}], median "
              f"{median(values):.4f}, largest {max(values):.4f}, below 1 in {sum(v < 1 for v in values)} of "
              f"{len(values)}")  # fmt: skip
