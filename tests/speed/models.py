"""Tiny models of transformers with adapters, and what one training step of them gives."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from older import needs_encoder_decoders
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

_BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2, "attention_dropout": 0.0,
}  # fmt: skip
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
         "initializer_range": 0.2}  # fmt: skip
_OPT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
        "max_position_embeddings": 32, "dropout": 0.0, "word_embed_proj_dim": 16, "init_std": 0.2}  # fmt: skip
_DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32,
           "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "initializer_range": 0.2}  # fmt: skip
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
       "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip

CLASSIFIERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertConfig, hf.BertForSequenceClassification, _BERT),
    "roberta": (hf.RobertaConfig, hf.RobertaForSequenceClassification, {**_BERT, "pad_token_id": 0}),
    "electra": (hf.ElectraConfig, hf.ElectraForSequenceClassification, {**_BERT, "embedding_size": 8}),
    "distilbert": (hf.DistilBertConfig, hf.DistilBertForSequenceClassification, _DISTIL),
    "deberta": (hf.DebertaV2Config, hf.DebertaV2ForSequenceClassification,
                {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "llama-classifier": (hf.LlamaConfig, hf.LlamaForSequenceClassification, _LLAMA),
}  # fmt: skip
CAUSAL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, _LLAMA),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, _LLAMA),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, _LLAMA),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, _LLAMA),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**_LLAMA, "query_pre_attn_scalar": 8}),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {**_LLAMA, "query_pre_attn_scalar": 8}),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, _GPT2),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, _OPT),
}
SEQ2SEQ: dict[str, tuple[Any, Any, dict[str, Any]]] = {"t5": (hf.T5Config, hf.T5ForConditionalGeneration, _T5)}
FAMILIES = {**CLASSIFIERS, **CAUSAL, **SEQ2SEQ}


def bare(family: str, **options: Any) -> Any:
    """A model with random weights; its norms and biases are not what they start as, either."""
    if family in SEQ2SEQ:
        needs_encoder_decoders()
    config, model, settings = FAMILIES[family]
    torch.manual_seed(0)
    found = model(config(**{**settings, **options}))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


def adapted(family: str = "bert", lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """A model with LoRA on all linear layers, both factors random."""
    model = bare(family, **options)
    torch.manual_seed(1)
    layers = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"] if family == "distilbert" else "all-linear"
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": layers, "init_lora_weights": False,
                           "task_type": task_of(family), **(lora or {})})  # fmt: skip
    return get_peft_model(model, config).train()


def task_of(family: str) -> str:
    return "SEQ_CLS" if family in CLASSIFIERS else "CAUSAL_LM" if family in CAUSAL else "SEQ_2_SEQ_LM"


def batch_of(family: str, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Token rows of several lengths; labels of a causal model are masked in part."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=numbers)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    ids = ids * mask
    if family in CLASSIFIERS:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Of every trained parameter, after `loss.backward()`; they are removed from the model."""
    if loss is not None:
        loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def step(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of a batch."""
    torch.manual_seed(seed)
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, by the size of each expected one."""
    assert found.keys() == expected.keys()
    assert found
    worst, largest = 0.0, max((value.abs().max().item() for value in expected.values() if value.numel()), default=0.0)
    for name, value in expected.items():
        assert found[name].dtype is value.dtype
        assert found[name].shape == value.shape
        if value.numel():  # what cancels out to nothing is rounding of the others: 1e-10 of 1e-4 is 45 float64 epsilons
            scale = max(value.double().abs().max().item(), 1e-4 * largest) or 1.0
            worst = max(worst, (found[name].double() - value.double()).abs().max().item() / scale)
    return worst
