"""Every error that a user can cause, each with one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import re
import unicodedata

LONGEST_MESSAGE = 500
"""Characters of the longest message that a command prints."""
LONGEST_ERROR = 2000
"""Characters of the longest text of an exception. It has room for the full names of parameters."""
_LONG_WORDS = (160, 80, 40)  # a word is a path or a name: each is shortened before the sentence around it is
_MOST_READ = 20_000  # a message that holds a whole file is not looked at character by character
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # parts of words in some scripts
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str, kept: str = "\n\t") -> str:
    r"""Text with what a terminal would obey, or not show, spelled out: escape codes, directions of writing, halves.

    Args:
        text: from data, file names, libraries.
        kept: control characters that stay.

    Example:
        >>> visible("red \x1b[31m, \u202eback")
        'red \\x1b[31m, \\u202eback'
    """
    if text.isascii() and text.isprintable():
        return text
    kept += _JOINERS
    return "".join(
        _spelled(char) if unicodedata.category(char) in _UNSEEN and char not in kept else char for char in text
    )


def _spelled(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: object, longest: int = LONGEST_MESSAGE) -> str:
    """A message in one line of limited length; long names in it lose their middle.

    Example:
        >>> one_line("no file " + "a" * 600, longest=60)
        'no file aaaaaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaaaaa'
    """
    lines = _without_middle(str(text), _MOST_READ).splitlines()
    line = visible(" ".join(stripped for part in lines if (stripped := part.strip())), kept="")
    for word in _LONG_WORDS:
        if len(line) <= longest:
            break
        line = re.sub(rf"\S{{{word + 1},}}", lambda match, most=word: _without_middle(match[0], most), line)
    return _without_middle(line, longest)


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    front = (longest - 1) // 2
    return f"{text[:front]}…{text[len(text) - (longest - 1 - front) :]}"


class LoraPlusError(Exception):
    """Base of all errors that loraplus raises on purpose; as text, one line of at most `longest` characters."""

    longest = LONGEST_ERROR

    def __str__(self) -> str:
        return one_line(super().__str__(), self.longest)


class LoraPlusWarning(UserWarning):
    """Something that works and is probably not what was meant; as text, one line, as an error's."""

    def __str__(self) -> str:
        return one_line(super().__str__(), LONGEST_ERROR)


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


class CheckpointError(LoraPlusError, RuntimeError):
    """A checkpoint or model that could not be written."""


class DamagedCheckpointError(CheckpointError, ResumeMismatchError):
    """A checkpoint that is not what was written."""


class TrainerSetupError(LoraPlusError, ValueError):
    """A trainer cannot take LoRA+ the way it is set up."""


class DivergedError(LoraPlusError, ArithmeticError):
    """The loss became NaN or infinite."""


class MergeMismatchError(LoraPlusError, ArithmeticError):
    """A merged model does not give the logits that base model and adapter give."""


class InputError(LoraPlusError, ValueError):
    """A file, column, label, flag or configuration key that cannot be used."""

    longest = LONGEST_MESSAGE  # what is wrong with a file may quote it


class InterruptedRun(LoraPlusError):
    """The user interrupted a run; what was done is saved. The message says how to go on."""


class LostProcessError(InterruptedRun):
    """Another process of a run ended before its time. The message says how to go on."""
