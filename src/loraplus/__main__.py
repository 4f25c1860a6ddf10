"""Starts the `loraplus` command; `python -m loraplus` is the same (torchrun and accelerate launch start modules).

Ctrl-C is one line from the first moment on: while Python imports, whatever is interrupted would show as a long
traceback, or as another error that it leads to.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130


def start() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored: in the background, say
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from loraplus.cli import main

        main()
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, _end)  # all is done, and Python takes its leave


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the process if it is importing, when there is nothing to clean up; else raises, as Python does."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> NoReturn:
    try:
        sys.stdout.flush()
        os.write(2, b"interrupted\n")
    finally:
        os._exit(_INTERRUPTED)


if __name__ == "__main__":
    start()
