"""Every error that a user can cause, each with one line that says what is wrong, where, and what to do."""

from __future__ import annotations


class LoraPlusError(Exception):
    """Base of all errors that loraplus raises on purpose."""


class LoraPlusWarning(UserWarning):
    """Something that works and is probably not what was meant."""


class InvalidRateError(LoraPlusError, ValueError):
    """A learning rate, ratio or factor that no training run can use."""


class NoTrainableParametersError(LoraPlusError, ValueError):
    """The model has nothing to train: every parameter is frozen."""


class NoLoraFactorsError(LoraPlusError, ValueError):
    """The model trains something, but no LoRA factor is among it."""


class UnknownAdapterParameterError(LoraPlusError, ValueError):
    """A trainable parameter looks like an adapter factor, and no layout recognises it."""


class FlattenedParametersError(LoraPlusError, ValueError):
    """FSDP has flattened parameters that need different rates into one."""


class ParameterGroupError(LoraPlusError, ValueError):
    """Parameter groups that leave out a parameter, hold one twice, or are no groups."""


class OptimizerSetupError(LoraPlusError, ValueError):
    """An optimizer class that cannot give A and B rates of their own, or cannot take some parameter."""


class RateMismatchError(LoraPlusError, ValueError):
    """An optimizer does not give the parameters the rates that were asked for."""


class ResumeMismatchError(LoraPlusError, ValueError):
    """A checkpoint was trained with other rates than those now asked for."""


class TrainerSetupError(LoraPlusError, ValueError):
    """A trainer cannot take LoRA+ the way it is set up."""


class DivergedError(LoraPlusError, ArithmeticError):
    """The loss became NaN or infinite."""


class MergeMismatchError(LoraPlusError, ArithmeticError):
    """A merged model does not give the logits that base model and adapter give."""


class InputError(LoraPlusError, ValueError):
    """A file, column, label, flag or configuration key that cannot be used."""


class InterruptedRun(LoraPlusError):
    """The user interrupted a run; what was done is saved. The message says how to go on."""


class LostProcessError(InterruptedRun):
    """Another process of a run ended before its time. The message says how to go on."""
