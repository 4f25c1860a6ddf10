"""`loraplus inspect`"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.terminal import Console, print_json

_NONE = "–"


@app.command(
    "inspect",
    epilog=examples(
        "loraplus inspect runs/reviews",
        "loraplus inspect runs/reviews/checkpoint-100 --json",
    ),
)
def run(
    path: Annotated[str, typer.Argument(help="Adapter, checkpoint, output of `loraplus train`, or model.")],
    model: flags.BaseModel = None,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Show what an adapter holds: roles, rates, and the size of every layer's factors and update."""
    from loraplus.files.paths import folder_unless_hub_name

    folder_unless_hub_name(path)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # `quiet_libraries` imports far more than is needed here
    from loraplus.inspection import inspect_folder

    contents = inspect_folder(path, model)
    if json:
        print_json(contents)
        return
    console = Console(plain=plain).widened()
    for shown in model_parts(contents) if contents["kind"] == "model" else adapter_parts(contents):
        console.print(shown, soft_wrap=isinstance(shown, Text))  # so that a path can be copied


def adapter_parts(contents: Mapping[str, Any]) -> list[Text | Table]:
    """Header, table of groups, table of layers, and what is remarkable about them."""
    lines = [Text(line) for line in _header(contents)]
    remarks = [Text(remark, style="yellow") for remark in _remarks(contents)]
    return [*lines, Text(), groups_table(contents["groups"]), Text(), *_layers(contents), *remarks]


def model_parts(contents: Mapping[str, Any]) -> list[Text | Table]:
    """The layers that an adapter could go to."""
    table = _table("layer", "inputs", "outputs", "layers", "adapted by default")
    for row in contents["layers"]:
        table.add_row(
            row["name"],
            f"{row['inputs']:,}",
            f"{row['outputs']:,}",
            str(row["count"]),
            "yes" if row["default"] else "no",
        )
    return [
        Text(f"{contents['path']}: a {contents['model_type']} model. There is no adapter in it."),
        Text("An adapter could go to these linear layers (--target-modules):"),
        Text(),
        table,
    ]


def groups_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a group and role."""
    with_names = any(row["name"] not in (None, row["role"]) for row in rows)
    table = _table(*(["group"] if with_names else []), "role", "tensors", "parameters", "lr", "base lr", "weight decay")
    for row in rows:
        name = [row["name"] or _NONE] if with_names else []
        count = _NONE if row["parameters"] is None else f"{row['parameters']:,}"
        table.add_row(
            *name, row["role"] or _NONE, str(row["tensors"]), count, _number(row["lr"]), _number(row["base_lr"]),
            _number(row["weight_decay"]),
        )  # fmt: skip
    return table


def _header(contents: Mapping[str, Any]) -> list[str]:
    adapter, base, training = contents["adapter"], contents["base"], contents["training"]
    step = training["step"]
    of = f" of {training['max_steps']}" if training["max_steps"] else ""
    lines = [f"{contents['path']}: {contents['kind']}" + ("" if step is None else f", step {step}{of}")]
    how = "α/√r, rsLoRA" if adapter["use_rslora"] else "α/r"
    scalings = ", ".join(f"{value:.4g}" for value in adapter["scalings"])
    lines.append(
        f"rank {adapter['rank']} · alpha {_number(adapter['alpha'])} · scaling {scalings} ({how})"
        + (" · DoRA" if adapter["use_dora"] else "")
    )
    for name in ("rank", "alpha"):
        if adapter[f"{name}_pattern"]:
            pairs = ", ".join(f"{key} {value:g}" for key, value in adapter[f"{name}_pattern"].items())
            lines.append(f"{name} by layer: {pairs}")
    lines.append(f"targets: {_names(adapter['target_modules'])}")
    if adapter["modules_to_save"]:
        lines.append(f"trained in full: {_names(adapter['modules_to_save'])}")
    where = base["note"] or (
        "weights read" if base["folder"] == base["name"] else f"weights read from {base['folder']}"
    )
    lines.append(f"base model: {where if base['name'] is None else base['name'] + f' ({where})'}")
    rest = adapter["saved_untrained_tensors"]
    lines.append(
        f"trained: {adapter['trained_parameters']:,} parameters in {adapter['trained_tensors']} tensors"
        + (f"; {rest} more saved without being trained" if rest else "")
    )
    if training["lr"] is not None:
        lr, ratio = training["lr"], training["lr_ratio"]
        eta_b = _number(lr * ratio if ratio else None)
        automatic = "; automatic, as last measured" if training["auto"] else ""
        lines.append(f"rates: η_A {_number(lr)} · η_B {eta_b} (λ = {_number(ratio)}{automatic})")
    elif training["rates_from"] is None:
        lines.append("rates: not known; no optimizer.pt or loraplus.json beside the adapter")
    return lines


def _layers(contents: Mapping[str, Any]) -> list[Text | Table]:
    layers = contents["layers"]
    common = _common_prefix([layer["name"] for layer in layers])
    automatic = any(layer["lr_a"] is not None or layer["lr_b"] is not None for layer in layers)
    several_ranks = len({layer["rank"] for layer in layers}) > 1
    titles = ["layer", *(["r"] if several_ranks else []), "RMS A", "RMS B", "‖sBA‖", "/‖W‖", "eff. rank"]
    table = _table(*titles, *(["lr_A", "lr_B"] if automatic else []))
    for layer in layers:
        values = [_number(layer[key]) for key in ("rms_a", "rms_b", "update_norm", "relative_update")]
        effective = _NONE if layer["effective_rank"] is None else f"{layer['effective_rank']:.2f}"
        table.add_row(
            layer["name"].removeprefix(common),
            *([str(layer["rank"])] if several_ranks else []),
            *values,
            effective,
            *([_number(layer["lr_a"]), _number(layer["lr_b"])] if automatic else []),
            style="yellow" if layer["untrained"] or not layer["finite"] else None,
        )
    return [*([Text(f"layers of {common.rstrip('.')}:")] if common else []), table]


def _remarks(contents: Mapping[str, Any]) -> list[str]:
    layers = contents["layers"]
    remarks = []
    for factor, is_embedding in (("B", False), ("A", True)):
        of_kind = [layer for layer in layers if layer["is_embedding"] == is_embedding]
        zero = [layer["name"] for layer in of_kind if layer["untrained"]]
        if zero:
            kind = "embeddings" if is_embedding else "layers"
            remarks.append(f"{factor} is zero in {len(zero)} of {len(of_kind)} {kind}: untrained")
    broken = [layer["name"] for layer in layers if not layer["finite"]]
    if broken:
        remarks.append(
            f"NaN or infinity in {len(broken)} of {len(layers)} layers, {broken[0]} first: the adapter is broken"
        )
    if any(layer["dora"] for layer in layers):
        remarks.append("DoRA: its magnitudes change the weights besides; sBA is the change of direction alone")
    return remarks


def _common_prefix(names: Sequence[str]) -> str:
    """The longest common beginning of all names that ends in a dot and leaves something of each."""
    if len(names) < 2:
        return ""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(part + "." for part in common)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for title in others:
        is_text = title == "role"
        table.add_column(title, justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def _names(value: Any) -> str:
    return _NONE if not value else value if isinstance(value, str) else ", ".join(sorted(set(map(str, value))))


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"
