"""Merges an adapter into its base model: a plain model folder, checked to give the same logits.

It is merged in single precision and rounded once, to the data type that is written. The folder gets its name only
after it has been read back and compared.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from loraplus.errors import InputError, MergeMismatchError
from loraplus.files.output import check_unicode, check_writable, is_empty, not_ours
from loraplus.files.paths import resolve_model, resolved
from loraplus.files.replacing import put_back, replace_folder
from loraplus.files.scratch import folder_beside
from loraplus.files.single import read_json, write_json
from loraplus.files.whole import follow_umask
from loraplus.tasks.adapter import load_causal
from loraplus.tasks.loading import first_line, from_pretrained, loading
from loraplus.tasks.predict import load_adapter
from loraplus.tasks.saved_adapter import MERGE_FILE, adapter_settings, base_of, loading_base_of

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How far a logit may be off, relative to the largest one, by the data type that is written."""
_CLASSIFIER = "SEQ_CLS"
_CHECKED_TEXTS, _CHECKED_TOKENS = 4, 16


def merge(
    adapter: str,
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes base model and adapter as one model that needs neither PEFT nor loraplus.

    Args:
        adapter: folder that PEFT (causal language models) or `loraplus train` (those and classifiers) wrote.
        output: folder to make: safetensors, configurations, tokenizer, chat template, and `merge.json`.
        model: base model. Default: the one that the adapter names.
        dtype: float32, float16 or bfloat16. Default: the base model's.
        overwrite: replace the files of an earlier merge; others in the folder stay.
        trust_remote_code: run code that the base model brings.

    Returns:
        What `merge.json` holds: adapter, base, task, dtype, the files written, and the check: `max_difference` of a
        logit between the written model and base with adapter, over `max_logit`: `relative_difference`, with its
        `tolerance`.

    Raises:
        InputError: adapter or base model are missing, damaged, quantized or do not fit, an adapter that cannot be
            merged, or an output that must not be replaced.
        MergeMismatchError: the written model's logits are off by more than the tolerance; nothing is left of it.
    """
    if dtype is not None and dtype not in TOLERANCES:
        raise InputError(f"--dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    check_unicode({"adapter": adapter, "output": output, "model": model})
    settings = adapter_settings(adapter)
    base = base_of(adapter, model)
    target = resolved(output)  # a link stays one
    _check_output(target, {"the adapter": adapter, "the base model": base}, overwrite)
    loader, adapted, tokenizer = _load(adapter, model, settings.get("task_type"), base, trust_remote_code)
    dtype = dtype or str(adapted.dtype).removeprefix("torch.")
    if dtype not in TOLERANCES:
        raise InputError(f"{base} is in {dtype}; say --dtype, one of {', '.join(TOLERANCES)}")
    adapted.float()
    rows = _fixed_inputs(adapted)
    expected = _logits(adapted, rows)
    merged = _merged(adapted, adapter).to(getattr(torch, dtype))
    with loading(f"cannot write to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(target) as partial:
        _save(merged, tokenizer, partial, target)
        del adapted, merged
        remote = {"trust_remote_code": trust_remote_code}
        written = from_pretrained(loader, str(partial), dtype=torch.float32, **remote).eval()
        record = {
            "adapter": str(resolved(adapter)),
            "base": base,
            "task": settings.get("task_type"),
            "dtype": dtype,
            "parameters": written.num_parameters(),
            **_compare(expected, _logits(written, rows), dtype, target),
            "files": sorted([MERGE_FILE, *(path.name for path in partial.iterdir())]),
        }
        write_json(partial / MERGE_FILE, record)
        try:
            replace_folder(partial, target, _files_of_merge(target) or set())
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror}") from None
    return {"output": str(output), **record}


def _check_output(target: Path, sources: dict[str, str], overwrite: bool) -> None:
    if Path.cwd().is_relative_to(target):
        raise InputError("--output is or holds the folder that this runs in, which cannot be replaced; name another")
    for what, name in sources.items():
        source = resolved(name)
        if source.exists() and source.is_relative_to(target):
            raise InputError(f"--output {target} is or holds {what}; name another folder")
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target} is a file; name a folder")
    check_writable(target)
    put_back(target)
    if not is_empty(target):
        if not overwrite:
            raise InputError(f"{target} is not empty: --overwrite replaces an earlier merge, or name another --output")
        if _files_of_merge(target) is None:
            raise not_ours(target, f"{MERGE_FILE} of an earlier merge")


def _files_of_merge(folder: Path) -> set[str] | None:
    """What an earlier merge wrote there; None if there was none."""
    record = read_json(folder / MERGE_FILE) if (folder / MERGE_FILE).is_file() else None
    files = record.get("files") if isinstance(record, dict) else None
    return set(files) if isinstance(files, list) and all(isinstance(name, str) for name in files) else None


def _load(
    adapter: str, model: str | None, task: str | None, base: str, trust_remote_code: bool
) -> tuple[Any, Any, Any]:
    """(auto class that reads the merged model, model with adapter, tokenizer)."""
    if task not in (_CLASSIFIER, "CAUSAL_LM", None):
        raise InputError(f"{adapter} is an adapter for {task}; merge takes classifiers and causal language models")
    with loading_base_of(adapter):
        config = from_pretrained(AutoConfig, resolve_model(base), trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{base} is quantized, and merging would round the adapter with it; name the base model in full precision "
            "with --model"
        )
    if task == _CLASSIFIER:
        return AutoModelForSequenceClassification, *load_adapter(adapter, model, trust_remote_code=trust_remote_code)
    adapted, tokenizer, _ = load_causal(model, adapter, trust_remote_code=trust_remote_code)
    return AutoModelForCausalLM, adapted, tokenizer


def _fixed_inputs(model: Any) -> torch.Tensor:
    """Fixed token ids (texts, tokens) from the whole vocabulary, without padding, which models treat apart."""
    config = model.config.get_text_config()
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (_CHECKED_TEXTS, _CHECKED_TOKENS), generator=drawn)
    return (
        rows
        if config.pad_token_id is None
        else rows.masked_fill(rows == config.pad_token_id, (config.pad_token_id + 1) % config.vocab_size)
    )


@torch.inference_mode()
def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Logits (texts, tokens, vocabulary) or (texts, outputs) of token ids (texts, tokens)."""
    rows = rows.to(model.device)
    return model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.float().cpu()


def _merged(adapted: Any, adapter: str) -> Any:
    """The base model with the adapter in its weights."""
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type.value
        raise InputError(f"{adapter} is a {kind} adapter, which has no weights to merge")
    tied = _untie(adapted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*(tied|tie_word_embeddings)")  # seen to on both sides of this
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
        raise InputError(f"cannot merge {adapter}: {first_line(error)}") from None
    if tied:
        _tie_again(merged)
    return merged


def _untie(model: Any) -> bool:
    """Gives the output layer weights of its own if it shares the embedding's: an adapter may change one of the two."""
    embedding, head = (_inner(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    if head is None or embedding is None or head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _inner(layer: nn.Module) -> Any:
    """The base model's layer inside of PEFT's."""
    for name in ("base_layer", "original_module"):
        layer = getattr(layer, name, layer)
    return layer


def _tie_again(model: Any) -> None:
    """Ties the two again if they are still equal. If not, both are written, and the configuration says so."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(embedding.weight, head.weight)
    if equal:
        head.weight = embedding.weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = equal


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, target: Path) -> None:
    with loading(f"cannot write to {target}"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        follow_umask(folder)


def _compare(expected: torch.Tensor, written: torch.Tensor, dtype: str, target: Path) -> dict[str, float]:
    """How far the written logits (texts, …) are from the expected ones; refuses more than rounding explains."""
    largest = float(expected.abs().max())
    difference = float((written - expected).abs().max())
    relative = difference / largest if largest else difference
    if not relative <= TOLERANCES[dtype]:  # also if it is no number
        raise MergeMismatchError(
            f"the merged model's logits are off by {relative:.2g} of the largest, more than {TOLERANCES[dtype]:g} for "
            f"{dtype}; {target} was not written (a wider --dtype rounds less)"
        )
    return {"max_difference": difference, "max_logit": largest, "relative_difference": relative,
            "tolerance": TOLERANCES[dtype]}  # fmt: skip
