"""python -m loraplus.tasks.decoder --output data/decoder"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from loraplus.errors import LoraPlusError
from loraplus.tasks.assets import obtain
from loraplus.tasks.decoder.build import build


class _Lines(TrainerCallback):
    """A line for every report of a loss, with the time left; on a terminal Trainer shows a bar under them."""

    def __init__(self) -> None:
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        known = {"loss": "loss", "eval_loss": "validation loss"}
        parts = [f"{known[key]} {value:.4f}" for key, value in (logs or {}).items() if key in known]
        done = state.global_step - self._first_step
        if parts and done > 0:
            left = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
            parts.append(f"about {left / 60:.0f} min left")
        if parts:
            print(f"step {state.global_step}/{state.max_steps}", *parts, sep=" · ", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Builds the decoder; exit code 2 for what the user can put right, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m loraplus.tasks.decoder", description="Pre-train a small decoder.")
    parser.add_argument("--output", default="data/decoder", help="folder to make (default: data/decoder)")
    parser.add_argument("--data", default="data", help="folder that the verses are obtained into (default: data)")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # of loading and saving; Trainer's stays
    try:
        figures = build(str(obtain("verses", Path(options.data))), Path(options.output), callbacks=[_Lines()])
    except LoraPlusError as error:
        print(f"loraplus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(
        f"{options.output}: {figures['parameters']:,} parameters, validation loss {figures['held_out_loss']:.4f}, "
        f"perplexity {figures['held_out_perplexity']:.1f}, {figures['seconds']['clock'] / 60:.0f} min"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
