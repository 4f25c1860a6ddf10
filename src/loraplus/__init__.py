"""LoRA+: low-rank adapters whose two factors learn at the right speeds (arXiv 2402.12354).

Names are imported when they are first used, so that `loraplus --help` needs no torch, and the core no transformers.
All errors are in `loraplus.errors`; they can be named here, too.
"""

import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loraplus import errors
from loraplus.errors import LoraPlusError, LoraPlusWarning

if TYPE_CHECKING:
    __version__: str
    from loraplus.auto import AutoRates
    from loraplus.diagnosis.diagnosis import Diagnosis
    from loraplus.diagnosis.live import doctor
    from loraplus.errors import *  # noqa: F403  (every error that scripts may name here)
    from loraplus.existing_groups import split_groups
    from loraplus.feature_updates import FeatureUpdates, UpdateMonitor, feature_updates
    from loraplus.groups import RateTable, explain, param_groups, verify
    from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments, attach
    from loraplus.optimizer import create_loraplus_optimizer, create_optimizer
    from loraplus.rates import Rates
    from loraplus.roles import Role, register_layout
    from loraplus.speed import SpeedReport, slow_down, speed_up

__all__ = [
    "AutoRates",
    "Diagnosis",
    "FeatureUpdates",
    "LoraPlusError",
    "LoraPlusTrainer",
    "LoraPlusTrainingArguments",
    "LoraPlusWarning",
    "RateTable",
    "Rates",
    "Role",
    "SpeedReport",
    "UpdateMonitor",
    "attach",
    "create_loraplus_optimizer",
    "create_optimizer",
    "doctor",
    "explain",
    "feature_updates",
    "param_groups",
    "register_layout",
    "slow_down",
    "speed_up",
    "split_groups",
    "verify",
]

_HOMES = {
    "auto": ["AutoRates"],
    "diagnosis.diagnosis": ["Diagnosis"],
    "diagnosis.live": ["doctor"],
    "existing_groups": ["split_groups"],
    "feature_updates": ["FeatureUpdates", "UpdateMonitor", "feature_updates"],
    "groups": ["RateTable", "explain", "param_groups", "verify"],
    "integrations.transformers": ["LoraPlusTrainer", "LoraPlusTrainingArguments", "attach"],
    "optimizer": ["create_loraplus_optimizer", "create_optimizer"],
    "rates": ["Rates"],
    "roles": ["Role", "register_layout"],
    "speed": ["SpeedReport", "slow_down", "speed_up"],
}
_HOME = {name: f"loraplus.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif isinstance(error := vars(errors).get(name), type):
        value = error
    elif importlib.util.find_spec(f"loraplus.{name}") is not None:  # a submodule that nothing has imported yet
        value = importlib.import_module(f"loraplus.{name}")
    else:
        raise AttributeError(f"module 'loraplus' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """That of the installed package; a source tree that was never installed has none."""
    try:
        return importlib.metadata.version("loraplus")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets each submodule that is imported as an attribute here; one may be called as a function is.
        super().__setattr__(name, getattr(value, name) if name in _HOME and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
