"""What a checkpoint says of its rates, and the refusal to go on at others; shared by all stacks."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraplus.adapters.partners import whole_shape
from loraplus.auto import AutoRates
from loraplus.errors import ResumeMismatchError
from loraplus.files.checkpoints import AUTO_FILE, RATES_FILE
from loraplus.files.whole import write_whole
from loraplus.groups import ParameterRate, built_rates
from loraplus.notices import told_once
from loraplus.rates import OWN_RATES, SETTING_OF_ROLE, Rates
from loraplus.roles import FACTORS, Role, trainable_parameters
from loraplus.steps.wrappers import unwrapped

OF_PARAMETERS_SHAPE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "state1")
"""Names of an optimizer's states that have their parameter's own shape."""
_FORMAT_VERSION = 1
_RELATIVE_TOLERANCE = 1e-6
_TRAINER_WAY = (
    "or start a new run from its weights: load them with PeftModel.from_pretrained(model, {checkpoint!r}, "
    "is_trainable=True) and train without resume_from_checkpoint"
)
LOOP_WAY = "or start a new run: load the model's weights alone from it, and no state of the optimizer or scheduler"


def rates_in_use(model: nn.Module, optimizer: torch.optim.Optimizer) -> Rates:
    """The rates that an optimizer was built with, read off its groups before a checkpoint is loaded into it.

    Args:
        model: whose parameters have roles, wrapped or not.
        optimizer: whoever built it, wrapped or not.

    Returns:
        Base rates, those that a scheduler multiplies; a parameter whose rate is not its role's has an override of its
        own. With `AutoRates` lr_ratio is 1, as it sets A's and B's.
    """
    entries = [entry for entry in built_rates(model, optimizer).entries if entry.base_lr]
    of_role: dict[str, float] = {}
    for entry in entries:
        of_role.setdefault(entry.role, entry.base_lr or 0.0)
    lr = of_role.get(Role.A) or of_role[entries[0].role]
    automatic = auto_rates(optimizer, model) is not None
    ratio = 1.0 if automatic else _rounded(of_role.get(Role.B, lr) / lr)
    own: dict[str, Any] = {}
    for role, setting in SETTING_OF_ROLE.items():
        if role in of_role:
            own.setdefault(setting, of_role[role])
    with told_once(silent=True):  # a ratio below 1 was warned of when the optimizer was built
        plain = Rates(lr, ratio, **own)
        return plain if automatic else replace(plain, lr_overrides=_overrides(entries, plain))


def _overrides(entries: list[ParameterRate], rates: Rates) -> dict[str, float]:
    factors = {entry.name: _rounded((entry.base_lr or 0.0) / rates.of(Role(entry.role))) for entry in entries}
    return {f"^{re.escape(name)}$": factor for name, factor in factors.items() if factor != 1}


def _rounded(ratio: float) -> float:
    """16.0 for 16.000000000000004: the same ratio, whatever lr it was multiplied with."""
    return float(f"{ratio:.9g}")


def all_auto_rates(optimizer: Any) -> list[AutoRates]:
    """Every `AutoRates` installed on an optimizer, wrapped or not: one for each of its models, or none."""
    optimizer = unwrapped(optimizer)
    first = getattr(optimizer, "loraplus_auto", None)
    return list(getattr(optimizer, "loraplus_autos", [] if first is None else [first]))


def auto_rates(optimizer: Any, model: nn.Module | None = None) -> AutoRates | None:
    """The `AutoRates` installed on an optimizer for a model, or for any."""
    return next((auto for auto in all_auto_rates(optimizer) if model is None or auto.is_for(model)), None)


def rates_record(rates: Rates, model: nn.Module, auto: AutoRates | None = None) -> dict[str, Any]:
    """The content of loraplus.json: the rates, every parameter's role, factors' shapes, where automatic rates are.

    Made once, with the optimizer: what is merged, frozen or disabled later had these rates, and is saved with them.

    Args:
        rates: that the optimizer's groups were built with.
        model: whose parameters have roles.
        auto: what sets η_A and η_B, if anything does.
    """
    return {
        "format_version": _FORMAT_VERSION,
        **asdict(rates),
        "lr_ratio": float(rates.lr_ratio),  # no class of ours in what torch pickles
        **({} if auto is None else {"auto": auto.summary()}),
        "roles": roles_of(model),
        "shapes": shapes_of(model),
    }


@told_once(silent=True)
def roles_of(model: nn.Module) -> dict[str, str]:
    """{name of a trainable parameter: its role}, as a record holds them."""
    return {entry.name: entry.role.value for entry in trainable_parameters(model)}


@told_once(silent=True)
def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """{name of a factor that trains: its shape, sharded or not}, where it is known."""
    factors = [entry for entry in trainable_parameters(model) if entry.role in FACTORS]
    shapes = {entry.name: whole_shape(entry.parameter) for entry in factors}
    return {name: list(shape) for name, shape in shapes.items() if shape is not None}


def up_to_date(record: Mapping[str, Any], auto: AutoRates | None) -> dict[str, Any]:
    """A record with what automatic rates have arrived at by now; it needs no model."""
    return {**record, **({} if auto is None else {"auto": auto.summary()})}


def write_rates(folder: Path, record: Mapping[str, Any], auto: AutoRates | None = None) -> None:
    """Writes a `rates_record` to loraplus.json in a folder, which is made if it does not exist.

    Args:
        folder: of the checkpoint.
        record: made when the optimizer was.
        auto: what sets η_A and η_B, for what they are by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RATES_FILE, (json.dumps(up_to_date(record, auto), indent=1) + "\n").encode())


def write_auto_state(folder: Path, auto: AutoRates) -> None:
    """Writes what automatic rates need to go on, beside the optimizer's state."""
    content = io.BytesIO()
    torch.save(auto.state_dict(), content)
    write_whole(folder / AUTO_FILE, content.getvalue())


def read_auto_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_auto_state` wrote.

    Raises:
        ResumeMismatchError: the file is missing or damaged.
    """
    try:
        return torch.load(folder / AUTO_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle have many errors for a damaged file
        raise ResumeMismatchError(
            f"{folder / AUTO_FILE} cannot be read ({type(error).__name__}), so automatic rates cannot go on; "
            "resume from an earlier checkpoint"
        ) from None


def check_resume(
    checkpoint: Path,
    rates: Rates,
    *,
    auto: bool = False,
    roles: Mapping[str, str] | None = None,
    shapes: Mapping[str, Any] | None = None,
    instead: str = _TRAINER_WAY,
) -> None:
    """Refuses a checkpoint folder whose optimizer was not made with these rates, over these parameters.

    The optimizer and scheduler states hold the old rates, so torch would go on with them in silence.

    Args:
        checkpoint: a folder with a loraplus.json.
        rates: what this run asks for.
        auto: whether it asks for automatic rates.
        roles: `roles_of` the model that it trains; None compares the rates only.
        shapes: `shapes_of` it.
        instead: what else the user can do, as the end of a sentence.

    Raises:
        ResumeMismatchError: another lr, ratio or rate of a role, other parameters, a checkpoint without LoRA+, or a
            damaged one.
    """
    instead = instead.format(checkpoint=str(checkpoint))
    saved = read_record(checkpoint, instead)
    missing = f"has no {RATES_FILE}"
    check_record(saved, rates, str(checkpoint), instead, auto=auto, roles=roles, shapes=shapes, missing=missing)


def read_record(checkpoint: Path, instead: str) -> dict[str, Any] | None:
    """loraplus.json of a checkpoint folder, None if it has none.

    Raises:
        ResumeMismatchError: it is damaged.
    """
    try:
        saved = json.loads((checkpoint / RATES_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict):
        raise ResumeMismatchError(
            f"{checkpoint / RATES_FILE} cannot be read, so the rates of the checkpoint are not known; resume from an "
            f"earlier checkpoint, {instead}"
        )
    return saved


def check_record(
    saved: Mapping[str, Any] | None,
    rates: Rates,
    where: str,
    instead: str,
    *,
    auto: bool = False,
    roles: Mapping[str, str] | None = None,
    shapes: Mapping[str, Any] | None = None,
    missing: str = "has no record of its rates",
) -> None:
    """Compares a `rates_record` with what this run asks for; `check_resume` for checkpoints of any form.

    Raises:
        ResumeMismatchError: they differ, or there is no record.
    """
    if saved is None:
        raise ResumeMismatchError(
            f"{where} {missing}: it was not trained with LoRA+, and its optimizer has other groups; "
            f"resume it with the trainer that wrote it, {instead}"
        )
    if auto != ("auto" in saved):
        was, asks = ("automatic rates", "rates given as numbers")[:: -1 if auto else 1]
        raise ResumeMismatchError(
            f"{where} was trained with {was}, this run asks for {asks}; resume with {was}, {instead}"
        )
    known = saved.get("roles")
    check_parameters(saved, roles, shapes, where, instead)
    for name, value in asdict(rates).items():
        # A setting that this version has and the one that wrote the checkpoint did not was not in use, nor was one that
        # reached no parameter.
        if _same(saved.get(name) or None, value or None) or (name == "lr" and auto and not _learns_at_lr(saved)):
            continue
        if value is None and isinstance(known, Mapping) and _reaches_nothing(name, known):
            continue
        before = saved.get(name)
        if isinstance(value, Mapping):  # by name of a parameter, so there may be hundreds
            name, before, value = _first_difference(name, before or {}, value)
        raise ResumeMismatchError(
            f"{where} was trained with {name} = {before}, this run asks for {value}; resume with {name} = {before}, "
            f"{instead}"
        )


def check_parameters(
    saved: Mapping[str, Any],
    roles: Mapping[str, str] | None,
    shapes: Mapping[str, Any] | None,
    where: str,
    instead: str,
) -> None:
    """Compares the parameters of a `rates_record` with this run's; older records have no shapes, or not even roles.

    Raises:
        ResumeMismatchError: they differ.
    """
    known, sizes = saved.get("roles"), saved.get("shapes")
    if roles is not None and isinstance(known, Mapping):
        refuse_other_parameters(_places_of_factors(known), _places_of_factors(roles), where, instead)
        if shapes is not None and isinstance(sizes, Mapping):
            _refuse_other_shapes(sizes, shapes, known, where, instead)


def _refuse_other_shapes(
    saved: Mapping[str, Any], shapes: Mapping[str, Any], roles: Mapping[str, str], where: str, instead: str
) -> None:
    wrong = [name for name in saved if name in shapes and [*saved[name]] != [*shapes[name]]]
    if not wrong:
        return
    name = wrong[0]
    there, here = saved[name], shapes[name]
    sizes = " and ".join(f"{' × '.join(map(str, shape))} {at}" for shape, at in ((there, "there"), (here, "here")))
    side = 0 if roles.get(name) in (Role.A, Role.EMBEDDING_A) else 1  # of B A x, where the two meet
    differs = [i for i, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]]
    of_rank = len(there) == len(here) and differs == [side]
    what = f"rank was {there[side]} there, {here[side]} here" if of_rank else "the shape is another"
    raise ResumeMismatchError(
        f"{where} was trained with other factors: {what} (first of {len(wrong)}: {name}, {sizes}); resume with the "
        f"rank and model that it was trained with, {instead}"
    )


def refuse_other_parameters(saved: Mapping[str, str], roles: Mapping[str, str], where: str, instead: str) -> None:
    """Refuses other layers, another adapter's name, a factor that is frozen now or was then.

    Args:
        saved: {name of a parameter: its role or group} of a checkpoint.
        roles: the same of this run.
        where: the checkpoint, as the start of a sentence.
        instead: what else the user can do, as its end.

    Raises:
        ResumeMismatchError: says how many differ, and names the first.
    """
    gone, new = [name for name in saved if name not in roles], [name for name in roles if name not in saved]
    changed = [name for name in saved if saved[name] != roles.get(name, saved[name])]
    differences = []
    if gone:
        differences.append(f"{len(gone)} of its {len(saved)} are not trained by this run (first: {gone[0]})")
    if new:
        differences.append(f"{len(new)} of this run's {len(roles)} are not among them (first: {new[0]})")
    if changed:
        name = changed[0]
        differences.append(
            f"{len(changed)} have another place (first: {name}, {saved[name]} there and {roles[name]} here)"
        )
    if differences:
        raise ResumeMismatchError(
            f"{where} was trained with other parameters: {', '.join(differences)}; resume with the adapter, target "
            f"modules and frozen parameters that it was trained with, {instead}"
        )


def _same(saved: Any, value: Any) -> bool:
    """Of rates, up to the rounding of a rate that was kept in single precision."""
    if isinstance(saved, float) and isinstance(value, float):
        return math.isclose(saved, value, rel_tol=_RELATIVE_TOLERANCE)
    if isinstance(saved, Mapping) and isinstance(value, Mapping):
        return saved.keys() == value.keys() and all(_same(saved[key], value[key]) for key in saved)
    return saved == value


def _first_difference(name: str, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """(name of a setting and of the first pattern that differs, its value there, its value here)."""
    pattern = next(key for key in {**saved, **asked} if not _same(saved.get(key), asked.get(key)))
    return f"{name}[{pattern!r}]", saved.get(pattern), asked.get(pattern)


def _places_of_factors(roles: Mapping[str, str]) -> dict[str, str]:
    """Roles as they are compared: only A's and B's decide a rate that no setting names."""
    return {name: role if role in (Role.A, Role.B) else "another role" for name, role in roles.items()}


def _reaches_nothing(name: str, roles: Mapping[str, str]) -> bool:
    """Whether a rate of its own had no parameter to set."""
    return name in OWN_RATES and not OWN_RATES[name].metadata["roles"] & set(roles.values())


def _learns_at_lr(saved: Mapping[str, Any]) -> bool:
    """Whether a parameter learns at lr itself where A's and B's rates are automatic: a head without lr_head, say."""
    roles = set(saved.get("roles", {}).values()) - {Role.A.value, Role.B.value}
    return any(not saved.get(SETTING_OF_ROLE.get(role, "")) for role in roles)
