"""Makes examples/decoder: pre-trained, saved in half precision, read back, measured and described.

python examples/making/decoder.py --output data/decoder
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from decoder_card import curve_svg, model_card, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from loraplus.errors import LoraPlusError
from loraplus.files.single import read_json, write_atomically, write_csv, write_json
from loraplus.reproduce.assets import obtain
from loraplus.reproduce.pretraining import Pretrained, ProgressLines
from loraplus.reproduce.verse_decoder import Recipe, build

FIGURES_FILE = "decoder.json"


def make(
    verses: str, output: Path, recipe: Recipe | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Pre-trains the decoder, or goes on where that was interrupted, and describes it; arguments as of `build`.

    Returns:
        What `decoder.json` holds: the recipe, sizes, seconds, and the validation loss before and after saving.

    Raises:
        InputError: the verses cannot be used, the output is there already, or checkpoints are of another recipe.
    """
    recipe = recipe or Recipe()

    def describe(folder: Path, trained: Pretrained, held_out: torch.Tensor) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        figures = _figures(recipe, trained, model, held_out)
        write_json(folder / FIGURES_FILE, figures)
        write_csv(folder / "curve.csv", trained.curve)
        write_atomically(folder / "curve.svg", curve_svg(trained.curve))
        drawn = samples(model, AutoTokenizer.from_pretrained(folder))
        write_atomically(folder / "README.md", model_card(figures, drawn))

    build(verses, output, recipe, callbacks, describe)
    return read_json(output / FIGURES_FILE)


def _figures(recipe: Recipe, trained: Pretrained, saved: Any, held_out: torch.Tensor) -> dict[str, Any]:
    loss = held_out_loss(saved, held_out)
    return {
        "recipe": asdict(recipe),
        "parameters": trained.model.num_parameters(),
        "tokens_seen": recipe.steps * recipe.batch * recipe.context,
        "seconds": {clock: round(seconds) for clock, seconds in trained.seconds.items()},
        "threads": torch.get_num_threads(),
        "held_out_tokens": held_out.numel(),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "held_out_loss_before_rounding": held_out_loss(trained.model, held_out),
    }


@torch.inference_mode()
def held_out_loss(model: Any, rows: torch.Tensor, batch: int = 8) -> float:
    """Mean cross-entropy in nats a token, in the precision the model is in.

    Args:
        model: causal language model in evaluation mode.
        rows: token ids (sequences, context).
        batch: sequences at once.
    """
    parts = rows.to(model.device).split(batch)
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in parts) / len(rows)


def main(arguments: Sequence[str]) -> int:
    """Makes the decoder; exit code 2 for what the user can put right, 130 if interrupted."""
    parser = argparse.ArgumentParser(description="Pre-train a small decoder.")
    parser.add_argument("--output", default="data/decoder", help="folder to make (default: data/decoder)")
    parser.add_argument("--data", default="data", help="folder that the verses are obtained into (default: data)")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # of loading and saving; Trainer's stays
    try:
        verses = str(obtain("verses", Path(options.data)))
        figures = make(verses, Path(options.output), callbacks=[ProgressLines()])
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
