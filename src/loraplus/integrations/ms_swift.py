"""LoRA+ in ms-swift: `--optimizer loraplus`, which importing this module adds to its optimizers.

ms-swift's own `--lorap_lr_ratio` gives B's rate to every vector, and makes groups without a ratio where a model lacks a
method of its tuners. Here the trainer builds its plain optimizer, which `loraplus.attach` then splits by role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from loraplus.integrations.trainer_mixin import LoraPlusMixin
from loraplus.integrations.transformers import attach

if TYPE_CHECKING:
    OptimizerCallback: Any = object
    optimizers_map: dict[str, Any] = {}
else:
    from swift.optimizers import OptimizerCallback, optimizers_map


class LoraPlusOptimizerCallback(OptimizerCallback):
    """Has a trainer of ms-swift train with LoRA+; the ratio is `--lorap_lr_ratio`, or stands in `--optim_args`.

    Args:
        args: the training arguments.
        trainer: that makes this callback while it is made itself.

    Raises:
        TrainerSetupError, InvalidRateError, NoLoraFactorsError: as `loraplus.attach`, when training begins.

    Source: ms-swift, `swift/optimizers/base.py` (4.6).
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer
        trainer.train = self._train

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in front of the trainer's own `train` until it is called: only then is the trainer whole."""
        self._attach()
        return self.trainer.train(*args, **kwargs)

    def _attach(self) -> None:
        vars(self.trainer).pop("train", None)
        ratio = _ratio(self.args, self.trainer.model)
        attach(self.trainer, **({} if ratio is None else {"lr_ratio": ratio}))
        self.trainer.loraplus_logger = "swift.loraplus"

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Has the trainer make both by the methods that LoRA+ stands in."""
        self.create_optimizer()
        self.trainer.create_scheduler(num_training_steps=num_training_steps, optimizer=self.trainer.optimizer)

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's plain optimizer, which the trainer that called this splits."""
        given = () if model is None else (model,)
        if not isinstance(self.trainer, LoraPlusMixin):  # nobody called train()
            self._attach()
        if not self.trainer._making:
            return self.trainer.create_optimizer(*given)
        return Trainer.create_optimizer(self.trainer, *given)


def _ratio(args: Any, model: Any) -> float | None:
    """`--lorap_lr_ratio`, which ms-swift keeps in the configuration of the adapter."""
    configs = getattr(model, "peft_config", None) or {}
    values = [getattr(each, "lorap_lr_ratio", None) for each in (args, *configs.values())]
    return next((float(value) for value in values if value), None)


optimizers_map["loraplus"] = LoraPlusOptimizerCallback
