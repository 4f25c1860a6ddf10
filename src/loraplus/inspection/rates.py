"""The rates of an adapter's groups, from what lies beside it: metrics.json, optimizer.pt or loraplus.json.

A checkpoint's optimizer holds numbers for parameters, not names. LoRA+ groups carry the role in their own name; in
any other optimizer the shapes of its states tell which role a parameter has, as far as shapes differ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.checkpoints import RATES_FILE
from loraplus.files.single import read_json
from loraplus.inspection.adapter import Adapter, saved_name
from loraplus.integrations.checkpoints import OF_PARAMETERS_SHAPE
from loraplus.notices import told_once
from loraplus.rates import SETTINGS, Rates, as_number
from loraplus.roles import Role
from loraplus.tasks.pickles import load_pickle
from loraplus.tasks.sandbox import check_patterns

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
STATE_FILE, METRICS_FILE = "trainer_state.json", "metrics.json"
_GROUP_NAME = re.compile(
    rf"({'|'.join(sorted(map(re.escape, Role), key=len, reverse=True))})(?:_ratio[^_]+)?(?:_x[^_]+)?(?:_no_decay)?"
)
_NUMBERS = tuple(name for name, setting in SETTINGS.items() if "by_name" not in setting.metadata)
_BY_NAME = tuple(name for name in SETTINGS if name not in _NUMBERS)
_DAMAGED = (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError, RuntimeError)
Row = dict[str, Any]
_ROW = ("name", "role", "lr", "base_lr", "weight_decay", "tensors", "parameters")


def read_rates_file(folder: Path) -> dict[str, Any] | None:
    """loraplus.json, or None if there is none, or if it is of several models: nothing tells which the adapter is.

    Raises:
        InputError: it is damaged.
    """
    path = folder / RATES_FILE
    if not path.is_file():
        return None
    saved = read_json(path)
    if isinstance(saved, dict) and isinstance(saved.get("models"), dict):
        return None
    try:
        saved = _numbers(saved)
        _rates(saved)
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise InputError(f"{path} is damaged: it does not hold rates and roles") from None
    overrides = [saved.get(name) for name in _BY_NAME]
    check_patterns(str(path), overrides, saved.get("roles", {}))
    return saved


def _numbers(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The content of loraplus.json with every rate a float or None, and roles and automatic rates as they are read."""
    numbers = {**saved, **{name: _as_float(saved[name]) for name in _NUMBERS if name in saved}}
    numbers["roles"] = {**saved.get("roles", {})}
    automatic = numbers.pop("auto", None)
    if automatic:
        layers = {name: {**rates} for name, rates in automatic.get("layers", {}).items()}
        numbers["auto"] = {
            **{name: _as_float(automatic.get(name)) for name in ("lr_a", "lr_b")},
            "layers": {name: {key: _as_float(rate) for key, rate in rates.items()} for name, rates in layers.items()},
        }
    return numbers


def learn_roles(adapter: Adapter, saved: Mapping[str, Any] | None) -> None:
    """Corrects roles that were told from names by those that training wrote down."""
    for name, role in (saved or {}).get("roles", {}).items():
        if saved_name(name) in adapter.roles and role in list(Role):
            adapter.roles[saved_name(name)] = Role(role)


def group_rows(folder: Path, adapter: Adapter, saved: Mapping[str, Any] | None) -> tuple[list[Row], str | None]:
    """One row per group and role: name, role, lr, base_lr, weight_decay, tensors, parameters; unknown ones are None.

    Returns:
        (rows, file that the rates are from, None if there is none).

    Raises:
        InputError: a damaged file.
    """
    if (folder / OPTIMIZER_FILE).is_file():
        return _of_optimizer(folder, adapter, saved), OPTIMIZER_FILE
    if (folder / METRICS_FILE).is_file():
        rows = _of_metrics(folder / METRICS_FILE)
        if rows:
            return rows, METRICS_FILE
    return _of_roles(adapter, saved), None if saved is None else RATES_FILE


def _row(
    name: str | None, role: str | None, lr: object, base: object, decay: object, tensors: int, count: int | None
) -> Row:
    return dict(zip(_ROW, (name, role, lr, base, decay, tensors, count), strict=True))


def _of_metrics(path: Path) -> list[Row]:
    """As `loraplus train` wrote them; another program's metrics.json has none."""
    metrics = read_json(path)
    try:
        rows = metrics.get("groups", []) if isinstance(metrics, dict) else []
        forms = (str, str, _as_float, _as_float, _as_float, int, int)
        return [{name: form(row[name]) for name, form in zip(_ROW, forms, strict=True)} for row in rows]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise InputError(f"{path} does not hold the groups that `loraplus train` writes") from None


def _as_float(value: Any) -> float | None:
    if isinstance(value, (str, bool)):
        raise TypeError
    return None if value is None else float(value)


def _of_roles(adapter: Adapter, saved: Mapping[str, Any] | None) -> list[Row]:
    """Without an optimizer: the roles, and the base rates that loraplus.json says."""
    rates = _rates(saved)
    automatic = (saved or {}).get("auto", {})
    rows: dict[tuple[Any, ...], Row] = {}
    for name, role in adapter.trained().items():
        base = rates.of(role, _with_adapter(name, saved)) if rates else None
        if role in (Role.A, Role.B) and automatic:
            base = automatic.get("lr_a" if role is Role.A else "lr_b")
        row = rows.setdefault((role, base), _row(None, role.value, None, base, None, 0, 0))
        row["tensors"] += 1
        row["parameters"] += adapter.tensors.numel(name)
    return sorted(rows.values(), key=lambda row: _order(row["role"]))


def _with_adapter(name: str, saved: Mapping[str, Any] | None) -> str:
    """The parameter's name in training, which patterns of lr_overrides were matched against."""
    return next((known for known in (saved or {}).get("roles", {}) if saved_name(known) == name), name)


def _rates(saved: Mapping[str, Any] | None) -> Rates | None:
    if saved is None:
        return None
    settings: dict[str, Any] = {name: saved.get(name) for name in SETTINGS}
    with told_once(silent=True):  # of a ratio below 1 it is too late to warn
        rates = Rates(**settings)
    as_number("lr", rates.lr)  # raises: what was written down is a number
    return rates


def _of_optimizer(folder: Path, adapter: Adapter, saved: Mapping[str, Any] | None) -> list[Row]:
    path = folder / OPTIMIZER_FILE
    content = load_pickle(path)
    rows = []
    try:
        groups = content["param_groups"]
        shapes = [[_shape(content["state"].get(key)) for key in group["params"]] for group in groups]
        for index, (group, base) in enumerate(zip(groups, _bases(folder, groups), strict=True)):
            name = group.get("name")
            name = name if isinstance(name, str) else f"group {index}"  # what else it may be can be endless as text
            for role, tensors, count in _split(name, index, shapes, adapter) if group["params"] else ():
                decay = _as_float(group.get("weight_decay"))
                row = _row(name, role, float(group["lr"]), base, decay, tensors, count)
                rows.append(_automatic(row, saved) if role in (Role.A, Role.B) else row)
    except InputError:
        raise
    except _DAMAGED:
        raise InputError(f"{path} does not hold the state of a torch optimizer") from None
    return rows


def _bases(folder: Path, groups: list[Mapping[str, Any]]) -> list[float | None]:
    """What the scheduler multiplies: as the groups say, else as scheduler.pt does."""
    rates = [group.get("initial_lr") for group in groups]
    if None in rates and (folder / SCHEDULER_FILE).is_file():
        scheduler = load_pickle(folder / SCHEDULER_FILE)
        bases = scheduler.get("base_lrs") if isinstance(scheduler, dict) else None
        if isinstance(bases, list) and len(bases) == len(groups):
            rates = bases
    return [_as_float(value) for value in rates]


def _automatic(row: Row, saved: Mapping[str, Any] | None) -> Row:
    """A group's automatic rates, which are saved beside the optimizer; its own rates have the schedule in them."""
    automatic = (saved or {}).get("auto")
    if not automatic:
        return row
    base = automatic.get("lr_a" if row["role"] == Role.A else "lr_b")
    scheduled = row["lr"] / row["base_lr"] if row["base_lr"] else 1.0
    return {**row, "lr": None if base is None else base * scheduled, "base_lr": base}


def _shape(state: object) -> tuple[int, ...] | None:
    for key in OF_PARAMETERS_SHAPE:
        if isinstance(state, Mapping) and hasattr(state.get(key), "shape"):
            return tuple(state[key].shape)
    return None


def _split(
    name: str, index: int, shapes: list[list[tuple[int, ...] | None]], adapter: Adapter
) -> list[tuple[str | None, int, int | None]]:
    """(role, tensors, parameters) for each role in a group; roles that cannot be told apart are one "a or b"."""
    roles_of: dict[tuple[int, ...] | None, Counter[Role]] = {}
    for tensor, role in adapter.trained().items():
        roles_of.setdefault(adapter.tensors.shapes[tensor], Counter())[role] += 1
    here = shapes[index]
    named = _GROUP_NAME.fullmatch(name)
    if named:
        own = [adapter.tensors.numel(tensor) for tensor, role in adapter.trained().items() if role == named[1]]
        known = [math.prod(shape) for shape in here if shape is not None]
        sizes = known if len(known) == len(here) else own  # some optimizers keep no state of a parameter's shape
        return [(named[1], len(here), sum(sizes) if len(sizes) == len(here) else None)]
    if None in here:
        return [(None, len(here), None)]
    counts: dict[str | None, tuple[int, int]] = {}
    for shape, number in Counter(here).items():
        roles = roles_of.get(shape, Counter())
        whole = sum(group.count(shape) for group in shapes) == number == roles.total()
        parts = roles.items() if whole else [(" or ".join(sorted(roles)) or None, number)]
        for role, part in parts:
            tensors, count = counts.get(role, (0, 0))
            counts[role] = tensors + part, count + part * math.prod(shape or ())
    return [(role, *counts[role]) for role in sorted(counts, key=_order)]


def _order(role: str | None) -> int:
    return [*Role].index(Role(role)) if role in set(Role) else len(Role)
