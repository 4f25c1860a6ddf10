"""Damages each file of a script's checkpoint in each way: training must go on from the one before, to the same weights.

python benchmarks/faults/damaged_checkpoints.py --output benchmarks/results/faults/damaged-checkpoints.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import loraplus
from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments

NEWEST, LAST = "checkpoint-4", "checkpoint-6"


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


WAYS: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "a bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of 1 TB": lambda path: os.truncate(path, 2**40),
    "a folder": lambda path: _replace(path, Path.mkdir),
    "a pipe": lambda path: _replace(path, os.mkfifo),
    "a dangling link": lambda path: _replace(path, lambda link: link.symlink_to("/nonexistent")),
    "a link to itself": lambda path: _replace(path, lambda link: link.symlink_to(link.name)),
    "a link to /dev/zero": lambda path: _replace(path, lambda link: link.symlink_to("/dev/zero")),
}


def flipped(content: bytes) -> bytes:
    """The content with one bit of its middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def trainer(model: Path, output: Path, attached: bool) -> Trainer:
    """A script's trainer: `LoraPlusTrainer`, or Trainer after `attach`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{**tokenizer(f"a {'fine' if i % 2 else 'dull'} film {i}"), "labels": i % 2} for i in range(24)]
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    options: dict[str, Any] = {
        "output_dir": str(output), "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True,
        "learning_rate": 1e-3, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    parts: dict[str, Any] = {"model": adapted, "train_dataset": rows, "processing_class": tokenizer}
    if attached:
        made = Trainer(args=TrainingArguments(**options), **parts)
        loraplus.attach(made, lr_ratio=8)
    else:
        made = LoraPlusTrainer(args=LoraPlusTrainingArguments(**options, loraplus_lr_ratio=8), **parts)
    made.remove_callback(PrinterCallback)
    return made


def weights_of(model: torch.nn.Module) -> str:
    """A hash of all that trains."""
    trained = b"".join(p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad)
    return hashlib.sha256(trained).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", help="Names of files, comma-separated. Default: all of a checkpoint")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tried, lost = 0, []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = small.encoder(folder / "model")
        for attached in (False, True):
            whole = folder / f"whole-{attached}"
            first = trainer(model, whole, attached)
            first.train()
            expected = weights_of(first.model)
            names = sorted(path.name for path in (whole / NEWEST).iterdir())
            for name in options.files.split(",") if options.files else names:
                for way, damage in WAYS.items():
                    output = folder / "output"
                    shutil.rmtree(output, ignore_errors=True)
                    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(LAST))
                    damage(output / NEWEST / name)
                    tried += 1
                    try:
                        again = trainer(model, output, attached)
                        again.train(resume_from_checkpoint=True)
                        result = "other weights" if weights_of(again.model) != expected else None
                    except Exception as error:
                        result = f"{type(error).__name__}: {error}"
                    if result:
                        lost.append(f"{'attach' if attached else 'LoraPlusTrainer'}, {name} {way}: {result}")
                        print(lost[-1], flush=True)
    print(f"{tried} tried, {len(lost)} lost")
    if options.output:
        options.output.write_text(json.dumps({"tried": tried, "lost": lost}, indent=1) + "\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
