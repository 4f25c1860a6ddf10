"""Labels texts with a trained adapter: a class each, a number each, or any number of labels each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from loraplus.errors import InputError
from loraplus.files.paths import is_file, user_path
from loraplus.tasks.adapter import put_adapter
from loraplus.tasks.loading import from_pretrained, load_any_tokenizer, loading
from loraplus.tasks.pretrained import load_base
from loraplus.tasks.saved_adapter import adapter_settings, base_of, loading_base_of
from loraplus.tasks.scores import in_data_scale
from loraplus.tasks.targets import SEPARATOR


def load_adapter(adapter: str, base_model: str | None = None, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Loads what `loraplus train` wrote, through transformers and PEFT alone.

    Args:
        adapter: folder with adapter_config.json and config.json.
        base_model: folder or name of the base model. Default: the one the adapter was trained on.
        trust_remote_code: run code that the base model brings.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        InputError: no adapter there, a damaged one, or a base model that cannot be found or is another.
    """
    settings = adapter_settings(adapter)
    if settings.get("task_type") == "CAUSAL_LM":
        raise InputError(f"{adapter} is an adapter of a language model, which labels nothing; try `loraplus generate`")
    folder = user_path(adapter)
    if not is_file(folder / "config.json"):
        raise InputError(
            f"{adapter} is not a classifier that `loraplus train` wrote: it has no config.json; "
            "for a language model's adapter there is `loraplus generate`"
        )
    name = base_of(adapter, base_model)
    config = from_pretrained(AutoConfig, str(folder), trust_remote_code=trust_remote_code)
    _check_labels(adapter, config)
    with loading_base_of(adapter):
        base, fresh = load_base(name, config=config, trust_remote_code=trust_remote_code)
    unsaved = [head for head in fresh if not head.endswith(tuple(settings.get("modules_to_save") or ()))]
    if unsaved:
        raise InputError(
            f"{name} lacks weights of {', '.join(unsaved)}, which {adapter} does not bring; name the base model "
            "that it was trained on with --model"
        )
    model = put_adapter(base, adapter, name)
    tokenizer = load_any_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    with loading(f"{adapter} cannot be used", "; its files do not belong together"):
        predict(model, tokenizer, ["a", "b c"])
    return model, tokenizer


def _check_labels(adapter: str, config: object) -> None:
    names = getattr(config, "id2label", None)
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        raise InputError(f"the config.json of {adapter} does not number its labels (id2label); it is damaged")


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The most likely label of each text with its probability; or a number, or all likely labels.

    Args:
        model: from `load_adapter`.
        tokenizer: from `load_adapter`; cuts texts as in training.
        texts: to be labelled.
        batch_size: texts at once; texts of like length are batched together.
        on_batch: told how many more texts are done.

    Returns:
        One {"prediction", "probability"} a text, in the given order. A number has no probability; labels are joined by
        "|", and every label's probability stands in {"probability of LABEL"}.
    """
    return answers(outputs_of(model, tokenizer, texts, batch_size=batch_size, on_batch=on_batch), model.config)


@torch.inference_mode()
def outputs_of(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The logits of each text (texts, outputs), in the given order; arguments as of `predict`."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    logits = torch.empty((len(texts), model.config.num_labels))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in chosen], truncation=True, padding=True, return_tensors="pt")
        # in single precision, since half cannot tell a probability of 0.9999 from 1
        logits[chosen] = model(**batch.to(model.device)).logits.float().cpu()
        if on_batch:
            on_batch(len(chosen))
    return logits


def answers(logits: torch.Tensor, config: Any) -> list[dict[str, Any]]:
    """What `predict` gives for the logits (texts, outputs) of a model with this configuration."""
    return _ROWS.get(config.problem_type, _classes)(logits, config)


def _classes(logits: torch.Tensor, config: Any) -> list[dict[str, Any]]:
    """The likeliest class of each text. Logits (texts, classes)."""
    top, label = logits.softmax(dim=-1).max(dim=-1)
    return [
        {"prediction": config.id2label[index], "probability": round(value, 6)}
        for value, index in zip(top.tolist(), label.tolist(), strict=True)
    ]


def _numbers(logits: torch.Tensor, config: object) -> list[dict[str, Any]]:
    """The number of each text, in the scale of the training data. Logits (texts, 1)."""
    return [{"prediction": round(value, 6)} for value in in_data_scale(config, logits.numpy()).tolist()]


def _sets(logits: torch.Tensor, config: Any) -> list[dict[str, Any]]:
    """The labels that are likelier than not, and the probability of each. Logits (texts, labels)."""
    names = [config.id2label[index] for index in range(logits.shape[-1])]
    return [
        {
            "prediction": SEPARATOR.join(name for name, value in zip(names, values, strict=True) if value > 0.5),
            **{f"probability of {name}": round(value, 6) for name, value in zip(names, values, strict=True)},
        }
        for values in logits.sigmoid().tolist()
    ]


_ROWS = {"regression": _numbers, "multi_label_classification": _sets}
