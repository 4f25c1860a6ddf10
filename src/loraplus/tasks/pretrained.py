"""Loads a base model and its tokenizer from a folder or the hub, and makes sure that they are whole.

transformers fills in what a checkpoint lacks at random and goes on. For a head that is right: it is trained and saved
with the adapter. Anywhere else it means that the weights are not those of this model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from loraplus.errors import InputError
from loraplus.files.paths import resolve_model
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.loading import check_fits, from_pretrained, load_any_tokenizer

# RoBERTa and its relatives number positions from pad_token_id + 1, so that many rows of the table are never used.
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
_SUMMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMED_IN_MESSAGE = 3
_NO_LIMIT = 10**9  # a tokenizer without a length says 10³⁰
_FAST_MULTIPLE = 8


def load_tokenizer(config: TaskConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token and with the length that the model takes.

    Raises:
        InputError: it cannot be loaded, knows no words, or has nothing to pad with.
    """
    model = resolve_model(config.model)
    tokenizer = load_any_tokenizer(model, trust_remote_code=config.trust_remote_code)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise InputError(
            f"the tokenizer of {config.model} knows special tokens only; put the tokenizer's files (tokenizer.json, or "
            "vocab.txt, …) beside the weights"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of {config.model} has neither a padding token nor an end-of-text token")
    positions = _positions(from_pretrained(AutoConfig, model, trust_remote_code=config.trust_remote_code))
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def _positions(config: Any) -> int | None:
    """Tokens that the table of positions can tell apart; None if there is no such limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:  # XLNet says -1
        return None
    if config.model_type in _POSITIONS_AFTER_PADDING and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    return positions


def load_base(model: str, **options: object) -> tuple[Any, list[str]]:
    """Loads a classifier, and says which of its modules the checkpoint does not hold.

    Args:
        model: folder or hub name.
        **options: of `from_pretrained`.

    Returns:
        (model, names of the new modules of its head). A head of another size is made anew.

    Raises:
        InputError: it cannot be loaded, or lacks weights outside its head.
    """
    loaded, unset, other_size = _load(AutoModelForSequenceClassification, model, **options)
    _refuse(model, loaded, sorted(key for key in unset if head_of(loaded, key) is None), other_size)
    _check_finite(model, loaded, unset)
    return loaded, sorted({head for key in unset if (head := head_of(loaded, key)) is not None})


def load_decoder(model: str, **options: object) -> Any:
    """Loads a causal language model whose checkpoint holds every weight (an output layer may be tied to the input).

    Args:
        model: folder or hub name.
        **options: of `from_pretrained`.

    Raises:
        InputError: it cannot be loaded, is no causal language model, or lacks weights.
    """
    loaded, unset, other_size = _load(AutoModelForCausalLM, model, **options)
    _refuse(model, loaded, sorted(unset), other_size)
    _check_finite(model, loaded, unset)
    return loaded


def _load(loader: Any, model: str, **options: Any) -> tuple[Any, set[str], set[str]]:
    """(model, weights that the checkpoint does not set, those of them that have another size there)."""
    folder = resolve_model(model)
    check_fits(loader, folder, **options)
    loaded, info = from_pretrained(loader, folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    other_size = {key for key, *_ in info["mismatched_keys"]}
    return loaded, set(info["missing_keys"]) | other_size, other_size


@torch.no_grad()
def _check_finite(model: str, loaded: Any, unset: set[str]) -> None:
    """Refuses weights that are NaN or infinite: training would diverge, and the rates would be blamed."""
    for name, weight in loaded.named_parameters():
        # A sum is much faster than looking at each, and NaN or infinite if one of them is.
        if name in unset or weight.dtype not in _SUMMED or math.isfinite(float(weight.sum(dtype=torch.float32))):
            continue
        if broken := int((~weight.isfinite()).sum()):
            raise InputError(
                f"{model}: {broken} of {weight.numel()} numbers in {name} are NaN or infinite, so this model computes "
                "nothing; take another copy of it"
            )


def check_tokens(model: Any, largest: int, name: str) -> None:
    """Refuses token ids that a model has no embedding of: the tokenizer is another model's.

    Args:
        model: with an embedding of tokens.
        largest: id that the tokenizer makes.
        name: of the model, for the message.

    Raises:
        InputError: there is no such row.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise InputError(
            f"the tokenizer of {name} makes token {largest} and the model knows {known} of them; they do not belong "
            "together"
        )


def _refuse(model: str, loaded: Any, unset: list[str], other_size: set[str]) -> None:
    """Refuses weights that the checkpoint did not set."""
    if unset:
        what = "has weights of another size than the configuration says" if unset[0] in other_size else "lacks weights"
        more = f" and {len(unset) - _NAMED_IN_MESSAGE} more" if len(unset) > _NAMED_IN_MESSAGE else ""
        raise InputError(
            f"{model} {what}: {', '.join(unset[:_NAMED_IN_MESSAGE])}{more}; these are not the weights of a "
            f"{loaded.config.model_type} of this shape"
        )


def checked_length(config: TaskConfig, default: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length in tokens that examples are held to: --max-length, else the default.

    Raises:
        InputError: shorter than 2, or longer than the model takes.
    """
    length = default if config.max_length is None else config.max_length
    if not 2 <= length <= tokenizer.model_max_length:
        limited = tokenizer.model_max_length < _NO_LIMIT
        span = f"lie between 2 and the {tokenizer.model_max_length} tokens that {config.model} takes"
        raise InputError(f"--max-length must {span if limited else 'be at least 2'}, got {length}")
    return length


def padding_multiple(max_length: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """8, which is fast, unless a longest example would be padded beyond the positions that the model has."""
    fits = math.ceil(max_length / _FAST_MULTIPLE) * _FAST_MULTIPLE <= tokenizer.model_max_length
    return _FAST_MULTIPLE if fits else None


def head_of(model: Any, key: str) -> str | None:
    """The module of the head that a parameter belongs to, or None if it belongs to the base model.

    The head is what stands beside the base model, and a pooler inside it: language models are saved without one.
    """
    prefix = model.base_model_prefix + "." if model.base_model is not model else ""
    path = key.removeprefix(prefix).split(".")[:-1]
    outside = not key.startswith(prefix) if prefix else path[:1] in (["classifier"], ["score"])
    if outside:
        return path[0] if path else None
    pooler = next((index for index, part in enumerate(path) if "pool" in part), None)
    return None if pooler is None else prefix + ".".join(path[: pooler + 1])


def head_modules(model: nn.Module, fresh: Iterable[str]) -> list[str]:
    """All modules to train and save in full: the whole head beside the base model, and what is new inside it."""
    beside = {
        head for key, _ in model.named_parameters() if (head := head_of(model, key)) is not None and "." not in head
    }
    return sorted({*beside, *fresh})
