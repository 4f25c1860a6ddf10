"""`loraplus doctor`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.terminal import Console, print_json
from loraplus.errors import InputError


@app.command(
    "doctor",
    epilog=examples(
        "loraplus doctor -- python train.py --epochs 3",
        "loraplus doctor runs/checkpoint-500 --lr-ratio 16",
    ),
)
def run(
    what: Annotated[
        list[str],
        typer.Argument(help="A checkpoint folder, or -- and a command that trains: -- python train.py --flags."),
    ],
    lr_ratio: Annotated[
        float | None, typer.Option(help="λ that it should have. Default: what the run itself was told, if it was.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a script to watch, at a rate above 0.", min=1)] = 5,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> int:
    """Show the rates that a checkpoint or a script really has. Exit codes: 0 right, 1 something is off, 2 a mistake.

    A script is run as it is, up to its first steps, and stopped there; nothing that it does after them happens.
    """
    if lr_ratio is not None and not 0 < lr_ratio < float("inf"):
        raise InputError(f"--lr-ratio must be a finite number > 0, got {lr_ratio:g}")
    console = Console(plain=plain).widened()
    from loraplus.files.paths import is_file, is_folder, user_path

    path = user_path(what[0])
    if len(what) == 1 and not is_file(path):
        if not is_folder(path):
            raise InputError(f"{what[0]}: no such folder; give a checkpoint folder, or -- python train.py …")
        from loraplus.diagnosis.checkpoint import diagnose_checkpoint

        diagnosis = diagnose_checkpoint(what[0], lr_ratio=lr_ratio)
    else:
        from loraplus.diagnosis.script import diagnose_script

        print(f"loraplus doctor: runs the script up to its first {steps} steps and stops it there", file=sys.stderr)
        diagnosis = diagnose_script(what, steps=steps, lr_ratio=lr_ratio)
    if json:
        print_json(diagnosis.to_dict())
    else:
        console.say(diagnosis)
    return 0 if diagnosis.ok else 1
