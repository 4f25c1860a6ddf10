"""Labels texts with a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from loraplus.errors import InputError
from loraplus.tasks.model import resolve_model


def load_adapter(adapter: str, base_model: str | None = None) -> tuple[Any, Any]:
    """Loads what `loraplus train` wrote, through transformers and PEFT alone.

    Args:
        adapter: folder with adapter_config.json and config.json.
        base_model: folder or name of the base model. Default: the one the adapter was trained on.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        InputError: no adapter there, or the base model cannot be found.
    """
    folder = Path(adapter)
    for name in ("adapter_config.json", "config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{adapter} is not an adapter that `loraplus train` wrote: it has no {name}")
    if base_model is None:
        base_model = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = AutoConfig.from_pretrained(adapter)
    try:
        base = AutoModelForSequenceClassification.from_pretrained(resolve_model(str(base_model)), config=config)
        model = PeftModel.from_pretrained(base, adapter)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the base model {base_model} of {adapter} ({str(error).splitlines()[0]}); name it with --model"
        ) from None
    return model.eval(), AutoTokenizer.from_pretrained(adapter)


@torch.inference_mode()
def predict(
    model: Any, tokenizer: Any, texts: list[str], *, batch_size: int = 64, on_batch: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """The most likely label of each text with its probability.

    Args:
        model: from `load_adapter`.
        tokenizer: from `load_adapter`; cuts texts as in training.
        texts: to be labelled.
        batch_size: texts at once; texts of like length are batched together.
        on_batch: told how many more texts are done.

    Returns:
        One {"prediction", "probability"} a text, in the given order.
    """
    names = model.config.id2label
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: list[dict[str, Any]] = [{} for _ in texts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in chosen], truncation=True, padding=True, return_tensors="pt")
        probabilities = model(**batch.to(model.device)).logits.float().softmax(dim=-1)
        top, label = probabilities.max(dim=-1)
        for i, value, index in zip(chosen, top.tolist(), label.tolist(), strict=True):
            rows[i] = {"prediction": names[index], "probability": round(value, 6)}
        if on_batch:
            on_batch(len(chosen))
    return rows
