"""The rates that a checkpoint's groups had, read from its files: adapter, optimizer.pt, trainer_state.json.

No model is loaded, and nothing in the files is run. What a step did cannot be read off a checkpoint; what the groups
said can.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplus.diagnosis.beside_factors import beside_factors
from loraplus.diagnosis.diagnosis import NEAR, Diagnosis, OptimizerSeen, Pair, ParameterStep, named, number, some
from loraplus.diagnosis.ratio import Expected, judge_ratio
from loraplus.errors import InputError
from loraplus.files.paths import user_path
from loraplus.files.single import read_json
from loraplus.inspection.adapter import CONFIG_FILE, Adapter
from loraplus.inspection.rates import OPTIMIZER_FILE, STATE_FILE, Row, group_rows, learn_roles, read_rates_file
from loraplus.parts import Role
from loraplus.tasks.pickles import load_pickle


def diagnose_checkpoint(path: str, *, lr_ratio: float | None = None) -> Diagnosis:
    """Says what rates a checkpoint's optimizer gave to what the adapter trains.

    Args:
        path: a folder with an adapter and optimizer.pt, as transformers' Trainer writes; or one with several of these
            as checkpoint-N, of which the newest is taken.
        lr_ratio: λ that it should have; None: what loraplus.json in it says, else whatever it is.

    Raises:
        InputError: no adapter or no optimizer.pt, a damaged file, or a λ to hold it to and no telling what it has.
    """
    folder = _newest(user_path(path))
    for name, what in ((CONFIG_FILE, "no adapter"), (OPTIMIZER_FILE, "no optimizer")):
        if not (folder / name).is_file():
            raise InputError(
                f"{path}: {what} in it ({name} is missing); give a checkpoint-N folder that a trainer wrote, or "
                "run the script itself: loraplus doctor -- python train.py …"
            )
    adapter, saved = Adapter(folder), read_rates_file(folder)
    learn_roles(adapter, saved)
    rows, _ = group_rows(folder, adapter, saved)
    content = load_pickle(folder / OPTIMIZER_FILE)
    groups = [
        {"name": str(g.get("name", f"group {i}")), "lr": g.get("lr"), "weight_decay": g.get("weight_decay"),
         "tensors": len(g["params"])}
        for i, g in enumerate(content["param_groups"])
    ]  # fmt: skip
    entries = list(_entries(adapter, rows))
    pairs = _pairs(adapter, rows)
    expected = _expected(saved, lr_ratio)
    problems = [
        *_not_held(adapter, groups),
        *judge_ratio(pairs, expected, lambda pair: _why(rows)),
        *_schedule(rows),
        *_logged(folder),
        *beside_factors(entries, pairs, asked_by_name=saved is not None),
        *_decay(rows),
    ]
    empty = [str(group["name"]) for group in groups if not group["tensors"]]
    notes = [f"{len(empty)} of {some(len(groups), 'group')} are empty ({named(empty)})"] if empty else []
    if not pairs:
        unknown = "the shapes of the optimizer's states do not tell A from B, so λ is not known"
        if lr_ratio is not None:
            raise InputError(f"{path}: {unknown}; run the script itself: loraplus doctor -- python train.py …")
        notes.append(unknown)
        pairs = [Pair(pair.name, None, None) for pair in adapter.pairs if not pair.is_embedding]
    notes.append("these are the rates of the groups; what a step makes of them, only a run of the script shows")
    seen = (OptimizerSeen("optimizer of the checkpoint", 0, tuple(groups)),)
    return Diagnosis(str(folder), tuple(entries), tuple(pairs), seen, tuple(problems), tuple(notes))


def _newest(folder: Path) -> Path:
    """The folder itself, or the newest checkpoint-N in it that has an optimizer."""
    inside = [path for path in folder.glob("checkpoint-*") if (path / OPTIMIZER_FILE).is_file()]
    numbered = [path for path in inside if path.name.rpartition("-")[2].isdecimal()]
    if (folder / OPTIMIZER_FILE).is_file() or not numbered:
        return folder
    return max(numbered, key=lambda path: int(path.name.rpartition("-")[2]))


def _expected(saved: Mapping[str, Any] | None, lr_ratio: float | None) -> Expected:
    if lr_ratio is not None:
        return Expected(lr_ratio, "was asked for")
    saved = saved or {}
    if saved.get("lr_ratio") is not None and "auto" not in saved and not saved.get("lr_ratio_overrides"):
        return Expected(float(saved["lr_ratio"]), "its loraplus.json says")
    return Expected()


def _rate(row: Row) -> float | None:
    """A group's rate before the schedule, which may have come down to 0 by now."""
    return row["base_lr"] if row["base_lr"] is not None else row["lr"]


def _rows_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """{role: rows of it}; rows that may be of several roles are of each."""
    by_role: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for role in (row["role"] or "").split(" or "):
            by_role[role].append(row)
    return by_role


def _entries(adapter: Adapter, rows: Sequence[Row]) -> Iterator[ParameterStep]:
    by_role = _rows_of(rows)
    for name, role in adapter.trained().items():
        mine = by_role.get(role, [])
        row = mine[0] if len({(_rate(row), row["weight_decay"]) for row in mine}) == 1 else None
        group = None if row is None else row["name"]
        lr, decay = (None, None) if row is None else (_rate(row), row["weight_decay"])
        count = adapter.tensors.numel(name)
        yield ParameterStep(name, role, "optimizer", group or "(not known)", lr, lr, decay, count, measured=False)


def _pairs(adapter: Adapter, rows: Sequence[Row]) -> list[Pair]:
    by_role = _rows_of(rows)
    rates = {role: {_rate(row) for row in by_role.get(role, [])} for role in (Role.A, Role.B)}
    if any(len(of_role) != 1 for of_role in rates.values()):
        return []
    of_a, of_b = (next(iter(rates[role])) for role in (Role.A, Role.B))
    return [Pair(pair.name, of_a, of_b) for pair in adapter.pairs if not pair.is_embedding]


def _why(rows: Sequence[Row]) -> str:
    by_role = _rows_of(rows)
    groups = {role: {row["name"] for row in by_role.get(role, [])} for role in (Role.A, Role.B)}
    if groups[Role.A] == groups[Role.B] and len(groups[Role.A]) == 1:
        return f"A and B are in one group ({groups[Role.A].pop()}); give each its own, as loraplus.attach does"
    return "its optimizer was built, or scheduled, with these rates"


def _not_held(adapter: Adapter, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    held, trained = sum(group["tensors"] for group in groups), len(adapter.trained())
    if held < trained:
        yield (
            f"the optimizer holds {held} of the {some(trained, 'tensor')} that the adapter trains, so the rest does "
            "not learn; build it after the adapter is on the model, from all parameters that require gradients"
        )


def _schedule(rows: Sequence[Row]) -> Iterator[str]:
    """Rates of now that are not in the ratio of the base rates."""
    by_role = _rows_of(rows)
    first = {role: by_role[role][0] for role in (Role.A, Role.B) if by_role.get(role)}
    if len(first) == 2 and all(row["lr"] and row["base_lr"] for row in first.values()):
        now, base = (first[Role.B][key] / first[Role.A][key] for key in ("lr", "base_lr"))
        if not math.isclose(now, base, rel_tol=NEAR):
            yield (
                f"λ is {now:.3g} at this step and was {base:.3g} when the scheduler began: the schedule does not "
                "multiply each group's own rate; use one that does, as torch's LambdaLR"
            )


def _logged(folder: Path) -> Iterator[str]:
    """λ in the logs, where each group's rate was logged by name."""
    if not (folder / STATE_FILE).is_file():
        return
    content = read_json(folder / STATE_FILE)
    history = content.get("log_history", []) if isinstance(content, dict) else []
    ratios = []
    for entry in history if isinstance(history, list) else []:
        a, b = (entry.get(f"lr/{role}") for role in (Role.A, Role.B)) if isinstance(entry, dict) else (None, None)
        if isinstance(a, (int, float)) and isinstance(b, (int, float)) and a > 0:
            ratios.append((b / a, entry.get("step")))
    off = next((each for each in ratios if not math.isclose(each[0], ratios[0][0], rel_tol=NEAR)), None)
    if off:
        yield f"by the logs, λ changed from {ratios[0][0]:.3g} to {off[0]:.3g} by step {off[1]}; see {STATE_FILE}"


def _decay(rows: Sequence[Row]) -> Iterator[str]:
    by_role = _rows_of(rows)
    decays = {role: {row["weight_decay"] for row in by_role.get(role, [])} for role in (Role.A, Role.B)}
    if all(len(of_role) == 1 for of_role in decays.values()) and decays[Role.A] != decays[Role.B]:
        of_a, of_b = (number(next(iter(decays[role]))) for role in (Role.A, Role.B))
        yield f"A decays at {of_a} and B at {of_b}; weight decay is meant for both, or for neither"
