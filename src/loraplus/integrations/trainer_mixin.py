"""What LoRA+ adds to a Trainer: groups by role, rates set automatically, logs by name, rates in each checkpoint."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainingArguments

from loraplus.auto import AutoRates
from loraplus.errors import LoraPlusWarning, TrainerSetupError
from loraplus.feature_updates import UpdateMonitor
from loraplus.files.checkpoints import SEALED
from loraplus.files.manifest import is_sealed, seal_again
from loraplus.integrations.checkpoints import (
    check_resume,
    rates_in_use,
    rates_record,
    read_auto_state,
    roles_of,
    shapes_of,
    write_auto_state,
    write_rates,
)
from loraplus.integrations.deepspeed import check_plugin
from loraplus.integrations.proof import LOGGER, prove
from loraplus.integrations.pytorch import rates_for_log
from loraplus.integrations.trainer_checkpoints import WholeCheckpoints
from loraplus.integrations.trainer_optimizer import Split, own_class, split
from loraplus.integrations.trainer_search import check_searched, checked_space
from loraplus.integrations.trainer_settings import RateSettings, settings_of
from loraplus.notices import tell, told_once
from loraplus.rates import Rates
from loraplus.roles import Role

_OF_WHOLE_TEXTS = {"DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer", "GRPOTrainer", "RLOOTrainer"}
"""TRL's trainers whose loss has a term for a text, or for two, and not for each token."""


class Made(NamedTuple):
    """An optimizer as it was when it was made: what was asked for, its groups, and the record for checkpoints."""

    asked: tuple[Rates, bool]
    split: Split
    rates: Rates
    record: dict[str, Any]


def _splitting(build: Callable[..., Any]) -> Callable[..., Any]:
    """A `create_optimizer` whose optimizer is split once the outermost one has built it."""

    @functools.wraps(build)
    def create_optimizer(self: Any, model: Any = None) -> Any:
        return self._make(functools.partial(build, self), *([] if model is None else [model]))

    create_optimizer.splits = True  # type: ignore[attr-defined]
    return create_optimizer


class LoraPlusMixin(WholeCheckpoints):
    """Gives any Trainer class LoRA+ parameter groups, their logs, whole checkpoints, and a guard on resuming."""

    loraplus_auto: AutoRates | None = None
    loraplus_logger: str = LOGGER
    """Name of the logger that is told the verified rates: below a warning, frameworks show their own loggers only."""
    _given: RateSettings | None = None
    _made: Made | None = None
    _making: bool = False
    _watching: bool = False
    _known_rates: tuple[RateSettings, float, Rates] | None = None
    _resumed: Path | None = None
    _auto_state: Mapping[str, Any] | None = None
    _monitor: UpdateMonitor | None = None
    _group_rates: Mapping[str, float] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        build = cls.create_optimizer
        if not hasattr(build, "splits"):  # a subclass's own, or that of a class mixed in before this one
            cls.create_optimizer = _splitting(build)

    @property
    def loraplus_settings(self) -> RateSettings:
        """What is asked for at this moment: what `attach` was given, else the training arguments."""
        # The arguments may have been changed since.
        given = None if self._given is None else without_repetition(self.args, self._given)
        return given or settings_of(self.args) or RateSettings()

    @property
    def loraplus_rates(self) -> Rates:
        """The rates of the optimizer, or those that one made now would have."""
        return self._rates_at(self.args.learning_rate) if self._made is None else self._made.rates

    @property
    def loraplus_groups(self) -> list[dict[str, Any]] | None:
        """The groups that the trainer's own hooks made, as `verify(..., groups=...)` takes them; None before that."""
        return None if self._made is None else self._made.split.own_groups

    def _asked(self) -> tuple[Rates, bool]:
        return self._rates_at(self.args.learning_rate), self.loraplus_settings.auto

    def _rates_at(self, lr: float) -> Rates:
        settings = self.loraplus_settings
        if self._known_rates is None or self._known_rates[:2] != (settings, lr):  # once, as a low ratio is warned of
            self._known_rates = settings, lr, settings.rates.resolved(lr)
        return self._known_rates[2]

    @_splitting
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Has the trainer build the optimizer that its hooks and arguments say, and splits its groups by role."""
        return super().create_optimizer(*([] if model is None else [model]))

    def _make(self, build: Callable[..., Any], *given: Any) -> Any:
        """Calls a `create_optimizer`, and splits what it has built unless another one is waiting to do so."""
        if self._making:
            return build(*given)
        model = given[0] if given and given[0] is not None else self.model
        if self.optimizer is not None:  # of an earlier run, which most hooks keep
            self._check_ours()
        check_plugin(self.accelerator)
        settings, asked = self.loraplus_settings, self._asked()
        self._making = True
        try:
            with own_class(self, model):
                build(*given)
            new = None if self._is_ours() else split(self, model, settings, self._rates_at)
        except BaseException:
            self.optimizer = None  # not to be trained with, should train() be called again
            raise
        finally:
            self._making = False
        if new is not None:
            self._drop()
            several = len({group["lr"] for group in new.own_groups}) > 1  # by layer, say: each is part of the record
            rates = rates_in_use(model, new.optimizer) if several else new.rates
            self._made = Made(asked, new, rates, rates_record(rates, model))
            self._check_resumed()
            if not settings.auto:  # whose rates come with the first step
                with told_once(silent=True):  # `split` has warned
                    prove(model, new.optimizer, rates, told_by=self.loraplus_logger)
        self._watch(model)
        return self.optimizer

    def _is_ours(self) -> bool:
        optimizer, ours = self.optimizer, None if self._made is None else self._made.split.optimizer
        while optimizer is not None and optimizer is not ours:  # in Accelerate's and DeepSpeed's wrappers
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer is not None

    def _check_ours(self) -> None:
        if not self._is_ours():
            raise TrainerSetupError(
                f"{type(self).__name__} trains with an optimizer that LoRA+ did not split: one was put in its place; "
                "leave trainer.optimizer alone, or change trainer.create_optimizer before loraplus.attach(trainer)"
            )

    def _watch(self, model: Any) -> None:
        """Installs what measures steps, for the length of a `train()`."""
        if self._watching:
            return
        settings, earlier = self.loraplus_settings, self.loraplus_auto
        self._monitor = None
        if settings.auto:
            kinds = _OF_WHOLE_TEXTS & {kind.__name__ for kind in type(self).__mro__}
            if kinds:
                tell(
                    f"automatic rates are not made for {min(kinds)}: they take each token for a term of the loss, and "
                    "here a text is one; such runs have diverged (docs/auto-rates.md), so give the rates as numbers"
                )
            self.loraplus_auto = AutoRates(model, self.optimizer)
            state = earlier.state_dict() if self._auto_state is None and earlier is not None else self._auto_state
            if state is not None:
                self.loraplus_auto.load_state_dict(state)
        elif settings.log_updates:
            self._monitor = UpdateMonitor(model, self.optimizer, every=settings.log_updates)
        self._watching = True

    def _unhook(self) -> None:
        """Takes the hooks of a run off model and optimizer; what was measured can still be read."""
        if self._watching and self.loraplus_auto is not None:
            self.loraplus_auto.rest()  # `explain` goes on finding what it has arrived at
        elif self._watching and self._monitor is not None:
            self._monitor.remove()
        self._watching = False

    def _drop(self) -> None:
        """Forgets the optimizer of an earlier run."""
        self._unhook()
        self.loraplus_auto = self._monitor = self._made = None
        self._group_rates = {}

    def _get_learning_rate(self) -> float:
        # Trainer reads its rate before the scheduler moves on and logs it later; the groups are read at that moment.
        if self.optimizer is not None:
            self._group_rates = rates_for_log(self.optimizer)
            if self.loraplus_auto is not None:
                return next(iter(self._group_rates.values()))
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `lr/<group>` for every group, and `updates/…` if measured, where the trainer logs its learning rate."""
        if "learning_rate" in logs:
            logs |= self._group_rates
            watcher = self.loraplus_auto or self._monitor
            if watcher is not None and watcher.updates is not None:
                logs |= watcher.updates.logs()
            if self.loraplus_auto is not None and self.loraplus_settings.log_layers:
                logs |= {
                    f"lr/{name}.{role}": lr
                    for name, rates in self.loraplus_auto.layer_rates.items()
                    for role, lr in ((Role.A, rates.lr_a), (Role.B, rates.lr_b))
                    if lr is not None
                }
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refuses to resume from a checkpoint that is damaged or trained at other rates, then trains.

        An optimizer of an earlier `train()` is kept, as Trainer keeps it, unless other rates are asked for since.
        """
        if self._made is not None and (self.model_init is not None or self._made.asked != self._asked()):
            self._check_ours()
            self._drop()
            self.optimizer = None
        self._resumed = self._auto_state = None
        resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        if self._resumed_from is not None and self._resumed_from.is_dir():
            self._resumed = self._resumed_from
            if self._made is not None or _builds_as_trainer(self):
                self._check_resumed()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._unhook()

    def _check_resumed(self) -> None:
        """Holds the checkpoint against the rates, as soon as these are known: a trainer's own hooks set the base."""
        if self._resumed is not None:
            auto = self.loraplus_settings.auto
            # FSDP names flat parameters otherwise once it has wrapped the model.
            wrapped_later = self._made is None and self.is_fsdp_enabled
            roles = shapes = None
            if self._made is not None:
                roles, shapes = self._made.record["roles"], self._made.record["shapes"]
            elif not wrapped_later:
                roles, shapes = roles_of(self.model), shapes_of(self.model)
            check_resume(self._resumed, self.loraplus_rates, auto=auto, roles=roles, shapes=shapes)
            self._auto_state = read_auto_state(self._resumed) if auto else None
            if self.loraplus_auto is not None and self._auto_state is not None:
                self.loraplus_auto.load_state_dict(self._auto_state)
            if not wrapped_later:
                self._resumed = None

    def hyperparameter_search(self, hp_space: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, over any training argument; a name that reaches none of them is refused.

        Raises:
            TrainerSetupError: a name in the space that is no training argument.
        """
        if callable(hp_space):
            hp_space = functools.partial(checked_space, self, hp_space)
        elif hp_space is None:  # Trainer's own spaces all hold it
            check_searched(self, "learning_rate")
        return super().hyperparameter_search(hp_space, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves the model, and beside it the rates and roles that the optimizer was made with."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save and self._staging is None:
            folder = Path(output_dir or self.args.output_dir)
            sealed = is_sealed(folder)
            try:
                self._write_record(folder, sealed=sealed)
                if sealed:
                    seal_again(folder)
            except Exception as error:  # the model is saved; a run is not to end for a note beside it
                warnings.warn(
                    f"the model is saved, but the record of its rates could not be written to {folder} "
                    f"({type(error).__name__}: {error}); the run cannot be resumed from there",
                    LoraPlusWarning,
                    stacklevel=2,
                )

    def _write_record(self, folder: Path, *, sealed: bool = False) -> None:
        if self._made is not None:
            write_rates(folder, {**self._made.record, **({SEALED: True} if sealed else {})}, self.loraplus_auto)
            if self.loraplus_auto is not None:
                write_auto_state(folder, self.loraplus_auto)


def _builds_as_trainer(trainer: Any) -> bool:
    """Whether A's rate will be `learning_rate`: nothing of the trainer's own builds its optimizer."""
    kinds = type(trainer).__mro__
    own = [vars(kind) for kind in kinds[: kinds.index(Trainer)] if kind is not LoraPlusMixin]
    hooks = {"create_optimizer", "get_optimizer_cls_and_kwargs"}
    return trainer.optimizer_cls_and_kwargs is None and not any(hooks & names.keys() for names in (*own, vars(trainer)))


def without_repetition(args: TrainingArguments, given: RateSettings) -> RateSettings | None:
    """What was given to `attach`, with what it left to the arguments; None if the arguments say the same.

    Raises:
        TrainerSetupError: they say something else.
    """
    asked = settings_of(args)
    together = given.filled(asked or RateSettings())
    difference = None if asked is None else asked.filled(given).differs_in(together)
    if difference is None:
        return None if together == asked else together
    name, in_arguments, in_attach = difference
    raise TrainerSetupError(
        f"the training arguments ask for {name} = {in_arguments}, loraplus.attach for {in_attach}; "
        "set the rates in one of them"
    )
