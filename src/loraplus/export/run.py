"""A finished run of `loraplus train`, as its folder tells it, and which of its settings an export has passed on."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from loraplus.errors import InputError
from loraplus.files.commands import TRAIN, command_of
from loraplus.files.output import saved_config
from loraplus.files.paths import is_file, is_folder, resolved, user_path
from loraplus.files.single import read_json
from loraplus.rates import AUTO
from loraplus.tasks.config import OF_LABELS, TrainConfig
from loraplus.tasks.saved_adapter import adapter_settings

_DEFAULTS = {each.name: each.default for each in dataclasses.fields(TrainConfig)}
_OF_THIS_MACHINE = {"output"}
"""Settings of this machine alone, which say nothing of what was trained."""


@dataclass
class Run:
    """A run's settings. What is asked for by `get` counts as passed on; `leave_out_the_rest` names all that was not.

    Args:
        name: of its folder.
        settings: of its config.yaml.
        adapter: its adapter_config.json.
        metrics: its metrics.json.
        notes: what the other project cannot say, one line each.
    """

    name: str
    settings: dict[str, Any]
    adapter: dict[str, Any]
    metrics: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    _passed_on: set[str] = field(default_factory=set)

    def get(self, name: str) -> Any:
        """The value of a setting, which the caller passes on or speaks of."""
        self._passed_on.add(name)
        return self.settings.get(name)

    def note(self, text: str) -> None:
        """Adds a line."""
        self.notes.append(text)

    def leave_out(self, *names: str, why: str) -> None:
        """Adds a line for each of these settings that was used, and says why it is not passed on."""
        for name in names:
            value = self.get(name)
            if value not in (None, _DEFAULTS.get(name)):
                self.note(f"{name} = {_text(value)} is left out: {why}")

    def leave_out_the_rest(self, target: str) -> None:
        """Adds a line for each setting that was used, and that nobody has asked for."""
        for name in sorted(self.settings.keys() - self._passed_on - _OF_THIS_MACHINE):
            self.leave_out(name, why=f"{target} has no such setting")

    def rates(self) -> dict[str, Any]:
        """lr and lr_ratio as numbers, and the other rates that were given; automatic rates are those arrived at."""
        names = "lr lr_ratio lr_embedding lr_head lr_magnitude lr_overrides lr_ratio_overrides".split()
        rates = {name: self.get(name) for name in names}
        if rates["lr"] == AUTO:
            rates |= {name: self.metrics[name] for name in ("lr", "lr_ratio")}
            self.note(
                f"lr = auto becomes what it had arrived at, {rates['lr']:.4g} and a ratio of {rates['lr_ratio']:g}"
            )
        if self.get("task") not in OF_LABELS:
            rates["lr_head"] = None  # there is no head
        for name in ("lr_overrides", "lr_ratio_overrides"):
            if isinstance(rates[name], str):
                rates[name] = json.loads(rates[name])
        return {name: rate for name, rate in rates.items() if rate is not None}

    def whole_alpha(self, project: str) -> int:
        """Alpha for a project that takes whole numbers only."""
        alpha = self.adapter["lora_alpha"]
        if int(alpha) != alpha:
            self.note(f"alpha = {alpha:g} becomes {int(alpha)}: {project} takes whole numbers")
        return int(alpha)

    def targets(self) -> list[str] | str:
        """The adapted layers: names in order, or one expression."""
        self.get("target_modules")
        given = self.adapter["target_modules"]
        return given if isinstance(given, str) else sorted(given)

    def micro_batch_size(self) -> int:
        """Examples that are computed at once, in one process."""
        return max(1, self.get("batch_size") // (self.get("gradient_accumulation_steps") or 1))

    def warmup(self) -> int:
        """Steps of warm-up; the projects' versions differ in whether they take a ratio."""
        return math.ceil(self.get("warmup_ratio") * self.metrics["steps"])

    def max_length(self) -> int | None:
        """Tokens of the longest example: what was asked for, else what the data had."""
        return self.get("max_length") or self.metrics.get("data", {}).get("max_length")


def read_run(path: str) -> Run:
    """Reads the folder that `loraplus train` wrote.

    Raises:
        InputError: there is no such folder, it is another command's or unfinished, or a file of it is damaged.
    """
    folder = user_path(path)
    if not is_folder(folder):
        raise InputError(f"there is no folder {path}")
    settings = saved_config(folder)
    if settings is None or command_of(settings) is not TRAIN:
        raise InputError(f"{path} is no run of `loraplus train`: it has no config.yaml of one")
    if not is_file(folder / "metrics.json"):
        raise InputError(f"{path} is not finished: it has no metrics.json; go on with loraplus train --resume")
    metrics = read_json(folder / "metrics.json")
    if not isinstance(metrics, dict) or not {"lr", "lr_ratio", "steps"} <= metrics.keys():
        raise InputError(f"{folder / 'metrics.json'} does not say rates and steps; the run is damaged")
    adapter = adapter_settings(path)
    missing = {"r", "lora_alpha", "lora_dropout", "target_modules"} - adapter.keys()
    if missing or not isinstance(adapter["target_modules"], (list, str)):
        raise InputError(
            f"{folder / 'adapter_config.json'} has no {min(missing, default='target_modules')}; it is damaged"
        )
    return Run(resolved(path).name, settings, adapter, metrics)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
