"""Each warning is given once, however often its cause comes up while an optimizer is made or proved. A signal is
acknowledged at once."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from loraplus.errors import LoraPlusWarning

_OURS = ("loraplus", "contextlib")  # a decorator's frame is the library's
_told: ContextVar[set[str] | None] = ContextVar("told", default=None)
_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def told_once(*, silent: bool = False) -> Iterator[None]:
    """Within a block, or in a function that this decorates, each warning is given once. Blocks inside it count with it.

    Args:
        silent: no warning is given at all, since somebody else has given it.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught, told_once():
        ...     tell("that")
        ...     tell("that")
        >>> len(caught)
        1
    """
    outer, quiet = _told.get(), _silent.get()
    tokens = _told.set(set() if outer is None else outer), _silent.set(silent or quiet)
    try:
        yield
    finally:
        _told.reset(tokens[0])
        _silent.reset(tokens[1])


def tell(text: str) -> None:
    """Warns, at the user's line that led here."""
    told = _told.get()
    if _silent.get() or (told is not None and text in told):
        return
    if told is not None:
        told.add(text)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, LoraPlusWarning, stacklevel=level)


_told_of_names: set[str] = set()


def renamed(module: str, name: str, new_names: Mapping[str, str]) -> str:
    """The new name of what a module had under another one, for its `__getattr__`; says so once.

    Args:
        module: its `__name__`.
        name: that is asked for.
        new_names: {earlier name: the present one}.

    Raises:
        AttributeError: no name, neither now nor earlier.
    """
    if name not in new_names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    if name not in _told_of_names:
        _told_of_names.add(name)
        tell(f"{module}.{name} is called {new_names[name]} now; the earlier name goes on working")
    return new_names[name]


def acknowledge(text: str) -> None:
    """Says, from the handler of a signal, that it has come and what happens now.

    A thread of its own writes it, after the line that the signal may have interrupted. In the same thread the
    interrupted line would be written twice.
    """
    threading.Thread(target=logging.getLogger(__name__).info, args=(text,)).start()
