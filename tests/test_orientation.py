"""Wrapped parameters: the factor that meets the input is A, whatever PEFT calls it.

The witness is the gradient: where a feature of a layer's input is always 0, the factor that meets the input has no
gradient there. That is numbers, not names, sizes or code.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_roles import tiny_gpt2
from torch import nn
from torch.nn import functional as F

import loraplus
from loraplus import Role
from loraplus.adapters.orientation import input_side
from loraplus.roles import trainable_parameters

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48,
    "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "Llama4Text": {"intermediate_size_mlp": 48, "bos_token_id": 1, "eos_token_id": 2},
    "GptOss": {},
    "Mixtral": {},
    "Qwen3Moe": {"num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "GraniteMoe": {},
}  # fmt: skip


def adapted(base: nn.Module, *parameters: str) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=list(parameters)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)  # B is zero at start, and then A has no gradient
    return model


def feature_gradient(name: str, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient at feature 0 of what a factor meets or makes, and all of it: columns of lora_A, rows of lora_B."""
    gradient = parameter.grad
    return (gradient[:, 0] if ".lora_A." in name else gradient[0]), gradient


def assert_a_meets_the_input(model: nn.Module) -> None:
    entries = trainable_parameters(model)
    assert sorted(entry.role for entry in entries) == [Role.A, Role.B]
    for entry in entries:
        at_zero, gradient = feature_gradient(entry.name, entry.parameter)
        assert gradient.any(), entry.name
        assert bool(at_zero.any()) is (entry.role is Role.B), entry.name


@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_of_experts_a_is_the_factor_that_meets_the_input(kind, which):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | MODELS[kind])
    base = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    for name, parameter in base.named_parameters():
        if "experts" in name:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter)
    model = adapted(base, f"experts.{which}")
    for module in model.modules():
        if getattr(module, "parameter_name", None) != which:
            continue
        layer = module.get_base_layer()
        if which == "gate_up_proj":  # feature 0 of the layer's input is 0
            module.register_forward_pre_hook(lambda _, args: (F.pad(args[0][..., 1:], (1, 0)), *args[1:]))
        else:  # gate 0 is 0, and so is what comes through it
            weight = layer.gate_up_proj.data
            (weight[:, 0] if weight.shape[-1] == SHAPE["hidden_size"] else weight[..., 0]).zero_()
    ids = torch.randint(1, 64, (4, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert_a_meets_the_input(model)


@pytest.mark.filterwarnings("ignore")
def test_of_two_parameters_of_one_layer_each_has_its_own_a():
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**SHAPE | MODELS["Llama4Text"])
    model = adapted(transformers.Llama4ForCausalLM(config), "experts.gate_up_proj", "experts.down_proj")
    entries = trainable_parameters(model)
    assert sorted(entry.role for entry in entries) == [Role.A, Role.A, Role.B, Role.B]
    sizes = {tuple(entry.parameter.shape): entry.role for entry in entries}  # the rank and experts make 8
    assert sizes == {(32, 8): Role.A, (8, 96): Role.B, (48, 8): Role.A, (8, 32): Role.B}


class Layer(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, outer))


class ByMatmul(Layer):
    def forward(self, x):
        return torch.matmul(x, self.weight)


class ThroughLocals(Layer):
    def forward(self, x):
        weight = self.weight.to(x.dtype)
        turned = weight.transpose(0, 1)
        return F.linear(x, turned)


class ByEinsum(Layer):
    def forward(self, x):
        return torch.einsum("bi,io->bo", x, self.weight)


class ByEinsumOfRows(Layer):
    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.weight)


class ThroughAMethod(Layer):
    def _project(self, x, weight):
        return x @ weight

    def forward(self, x):
        return self._project(x, self.weight)


class FromTheLeft(Layer):
    def forward(self, x):
        return (self.weight @ x.T).T


class LayersAsLinear(Layer):
    def forward(self, x):
        return F.linear(x, weight=self.weight)


@pytest.mark.parametrize(
    "layer", [ByMatmul, ThroughLocals, ByEinsum, ByEinsumOfRows, ThroughAMethod, FromTheLeft, LayersAsLinear]
)
@pytest.mark.parametrize(("inner", "outer"), [(6, 10), (10, 6), (8, 8)])
def test_of_a_users_layer_the_code_says_which_factor_meets_the_input(layer, inner, outer):
    by_rows = layer in (ByEinsumOfRows, FromTheLeft, LayersAsLinear)
    base = nn.Sequential(layer(outer, inner) if by_rows else layer(inner, outer))
    model = adapted(base, "0.weight")
    x = torch.randn(5, inner)
    x[:, 0] = 0
    (model(x) * torch.randn(5, outer)).sum().backward()
    assert_a_meets_the_input(model)


def test_gpt2s_conv1d_and_a_linear_layer_as_parameters():
    model = adapted(tiny_gpt2(), "c_attn.weight")
    assert {e.name.split(".")[-3]: e.role for e in trainable_parameters(model)} == {
        "lora_A": Role.B, "lora_B": Role.A,
    }  # fmt: skip
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=1e-3, lr_ratio=16)
    table = loraplus.verify(model, optimizer, 16)
    assert {e.name.split(".")[-3]: e.lr for e in table.entries} == {"lora_A": pytest.approx(16e-3), "lora_B": 1e-3}
    plain = adapted(nn.Sequential(nn.Linear(6, 10)), "0.weight")
    assert [e.role for e in trainable_parameters(plain)] == [Role.A, Role.B]


def test_a_table_of_embeddings_as_a_parameter_has_embedding_factors():
    model = adapted(nn.Sequential(nn.Embedding(12, 6)), "0.weight")
    found = {e.name.split(".")[-3]: e.role for e in trainable_parameters(model)}
    assert found == {"lora_A": Role.EMBEDDING_B, "lora_B": Role.EMBEDDING_A}  # the rows that ids pick are lora_B's


class Opaque(Layer):
    """What it does with the weight is not in its code."""

    def forward(self, x):
        return self.operation(x, self.weight)


def told(caught) -> list[str]:
    return [str(warning.message) for warning in caught if "does not tell" in str(warning.message)]


def test_where_the_code_does_not_tell_pefts_names_are_taken_and_that_is_said():
    assert input_side(Opaque, "weight") is None
    model = adapted(nn.Sequential(Opaque(6, 10)), "0.weight")
    with pytest.warns(loraplus.LoraPlusWarning, match="the code of Opaque does not tell which dimension of weight"):
        assert [entry.role for entry in trainable_parameters(model)] == [Role.A, Role.B]


def test_each_creation_and_each_verification_of_each_model_says_it_once():
    for _ in range(2):
        model = adapted(nn.Sequential(Opaque(6, 10), Opaque(10, 4)), "weight")
        with pytest.warns(loraplus.LoraPlusWarning) as caught:
            optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=1e-3, lr_ratio=16)
        assert len(told(caught)) == 1 and Path(caught[0].filename).name == Path(__file__).name
        with pytest.warns(loraplus.LoraPlusWarning) as caught:
            loraplus.verify(model, optimizer, 16)
        assert len(told(caught)) == 1


def test_training_says_nothing_more():
    model = adapted(nn.Sequential(Opaque(6, 10)), "0.weight")
    with pytest.warns(loraplus.LoraPlusWarning):
        optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=1e-3, lr_ratio=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", loraplus.LoraPlusWarning)
        for _ in range(101):  # the watch looks at the model at steps 1 and 101
            optimizer.step()


def test_attention_and_a_layers_own_word_for_its_layout_are_understood():
    assert input_side(nn.MultiheadAttention, "in_proj_weight") == -1

    class Experts(Opaque):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__(6, 10)
            self.weight = nn.Parameter(torch.randn(3, 6, 10))

    model = adapted(nn.Sequential(Experts()), "0.weight")
    assert [entry.role for entry in trainable_parameters(model)] == [Role.A, Role.B]
