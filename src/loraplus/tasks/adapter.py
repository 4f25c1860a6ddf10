"""Loads a saved adapter on its base model, and makes sure that the two belong together.

PEFT warns of weights that the adapter lacks, says nothing of those the base model has no place for, and goes on; here
both are errors.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)

from loraplus.errors import InputError
from loraplus.files.paths import is_file, resolve_model, user_path
from loraplus.files.single import read_json
from loraplus.tasks.loading import first_line, from_pretrained, load_any_tokenizer, loading
from loraplus.tasks.pretrained import load_decoder
from loraplus.tasks.sandbox import check_patterns
from loraplus.tasks.saved_adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_settings, base_of, loading_base_of

_MOST_COPIES = 1000
_TOKENIZER_FILE = "tokenizer_config.json"


def put_adapter(base: Any, adapter: str, base_name: str) -> PeftModel:
    """Puts a saved adapter on a loaded base model, in evaluation mode.

    Args:
        base: the model; becomes part of what is returned.
        adapter: folder.
        base_name: of the model, for messages.

    Raises:
        InputError: the adapter is damaged, or was trained on a model of another shape.
    """
    folder = user_path(adapter)
    settings, modules = read_json(folder / CONFIG_FILE), [name for name, _ in base.named_modules()]
    check_patterns(str(folder / CONFIG_FILE), settings, modules)
    with loading(f"cannot put {adapter} on {base_name}", "; name the base model it was trained on with --model"):
        _check_size(folder, settings)
        try:
            model = PeftModel.from_pretrained(base, str(folder))
            if model.peft_config["default"].peft_type == PeftType.LORA:
                _check_fits(model, folder)
        except RuntimeError as error:
            raise ValueError(_reason(error)) from None
    return model.eval()


def load_causal(
    model: str | None, adapter: str | None = None, *, trust_remote_code: bool = False, **options: object
) -> tuple[Any, Any, str]:
    """Loads a causal language model, with an adapter on it if one is given.

    Args:
        model: folder or hub name. Default: the base model that the adapter names.
        adapter: folder that PEFT or `loraplus train` wrote.
        trust_remote_code: run code that the model brings.
        **options: of `from_pretrained`.

    Returns:
        (model in evaluation mode, tokenizer, name of the base model). The tokenizer is the adapter's if it has one,
        and a base model with fewer tokens than that grows to it, as PEFT's Auto classes do.

    Raises:
        InputError: neither is given, one is missing or damaged, they do not fit, or the model generates no text.
    """
    name = base_of(adapter, model)
    settings = adapter_settings(adapter) if adapter else {}
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{adapter} is an adapter for {settings['task_type']}, not of a causal language model")
    remote = {"trust_remote_code": trust_remote_code}
    with loading_base_of(adapter) if adapter and not model else nullcontext():
        _check_causal(name, from_pretrained(AutoConfig, resolve_model(name), **remote))
        base = load_decoder(name, **remote, **options)
    folder = None if adapter is None else user_path(adapter)
    own_tokenizer = folder is not None and is_file(folder / _TOKENIZER_FILE)
    tokenizer = load_any_tokenizer(str(folder) if own_tokenizer else resolve_model(name), **remote)
    if adapter is None:
        return base.eval(), tokenizer, name
    if own_tokenizer and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))
    adapted = put_adapter(base, adapter, name)
    _try(adapted, adapter, name)
    return adapted, tokenizer, name


@torch.inference_mode()
def _try(model: PeftModel, adapter: str, base_name: str) -> None:
    """Lets the model generate one token: some of an adapter's settings are not used before, and may be nonsense."""
    with loading(f"cannot use {adapter} on {base_name}", "; its settings are damaged"):
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        settings = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
        model.generate(input_ids=token, attention_mask=torch.ones_like(token), generation_config=settings)


def _check_causal(name: str, config: Any) -> None:
    kind = config.model_type
    is_encoder = kind in MASKED and not getattr(config, "is_decoder", False)
    if is_encoder or (kind not in CAUSAL and not getattr(config, "auto_map", None)):
        raise InputError(
            f"{name} is a {kind}, no causal language model (as Llama, Qwen or GPT-2 are): it writes no text"
        )


def _check_size(folder: Path, settings: Any) -> None:
    """Refuses settings that would have PEFT make far larger factors than the adapter's file holds."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        sizes = [size for name in file.keys() for size in file.get_slice(name).get_shape()]  # noqa: SIM118
    ranks = [settings.get("r"), *_numbers_in(settings.get("rank_pattern"))]
    steps = re.fullmatch(r"pissa_niter_(\d+)", str(settings.get("init_lora_weights")))
    copies = settings.get("layer_replication")
    for what, value, most in (
        ("a rank", max((rank for rank in ranks if isinstance(rank, int)), default=0), max(sizes, default=0)),
        ("a number of iterations", len(steps[1]) if steps else 0, 3),
        ("a number of copies of layers", len(copies) if isinstance(copies, list) else 0, _MOST_COPIES),
    ):
        if value > most:
            raise InputError(f"{folder / CONFIG_FILE} says {what} that no adapter like this has; it is damaged")


def _numbers_in(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _check_fits(model: PeftModel, folder: Path) -> None:
    """Compares the names of the saved weights with those that the adapter would save now."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        saved = _names(file.keys())
    needed = _names(get_peft_model_state_dict(model, save_embedding_layers=False))
    known = _names(get_peft_model_state_dict(model, save_embedding_layers=True))
    for names, what in (
        (saved - known, "the model has no place for its weights"),
        (needed - saved, "it lacks weights"),
    ):
        if names:
            raise ValueError(f"{what}: {min(names)}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")


def _names(keys: Any) -> set[str]:
    # Older versions of PEFT save a magnitude without the last part of its name.
    return {key.removesuffix(".weight") for key in keys}


def _reason(error: BaseException) -> str:
    """One line; torch's own first line only says that sizes follow."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.rstrip(".") for line in lines if line.startswith("size mismatch")), first_line(error))
