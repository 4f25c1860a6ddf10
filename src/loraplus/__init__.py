"""LoRA+: low-rank adapters whose two factors learn at the right speeds (arXiv 2402.12354)."""

from typing import TYPE_CHECKING, Any

from loraplus.auto import AutoRates
from loraplus.errors import (
    CheckpointError,
    DamagedCheckpointError,
    DivergedError,
    FlattenedParametersError,
    InputError,
    InvalidRateError,
    LoraPlusError,
    LoraPlusWarning,
    NoLoraFactorsError,
    NoTrainableParametersError,
    OptimizerSetupError,
    ParameterGroupError,
    RateMismatchError,
    ResumeMismatchError,
    TrainerSetupError,
    UnknownAdapterParameterError,
)
from loraplus.existing_groups import split_groups
from loraplus.feature_updates import FeatureUpdates, UpdateMonitor, feature_updates
from loraplus.groups import RateTable, explain, param_groups, verify
from loraplus.optimizer import create_loraplus_optimizer, create_optimizer
from loraplus.rates import Rates
from loraplus.roles import Role, register_layout

if TYPE_CHECKING:
    from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments, attach
    from loraplus.speed import SpeedReport, slow_down, speed_up

__all__ = [
    "AutoRates",
    "CheckpointError",
    "DamagedCheckpointError",
    "DivergedError",
    "FeatureUpdates",
    "FlattenedParametersError",
    "InputError",
    "InvalidRateError",
    "LoraPlusError",
    "LoraPlusTrainer",
    "LoraPlusTrainingArguments",
    "LoraPlusWarning",
    "NoLoraFactorsError",
    "NoTrainableParametersError",
    "OptimizerSetupError",
    "ParameterGroupError",
    "RateMismatchError",
    "RateTable",
    "Rates",
    "ResumeMismatchError",
    "Role",
    "SpeedReport",
    "TrainerSetupError",
    "UnknownAdapterParameterError",
    "UpdateMonitor",
    "attach",
    "create_loraplus_optimizer",
    "create_optimizer",
    "explain",
    "feature_updates",
    "param_groups",
    "register_layout",
    "slow_down",
    "speed_up",
    "split_groups",
    "verify",
]

# Names that need transformers are imported when first used: the core imports torch only.
_FROM_TRANSFORMERS = {"LoraPlusTrainer", "LoraPlusTrainingArguments", "attach"}
_FROM_SPEED = {"SpeedReport", "slow_down", "speed_up"}


def __getattr__(name: str) -> Any:
    if name in _FROM_TRANSFORMERS:
        from loraplus.integrations import transformers

        return getattr(transformers, name)
    if name in _FROM_SPEED:
        from loraplus import speed

        return getattr(speed, name)
    raise AttributeError(f"module 'loraplus' has no attribute {name!r}")
