"""Puts an adapter on a frozen base model: which layers it goes to, and what is trained in full beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D

from loraplus.errors import InputError
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.loading import first_line
from loraplus.tasks.pretrained import head_modules, load_base, load_decoder

_ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)


def load_classifier(
    config: TaskConfig,
    label_names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    problem_type: str | None = None,
) -> PeftModel:
    """Loads the base model with a fresh head and a fresh adapter, both initialised from `seed`.

    Args:
        config: model, adapter and targets.
        label_names: one name a class, in the order of the logits.
        tokenizer: gives the padding token.
        problem_type: of transformers, which chooses the loss. Default: one class a text.
        seed: of the head and of A; runs with one seed start from one point.

    Returns:
        A PEFT model; only the adapter and the head train, and both are saved with it.

    Raises:
        InputError: the model cannot be loaded, is not whole, or has none of the target modules.
    """
    set_seed(seed)
    kind = {} if problem_type is None else {"problem_type": problem_type}
    model, fresh = load_base(
        config.model,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        trust_remote_code=config.trust_remote_code,
        **kind,
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    head = head_modules(model, fresh)
    return _adapted(
        config,
        model,
        task_type=TaskType.SEQ_CLS,
        modules_to_save=head,
        # PEFT would put factors on layers of the head, which are trained in full, and then fail or lose one of the two.
        exclude_modules=rf"(?:{'|'.join(map(re.escape, head))})(?:\..*)?" if head else None,
    )


def load_language_model(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PeftModel:
    """Loads a causal language model, in 4 bits if asked to, with a fresh adapter initialised from `seed`.

    Args:
        config: model, adapter and targets.
        tokenizer: every token of which the model must know.
        seed: of A; runs with one seed start from one point.

    Returns:
        A PEFT model; only the adapter trains.

    Raises:
        InputError: the model cannot be loaded, is not whole, does not fit the tokenizer, or has none of the target
            modules, or the output layer is one of these.
    """
    set_seed(seed)
    options: dict[str, Any] = {"quantization_config": four_bits(config)} if config.load_in_4bit else {}
    model = load_decoder(config.model, trust_remote_code=config.trust_remote_code, **options)
    keep_differentiable(model)
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise InputError(
            f"the tokenizer of {config.model} has {len(tokenizer)} tokens and the model knows {known}; they do not "
            "belong together"
        )
    adapted = _adapted(config, model, task_type=TaskType.CAUSAL_LM)
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise InputError("--target-modules: the output layer cannot be adapted, since TRL computes its loss in parts")
    if config.load_in_4bit:
        _check_runs(config, adapted)
    return adapted


def without_dropout(model: nn.Module) -> None:
    """Turns off dropout: torch's layers of it, and rates that a module of transformers keeps as a number of its own."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def keep_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from converting 4-bit weights for a CPU's inference kernels.

    It does so at the first evaluation, for good, and no gradient passes through such a layer: training would go on and
    learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def _check_runs(config: TaskConfig, model: PeftModel) -> None:
    """Runs the model once: 4-bit kernels take certain widths only, which shows at the first step."""
    try:
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise InputError(f"--load-in-4bit: {config.model} does not run in 4 bits here ({first_line(error)})") from None


def four_bits(config: TaskConfig) -> BitsAndBytesConfig:
    """NF4 with its scales quantised once more, as in QLoRA."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else torch.float32,
    )


def _adapted(config: TaskConfig, model: nn.Module, **options: Any) -> PeftModel:
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config, model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        **options,
    )
    try:
        return get_peft_model(model, lora)
    except (ValueError, TypeError) as error:
        raise InputError(f"cannot put the adapter on {config.model}: {first_line(error)}") from None


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
