"""What a checkpoint says of its rates, and the refusal to go on at others."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraplus.auto import AutoRates
from loraplus.errors import LoraPlusWarning, ResumeMismatchError
from loraplus.rates import Rates
from loraplus.roles import trainable_parameters

RATES_FILE = "loraplus.json"
AUTO_FILE = "loraplus_auto.pt"
_FORMAT_VERSION = 1


def write_rates(folder: Path, rates: Rates, model: nn.Module, auto: AutoRates | None = None) -> None:
    """Writes loraplus.json: the rates, the role of every parameter, and what automatic rates have arrived at.

    Args:
        folder: made if it does not exist.
        rates: that the optimizer's groups were built with.
        model: whose parameters have roles.
        auto: what sets η_A and η_B, if anything does.
    """
    content = {
        "format_version": _FORMAT_VERSION,
        **asdict(rates),
        **({} if auto is None else {"auto": auto.summary()}),
        "roles": {entry.name: entry.role.value for entry in trainable_parameters(model)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (RATES_FILE + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / RATES_FILE)


def write_auto_state(folder: Path, auto: AutoRates) -> None:
    """Writes what automatic rates need to go on, beside the optimizer's state."""
    temporary = folder / (AUTO_FILE + ".tmp")
    torch.save(auto.state_dict(), temporary)
    temporary.replace(folder / AUTO_FILE)


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


def check_resume(checkpoint: Path, rates: Rates, *, auto: bool = False) -> None:
    """Refuses a checkpoint whose optimizer was not made with these rates.

    The optimizer and scheduler states hold the old rates, so torch would go on with them in silence.

    Args:
        checkpoint: a folder that a Trainer wrote.
        rates: what this run asks for.
        auto: whether it asks for automatic rates.

    Raises:
        ResumeMismatchError: another ratio or another rate of a role, a checkpoint without LoRA+, or a damaged one.
    """
    instead = (
        "or start a new run from its weights: load them with "
        f"PeftModel.from_pretrained(model, {str(checkpoint)!r}, is_trainable=True) and train without "
        "resume_from_checkpoint"
    )
    try:
        saved = json.loads((checkpoint / RATES_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResumeMismatchError(
            f"{checkpoint} has no {RATES_FILE}: it was not trained with LoRA+, and its optimizer has other groups; "
            f"resume it with the trainer that wrote it, {instead}"
        ) from None
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict):
        raise ResumeMismatchError(
            f"{checkpoint / RATES_FILE} cannot be read, so the rates of the checkpoint are not known; resume from an "
            f"earlier checkpoint, {instead}"
        )
    if auto != ("auto" in saved):
        was, asks = ("automatic rates", "rates given as numbers")[:: -1 if auto else 1]
        raise ResumeMismatchError(
            f"{checkpoint} was trained with {was}, this run asks for {asks}; resume with {was}, {instead}"
        )
    asked = asdict(rates)
    for name, value in asked.items():
        # A setting that this version has and the one that wrote the checkpoint did not was not in use.
        if name == "lr" or (saved.get(name) or None) == (value or None):
            continue
        raise ResumeMismatchError(
            f"{checkpoint} was trained with {name} = {saved.get(name)}, this run asks for {value}; resume with "
            f"{name} = {saved.get(name)}, {instead}"
        )
    if saved.get("lr") != asked["lr"]:
        warnings.warn(
            f"{checkpoint} was trained with lr = {saved.get('lr')}; its schedule goes on and lr = {asked['lr']} is "
            "not used",
            LoraPlusWarning,
            stacklevel=3,
        )
