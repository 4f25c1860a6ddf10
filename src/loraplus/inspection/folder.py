"""`loraplus inspect`: what a folder holds, from its files alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.files import manifest
from loraplus.files.commands import CARD_FILE
from loraplus.files.paths import folder_unless_hub_name, is_folder, user_path
from loraplus.files.single import read_json
from loraplus.inspection.adapter import CONFIG_FILE, WEIGHT_FILES, Adapter, Pair
from loraplus.inspection.base import BaseWeights
from loraplus.inspection.rates import (
    METRICS_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    Row,
    group_rows,
    learn_roles,
    read_rates_file,
)
from loraplus.inspection.update import update_size
from loraplus.steps.movement import rms

_PREFIX = "base_model.model."
_NAMED_IN_MESSAGE = 3
_SHOWN = "r lora_alpha rank_pattern alpha_pattern target_modules modules_to_save bias task_type peft_version".split()
_FACTS = {  # file: {its name of a fact: ours}
    METRICS_FILE: {"steps": "step", "eval_loss": "eval_loss"},
    STATE_FILE: {"global_step": "step", "max_steps": "max_steps"},
}


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer. What does not apply, or cannot be known from the files, is None."""

    name: str
    rank: int
    alpha: float
    scaling: float
    is_embedding: bool
    dora: bool
    rms_a: float
    rms_b: float
    update_norm: float | None  # ‖s·B A‖_F
    update_spectral: float | None  # ‖s·B A‖₂
    base_norm: float | None  # ‖W‖_F
    relative_update: float | None  # ‖s·B A‖_F / ‖W‖_F
    effective_rank: float | None
    untrained: bool  # the factor that starts at zero is zero
    finite: bool
    lr_a: float | None  # what the layer asked for, with automatic rates
    lr_b: float | None


def inspect_folder(path: str, model: str | None = None) -> dict[str, Any]:
    """Reads an adapter, a checkpoint, the output of `loraplus train`, or a model without an adapter.

    No model is built but for the list of a model's layers, which takes no weights; base weights are read one at a time.

    Args:
        path: folder, or the name of an adapter on the hub.
        model: folder or hub name with the base weights. Default: the recorded base model, if it is on this machine.

    Returns:
        What `loraplus inspect --json` prints: kind, and for a model what could be adapted; else adapter, base,
        training, groups and layers.

    Raises:
        InputError: nothing of the kind there, a damaged file, or a base model that does not fit.
    """
    folder = _find(path)
    if not (folder / CONFIG_FILE).is_file():
        return _without_adapter(folder, path, model)
    adapter = Adapter(folder)
    saved = read_rates_file(folder)
    learn_roles(adapter, saved)
    groups, source = group_rows(folder, adapter, saved)
    weights, base = _base_weights(adapter, model)
    automatic = (saved or {}).get("auto", {})
    layers = [vars(_layer(pair, adapter, weights, automatic.get("layers", {}))) for pair in adapter.pairs]
    description = {
        "path": path,
        "kind": _kind(folder),
        "adapter": _header(adapter),
        "base": base,
        "training": {**_training(folder, saved), "rates_from": source},
        "groups": groups,
        "layers": layers,
    }
    _tell_of_changes(folder)
    return description


def _tell_of_changes(folder: Path) -> None:
    """Warns of changed files. They are shown all the same, since a person may have edited them on purpose."""
    changed = manifest.faults(folder, lambda name: name != CARD_FILE) if manifest.is_sealed(folder) else {}
    if changed:
        told = ", ".join(f"{name} {fault}" for name, fault in list(changed.items())[:_NAMED_IN_MESSAGE])
        more = f" and {len(changed) - _NAMED_IN_MESSAGE} more" if len(changed) > _NAMED_IN_MESSAGE else ""
        warnings.warn(f"{folder}: {told}{more} since it was written", LoraPlusWarning, stacklevel=3)


def _find(path: str) -> Path:
    """The folder, or the snapshot of a hub repository."""
    folder = folder_unless_hub_name(path)
    return folder or _snapshot(path, [CONFIG_FILE, *WEIGHT_FILES, "config.json", "loraplus.json", METRICS_FILE])


def _snapshot(name: str, files: list[str], *, only_here: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=only_here))
    except Exception as error:  # the hub client raises many kinds; each means that it is not to be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"there is no folder {name}, and the hub did not give it ({reason})") from None


def _kind(folder: Path) -> str:
    if any((folder / name).is_file() for name in (OPTIMIZER_FILE, STATE_FILE)):
        return "checkpoint"
    return "training output" if (folder / METRICS_FILE).is_file() else "adapter"


def _without_adapter(folder: Path, path: str, model: str | None) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        if model is not None:
            raise InputError(f"{path} is a model without an adapter; --model is for the base weights of an adapter")
        from loraplus.inspection.model import adaptable_layers

        return {"path": path, "kind": "model", **adaptable_layers(str(folder))}
    inside = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG_FILE}"))
    hint = f"; the folders {', '.join(inside)} in it do" if inside else ""
    raise InputError(f"{path} holds neither an adapter ({CONFIG_FILE}) nor a model (config.json){hint}")


def _base_weights(adapter: Adapter, model: str | None) -> tuple[BaseWeights | None, dict[str, Any]]:
    """The base weights, and where they are from or why they are not at hand."""
    name = model or adapter.config.get("base_model_name_or_path") or None
    facts: dict[str, Any] = {"name": name, "folder": None, "note": None}
    if not isinstance(name, str):
        return None, {**facts, "name": None, "note": "no base model is recorded"}
    files = ["config.json", "*.safetensors", "model.safetensors.index.json"]
    folder = Path()
    try:
        folder = user_path(name)
        if not is_folder(folder):
            is_hub_name = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
            if model and not is_hub_name:
                raise InputError(f"--model: there is no folder {model}")
            if not is_hub_name:
                raise InputError(f"there is no folder {name}")
            folder = _snapshot(name, files, only_here=model is None)
        weights = BaseWeights(folder, adapter)
    except InputError as error:
        if model:
            raise InputError(f"--model: {str(error).removeprefix('--model: ')}") from None
        note = str(error) if folder.is_dir() else "not on this machine"
        return None, {**facts, "note": note}
    return weights, {**facts, "folder": str(folder)}


def _header(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    trained = adapter.trained()
    return {
        **{{"r": "rank", "lora_alpha": "alpha"}.get(name, name): config.get(name) for name in _SHOWN},
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "scalings": sorted({pair.scaling for pair in adapter.pairs}),
        "trained_tensors": len(trained),
        "trained_parameters": sum(map(adapter.tensors.numel, trained)),
        "saved_untrained_tensors": len(adapter.roles) - len(trained),
    }


def _training(folder: Path, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """η_A, λ and the step, where they are written down."""
    facts: dict[str, Any] = dict.fromkeys(("lr", "lr_ratio", "auto", "step", "max_steps", "eval_loss"))
    if saved is not None:
        facts |= {"lr": saved.get("lr"), "lr_ratio": saved.get("lr_ratio"), "auto": "auto" in saved}
        automatic = saved.get("auto", {})
        if automatic.get("lr_a") and automatic.get("lr_b"):
            facts |= {"lr": automatic["lr_a"], "lr_ratio": automatic["lr_b"] / automatic["lr_a"]}
    for name, keys in _FACTS.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            known = content if isinstance(content, dict) else {}
            of_training = {ours: known.get(theirs) for theirs, ours in keys.items()}
            if known is not content or not all(type(value) in (int, float, NoneType) for value in of_training.values()):
                raise InputError(f"{folder / name} is damaged: it does not hold the facts of a run")
            facts |= {name: value for name, value in of_training.items() if value is not None}
    return facts


def _layer(pair: Pair, adapter: Adapter, base: BaseWeights | None, automatic: Mapping[str, Any]) -> LayerReport:
    a, b = adapter.tensors.get(pair.a), adapter.tensors.get(pair.b)
    inner = a
    if pair.diagonal is not None:  # KaSA
        inner = adapter.tensors.get(pair.diagonal).reshape(-1, *[1] * (a.dim() - 1)) * a
    # Factors of experts are stacked; QALoRA and BD-LoRA put something between the input and A.
    other_product = a.shape[0] != pair.rank or adapter.config.get("use_qalora") or adapter.config.get("use_bdlora")
    size = None if other_product else update_size(inner, b, pair.scaling)
    norm = base.norm(pair.name) if base else None
    rates: Row = _rates_of_layer(pair.name, automatic)
    return LayerReport(
        name=pair.name,
        rank=pair.rank,
        alpha=pair.alpha,
        scaling=pair.scaling,
        is_embedding=pair.is_embedding,
        dora=pair.magnitude is not None,
        rms_a=rms(a.float()),
        rms_b=rms(b.float()),
        update_norm=size and size.frobenius,
        update_spectral=size and size.spectral,
        base_norm=norm,
        relative_update=size.frobenius / norm if size and norm else None,
        effective_rank=size and size.effective_rank,
        untrained=not bool(torch.count_nonzero(a if pair.is_embedding else b)),
        finite=all(math.isfinite(float(factor.sum())) for factor in (a, b)),
        lr_a=rates.get("lora_A"),
        lr_b=rates.get("lora_B"),
    )


def _rates_of_layer(layer: str, automatic: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer asked for; the adapter's name follows the layer's if it is not "default"."""
    for name, rates in automatic.items():
        if name.removeprefix(_PREFIX).partition(" (")[0] == layer and isinstance(rates, dict):
            return rates
    return {}
