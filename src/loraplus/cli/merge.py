"""`loraplus merge`"""

from __future__ import annotations

from typing import Annotated

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_merge, show_next
from loraplus.cli.terminal import Console, print_json


@app.command(
    "merge",
    epilog=examples(
        "loraplus merge --adapter runs/chat --output models/chat",
        "loraplus merge --adapter runs/chat --output models/chat --dtype bfloat16",
    ),
)
def run(
    adapter: flags.AdapterFolder,
    output: Annotated[str, typer.Option(help="Model folder to make.")],
    model: flags.BaseModel = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: the base model's.", show_default=False)
    ] = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Write base model and adapter as one plain model, checked to give the same logits."""
    from loraplus.tasks.saved_adapter import base_of

    base_of(adapter, model)

    from loraplus.cli.console import quiet_libraries

    quiet_libraries()
    from loraplus.tasks.merge import merge

    options = {"model": model, "dtype": dtype, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    record = merge(adapter, output, **options)
    if json:
        print_json(record)
        return
    console = Console(plain=plain)
    console.say(
        f"{record['parameters']:,} parameters in {record['dtype']}; read back, its logits differ from base and adapter "
        f"by {record['max_difference']:.2g} at most, {record['relative_difference']:.1e} of the largest (allowed: "
        f"{record['tolerance']:g})"
    )
    console.say(f"model: {record['output']}")
    show_next(console, *after_merge(output, record["task"]))
