"""Loads the frozen base model and its tokenizer, and puts the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from loraplus.errors import InputError
from loraplus.tasks.config import TaskConfig

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)


def resolve_model(model: str) -> str:
    """Turns a model folder into its absolute path, and leaves a hub name as it is.

    Raises:
        InputError: a path that does not exist, or a folder without a model's files.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {model} has no config.json; it is not a transformers model")
        if not any(found for pattern in _WEIGHT_FILES for found in path.glob(pattern)):
            raise InputError(f"model folder {model} has no weights (model.safetensors or pytorch_model.bin)")
        return str(path.resolve())
    looks_like_path = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path:
        raise InputError(f"there is no model folder {model}")
    return model


def _from_pretrained(loader: Any, model: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not Path(model).is_dir():
            raise InputError(
                f"cannot load the model {model}: no such folder here, and the hub did not give it ({reason})"
            ) from None
        raise InputError(f"cannot load the model in {model}: {reason}") from None


def load_tokenizer(config: TaskConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token and with the length that the model takes."""
    model = resolve_model(config.model)
    tokenizer = _from_pretrained(AutoTokenizer, model, trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    positions = getattr(
        _from_pretrained(AutoConfig, model, trust_remote_code=config.trust_remote_code), "max_position_embeddings", None
    )
    if positions:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_classifier(
    config: TaskConfig, label_names: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PeftModel:
    """Loads the base model with a fresh head and a fresh adapter, both initialised from `seed`.

    Args:
        config: model, adapter and targets.
        label_names: one name a class, in the order of the logits.
        tokenizer: gives the padding token.
        seed: of the head and of A; runs with one seed start from one point.

    Returns:
        A PEFT model; only the adapter and the head train.

    Raises:
        InputError: the model cannot be loaded, or has none of the target modules.
    """
    set_seed(seed)
    model = _from_pretrained(
        AutoModelForSequenceClassification,
        resolve_model(config.model),
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        trust_remote_code=config.trust_remote_code,
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config, model),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    try:
        return get_peft_model(model, lora)  # type: ignore[return-value]
    except ValueError as error:
        raise InputError(f"cannot put the adapter on {config.model}: {str(error).splitlines()[0]}") from None


def target_modules(config: TaskConfig, model: torch.nn.Module) -> str | list[str]:
    """The layers to adapt: the user's, else PEFT's for this architecture, else every linear layer.

    Raises:
        InputError: a name that no layer ends in; the message lists those that exist.
    """
    if config.target_modules is None:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(getattr(model.config, "model_type", ""))
        return list(known) if known else "all-linear"
    names = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    if names == ["all-linear"]:
        return "all-linear"
    adaptable = [name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
    unknown = [name for name in names if not any(path == name or path.endswith("." + name) for path in adaptable)]
    if unknown or not names:
        there = ", ".join(sorted({path.rpartition(".")[2] for path in adaptable}))
        raise InputError(
            f"--target-modules: {config.model} has no layer {', '.join(map(repr, unknown or ['']))}; it has {there} "
            "(or all-linear)"
        )
    return names
