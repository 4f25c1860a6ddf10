"""What an adapter could go to in a model: its layers by name and width, from the configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loraplus.tasks.loading import check_layers, from_pretrained, loading


def adaptable_layers(model: str) -> dict[str, Any]:
    """The linear layers of a model folder, grouped by last name and width. No weights are read or made.

    Args:
        model: folder with a config.json.

    Returns:
        {"model_type", "layers": [{name, inputs, outputs, count, default}]}; `default` is whether PEFT adapts it in this
        architecture if nothing else is said.

    Raises:
        InputError: the configuration is damaged, or of no architecture that transformers knows.
    """
    import transformers
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    config = from_pretrained(transformers.AutoConfig, model)
    check_layers(model, config)
    with loading(f"cannot tell the layers of {model}"), torch.device("meta"):
        named = (getattr(config, "architectures", None) or [None])[0]
        named_class = getattr(transformers, str(named), None)
        if isinstance(named_class, type) and issubclass(named_class, transformers.PreTrainedModel):
            empty = named_class(config)
        else:
            empty = transformers.AutoModel.from_config(config, trust_remote_code=False)
    default = DEFAULTS.get(config.model_type, ())
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for path, module in empty.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            width = module.in_features, module.out_features
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            width = int(module.weight.shape[0]), int(module.weight.shape[1])
        else:
            continue
        row = rows.setdefault(
            (name, *width),
            {"name": name, "inputs": width[0], "outputs": width[1], "count": 0, "default": name in default},
        )
        row["count"] += 1
    return {"model_type": config.model_type, "layers": list(rows.values())}
