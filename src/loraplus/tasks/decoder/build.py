"""Makes the decoder's folder: pre-trained, saved in half precision, read back and described."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from loraplus.errors import InputError
from loraplus.files.output import hold_output, write_atomically, write_csv, write_json
from loraplus.tasks.decoder.card import curve_svg, model_card, samples
from loraplus.tasks.decoder.pretrain import Pretrained, Recipe, clear, held_out_loss, pretrain
from loraplus.tasks.decoder.text import read_chapters, train_tokenizer

FIGURES_FILE = "decoder.json"
_WEIGHTS_FILE = "model.safetensors"


def build(
    verses: str, output: Path, recipe: Recipe | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Pre-trains the decoder, or goes on where that was interrupted.

    Args:
        verses: file of book, chapter, verse, text rows.
        output: folder to make. Until it is whole, checkpoints lie beside it in a folder that ends in `.training`.
        recipe: what to train, and how.
        callbacks: of Trainer, to show how far it is.

    Returns:
        What `decoder.json` holds: the recipe, sizes, seconds, and the validation loss before and after saving.

    Raises:
        InputError: the verses cannot be used, the output is there already, or checkpoints are of another recipe.
    """
    recipe = recipe or Recipe()
    if output.exists():
        raise InputError(f"{output} exists; delete it to build the decoder again")
    chapters = read_chapters(verses, recipe.held_out_every)
    work = output.with_name(output.name + ".training")
    with hold_output(work):
        texts = (verse for chapter in chapters.training for verse in chapter)
        tokenizer = train_tokenizer(texts, recipe.vocabulary, recipe.context)
        trained = pretrain(recipe, chapters, tokenizer, work, callbacks)
        folder = work / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(folder)
        _save_in_half(trained, folder)
        figures = _figures(recipe, trained, folder)
        write_json(folder / FIGURES_FILE, figures)
        write_csv(folder / "curve.csv", trained.curve)
        write_atomically(folder / "curve.svg", curve_svg(trained.curve))
        model = AutoModelForCausalLM.from_pretrained(folder)
        write_atomically(folder / "README.md", model_card(figures, samples(model, tokenizer)))
        folder.rename(output)
        clear(work)
    return figures


def _save_in_half(trained: Pretrained, folder: Path) -> None:
    """Halves the file; the configuration goes on saying float32, so that is what it loads as."""
    trained.model.save_pretrained(folder)
    weights = load_file(folder / _WEIGHTS_FILE)
    halves = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
    save_file(halves, folder / _WEIGHTS_FILE, metadata={"format": "pt"})


def _figures(recipe: Recipe, trained: Pretrained, folder: Path) -> dict[str, Any]:
    before = held_out_loss(trained.model, trained.held_out)
    loss = held_out_loss(AutoModelForCausalLM.from_pretrained(folder).eval(), trained.held_out)
    return {
        "recipe": asdict(recipe),
        "parameters": trained.model.num_parameters(),
        "tokens_seen": recipe.steps * recipe.batch * recipe.context,
        "seconds": {clock: round(seconds) for clock, seconds in trained.seconds.items()},
        "threads": torch.get_num_threads(),
        "held_out_tokens": trained.held_out.numel(),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "held_out_loss_before_rounding": before,
    }
