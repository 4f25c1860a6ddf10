"""What kind of adapter a model has, where that kind has no factors A and B for LoRA+ to set."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_ROTATES = "it rotates the weights instead of adding a product of A and B"
_RANDOM_BASES = "its bases are random and frozen, and it trains what scales or mixes them"
_SHARED_FACTORS = "its A and B are random, frozen and shared by all layers, and it trains vectors that scale them"
_COEFFICIENTS = "it trains coefficients of a transform of the weights"
_TOKENS = "it trains virtual tokens, and no layer has factors"

# PEFT's name of a type: the name it goes by, and what it trains.
_KINDS = {
    "VERA": ("VeRA", _SHARED_FACTORS),
    "PVERA": ("PVeRA", _SHARED_FACTORS),
    "RANDLORA": ("RandLoRA", _RANDOM_BASES),
    "TINYLORA": ("TinyLoRA", _RANDOM_BASES),
    "UNILORA": ("Uni-LoRA", _RANDOM_BASES),
    "VBLORA": ("VB-LoRA", "its factors are mixed from one bank of vectors that A and B share"),
    "OFT": ("OFT", _ROTATES),
    "BOFT": ("BOFT", _ROTATES),
    "HRA": ("HRA", _ROTATES),
    "PSOFT": ("PSOFT", _ROTATES),
    "ROAD": ("RoAd", _ROTATES),
    "IA3": ("IA³", "it trains vectors that scale activations"),
    "LN_TUNING": ("LN-tuning", "it trains the norms of the model itself"),
    "FOURIERFT": ("FourierFT", _COEFFICIENTS),
    "WAVEFT": ("WaveFT", _COEFFICIENTS),
    "C3A": ("C³A", _COEFFICIENTS),
    "SHIRA": ("SHiRA", "it trains single entries of the weights"),
    "BEFT": ("BEFT", "it trains biases"),
    "MISS": ("MiSS", "it trains one matrix a layer, which meets the input and makes the output"),
    "OSF": ("OSF", "it trains singular vectors and values of the weights"),
    "LOKR": ("LoKr", "at this rank its matrices are whole, not factored; give it a lower r or decompose_both=True"),
    "TRAINABLE_TOKENS": ("trainable-tokens", "it trains rows of an embedding"),
    "PROMPT_TUNING": ("prompt-tuning", _TOKENS),
    "MULTITASK_PROMPT_TUNING": ("multitask-prompt-tuning", _TOKENS),
    "P_TUNING": ("P-tuning", _TOKENS),
    "PREFIX_TUNING": ("prefix-tuning", _TOKENS),
    "CPT": ("CPT", _TOKENS),
    "CARTRIDGE": ("Cartridge", _TOKENS),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", "it trains prompts inside the attention layers"),
}
_OTHERWISE = "no known layout says which of its parameters is A and which B (loraplus.register_layout teaches one)"
_FROZEN = "all its LoRA factors are frozen; load the adapter with is_trainable=True, or unfreeze them"


def cause(model: nn.Module) -> str | None:
    """Why a model with an adapter of PEFT has no LoRA factor to train, as the end of a sentence; None without adapter.

    Read off the `peft_config` that PEFT, diffusers and transformers keep on a model.
    """
    names = {
        str(getattr(kind, "value", kind))
        for module in model.modules()
        if isinstance(configs := getattr(module, "peft_config", None), Mapping)
        for config in configs.values()
        if (kind := getattr(config, "peft_type", None)) is not None
    }
    for name in sorted(names - {"LORA"}):
        title, trains = _KINDS.get(name, (name, _OTHERWISE))
        return (
            f"this is {'an' if title[0] in 'AEIO' else 'a'} {title} adapter: {trains}, so LoRA+ has nothing to set; "
            "train it with a plain optimizer, or take LoRA: peft.LoraConfig(...)"
        )
    return _FROZEN if names else None
