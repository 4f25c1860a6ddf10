"""The models of the scoreboard: small, built from configurations, each with the names that must learn at B's rate."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

PEFT_B = r"\.lora_B\.[^.]+\.weight$"


class CannotRun(Exception):
    """What a case needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Case:
    """A model, and by hand which of its trainable parameters are B: the factor that makes a linear layer's output."""

    build: Callable[[], nn.Module]
    b: str = PEFT_B


def library(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRun(f"{name.partition('.')[0]}: {error}") from None


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def adapted(base: Callable[[], nn.Module] = bert, **options) -> nn.Module:
    return get_peft_model(base(), LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options}))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3)


def second_adapter() -> nn.Module:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("second")
    return model


def named_like_a_factor() -> nn.Module:
    return get_peft_model(bert(), LoraConfig(r=4, target_modules=["query", "value"]), adapter_name="lora_A")


def unfrozen_by_hand() -> nn.Module:
    model = adapted()
    model.base_model.model.classifier.requires_grad_(True)  # type: ignore[union-attr]
    return model


def llama4() -> nn.Module:
    """Experts stored (experts, in, out), y = x W: what PEFT calls lora_A has the columns of the output."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, vocab_size=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    parameters = ["feed_forward.experts.gate_up_proj"]
    return adapted(lambda: Llama4ForCausalLM(config), target_modules=[], target_parameters=parameters)


def mixtral() -> nn.Module:
    """Experts stored (experts, out, in), as a linear layer's weight is."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    parameters = ["experts.gate_up_proj"]
    return adapted(lambda: MixtralForCausalLM(config), target_modules=[], target_parameters=parameters)


def gpt2() -> nn.Module:
    """transformers' Conv1D, whose weight is stored (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return adapted(lambda: GPT2LMHeadModel(config), target_modules=["c_attn"], fan_in_fan_out=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)


def named_by_chance() -> nn.Module:
    """A head of the user's own, trained in full, whose name has lora_B in it and which has no partner."""
    base = bert()
    base.lora_B_head = nn.Linear(16, 2)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
    model.base_model.model.lora_B_head.requires_grad_(True)  # type: ignore[union-attr]
    return model


def tied() -> nn.Module:
    """The adapters of the embedding and of the output layer are on one memory, one the transpose of the other."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return adapted(lambda: GPT2LMHeadModel(config), target_modules=["wte", "lm_head"], ensure_weight_tying=True)


def unet() -> nn.Module:
    return library("diffusers").UNet2DConditionModel(  # type: ignore[attr-defined]
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=2, layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None,
    )  # fmt: skip


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def diffusers_unet() -> nn.Module:
    model = unet()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))  # type: ignore[operator]
    return model


def diffusers_processors() -> nn.Module:
    lora = library("diffusers.models.lora")
    return nn.ModuleDict({f"{part}_lora": lora.LoRALinearLayer(8, 8, 2) for part in ("to_q", "to_v")})


def kohya() -> nn.Module:
    """LyCORIS' network for kohya's trainer: modules called lora_unet_… and lora_te_…"""
    create = library("lycoris.kohya").create_network  # type: ignore[attr-defined]
    encoder, denoiser = text_encoder(), unet()
    network = create(1.0, 4, 1.0, None, encoder, denoiser, algo="locon", preset="attn-mlp")
    network.apply_to(encoder, denoiser, True, True)
    return network.requires_grad_(True)


def litgpt() -> nn.Module:
    lora = library("litgpt.lora")
    config = lora.Config(
        block_size=8, vocab_size=32, padded_vocab_size=32, n_layer=1, n_head=2, n_embd=16, lora_r=2, lora_alpha=4,
        lora_query=True, lora_value=True, lora_projection=True,
    )  # fmt: skip
    model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model, bias="none")
    return model


def torchtune() -> nn.Module:
    peft = library("torchtune.modules.peft")
    model = nn.ModuleDict({"q_proj": peft.LoRALinear(8, 8, rank=2, alpha=4.0)})
    peft.set_trainable_params(model, peft.get_adapter_params(model))
    return model


RATES: dict[str, Case] = {
    "linear layers": Case(adapted),
    "rsLoRA": Case(lambda: adapted(use_rslora=True)),
    "several adapters, the second active": Case(second_adapter),
    "an adapter called lora_A": Case(named_like_a_factor, r"\.lora_B\.lora_A\.weight$"),
    "experts stored (experts, in, out): Llama 4": Case(llama4, r"\.lora_A\.[^.]+\.weight$"),
    "experts stored (experts, out, in): Mixtral": Case(mixtral),
    "GPT-2's Conv1D (fan_in_fan_out)": Case(gpt2),
    "nn.MultiheadAttention": Case(lambda: adapted(Attention, target_modules=["attention"])),
    "a head that is called lora_B by chance": Case(named_by_chance),
    "lora_bias=True": Case(lambda: adapted(lora_bias=True)),
    "a model under torch.compile": Case(lambda: torch.compile(adapted())),  # type: ignore[arg-type,return-value]
    "convolutions": Case(lambda: adapted(Convolutions, target_modules=["c1", "c2"])),
    "DoRA": Case(lambda: adapted(use_dora=True)),
    'bias="all"': Case(lambda: adapted(bias="all")),
    'bias="lora_only"': Case(lambda: adapted(bias="lora_only")),
    "a head (modules_to_save)": Case(lambda: adapted(modules_to_save=["classifier"])),
    "a head unfrozen by hand": Case(unfrozen_by_hand),
    "norms (modules_to_save)": Case(lambda: adapted(modules_to_save=["LayerNorm"])),
    "trainable tokens": Case(lambda: adapted(trainable_token_indices={"word_embeddings": [1, 2]})),
    "LoRA on an embedding": Case(lambda: adapted(target_modules=["query", "word_embeddings"])),
    "diffusers' U-Net, add_adapter": Case(diffusers_unet),
    "diffusers' own LoRA layers": Case(diffusers_processors, r"\.up\.weight$"),
    "kohya layout (LyCORIS)": Case(kohya, r"\.lora_up\.weight$"),
    "litgpt": Case(litgpt, r"\.lora_B$"),
    "torchtune": Case(torchtune, r"\.lora_b\.weight$"),
}
