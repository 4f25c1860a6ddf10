"""Loads a base model and its tokenizer from a folder or the hub, and makes sure that they are whole.

transformers fills in what a checkpoint lacks at random and goes on. For a head that is right: it is trained and saved
with the adapter. Anywhere else it means that the weights are not those of this model.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from loraplus.errors import InputError
from loraplus.tasks.config import TaskConfig

LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError, EOFError, pickle.UnpicklingError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers and PEFT raise for files that are missing, damaged, or of another model."""

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# RoBERTa and its relatives number positions from pad_token_id + 1, so that many rows of the table are never used.
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
_NAMED_IN_MESSAGE = 3
_NO_LIMIT = 10**9  # a tokenizer without a length says 10³⁰
_FAST_MULTIPLE = 8


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


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def from_pretrained(loader: Any, model: str, **options: Any) -> Any:
    """`loader.from_pretrained`, whose errors become one line.

    Raises:
        InputError: a file is missing, damaged or of another kind.
    """
    try:
        return loader.from_pretrained(model, **options)
    except LOADING_ERRORS as error:
        if not Path(model).is_dir():
            raise InputError(
                f"cannot load the model {model}: no such folder here, and the hub did not give it ({first_line(error)})"
            ) from None
        raise InputError(f"cannot load the model in {model}: {first_line(error)}") from None


def load_tokenizer(config: TaskConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token and with the length that the model takes.

    Raises:
        InputError: it cannot be loaded, knows no words, or has nothing to pad with.
    """
    model = resolve_model(config.model)
    tokenizer = from_pretrained(AutoTokenizer, model, trust_remote_code=config.trust_remote_code)
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


def load_base(model: str, **options: Any) -> tuple[Any, list[str]]:
    """Loads a classifier, and says which of its modules the checkpoint does not hold.

    Args:
        model: folder or hub name.
        **options: of `from_pretrained`.

    Returns:
        (model, names of the new modules of its head). A head of another size is made anew.

    Raises:
        InputError: it cannot be loaded, or lacks weights outside its head.
    """
    loaded, info = from_pretrained(
        AutoModelForSequenceClassification, resolve_model(model), output_loading_info=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    other_size = {key for key, *_ in info["mismatched_keys"]}
    unset = set(info["missing_keys"]) | other_size
    _refuse(model, loaded, sorted(key for key in unset if head_of(loaded, key) is None), other_size)
    return loaded, sorted({head for key in unset if (head := head_of(loaded, key)) is not None})


def load_decoder(model: str, **options: Any) -> Any:
    """Loads a causal language model whose checkpoint holds every weight (an output layer may be tied to the input).

    Args:
        model: folder or hub name.
        **options: of `from_pretrained`.

    Raises:
        InputError: it cannot be loaded, is no causal language model, or lacks weights.
    """
    loaded, info = from_pretrained(
        AutoModelForCausalLM, resolve_model(model), output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    other_size = {key for key, *_ in info["mismatched_keys"]}
    _refuse(model, loaded, sorted(set(info["missing_keys"]) | other_size), other_size)
    return loaded


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


def head_modules(model: Any, fresh: Iterable[str]) -> list[str]:
    """All modules to train and save in full: the whole head beside the base model, and what is new inside it."""
    beside = {
        head for key, _ in model.named_parameters() if (head := head_of(model, key)) is not None and "." not in head
    }
    return sorted({*beside, *fresh})
