"""Every PEFT layout that one LoraConfig can produce, by role and by name."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_bert
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from loraplus import NoLoraFactorsError, NoTrainableParametersError, Role, UnknownAdapterParameterError, register_layout
from loraplus.roles import FACTORS, clean_name, trainable_parameters, unregister_layout


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=48,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)


def counts(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in trainable_parameters(model):
        found[entry.role.value] = found.get(entry.role.value, 0) + 1
    return found


CASES = {
    "linear": (tiny_bert, {"target_modules": ["query", "value"]}, {"lora_A": 4, "lora_B": 4}),
    "Conv1D of GPT-2": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"lora_A": 2, "lora_B": 2}),
    "convolutions and attention": (
        Convolutions, {"target_modules": ["c1", "c2", "c3", "attention"]}, {"lora_A": 5, "lora_B": 5},
    ),
    "embedding": (
        tiny_bert, {"target_modules": ["word_embeddings", "query"]},
        {"lora_embedding_A": 1, "lora_embedding_B": 1, "lora_A": 2, "lora_B": 2},
    ),
    "DoRA": (tiny_bert, {"target_modules": ["query"], "use_dora": True}, {"lora_A": 2, "lora_B": 2, "magnitude": 2}),
    "DoRA on an embedding": (
        tiny_bert, {"target_modules": ["word_embeddings"], "use_dora": True},
        {"lora_embedding_A": 1, "lora_embedding_B": 1, "magnitude": 1},
    ),
    "rsLoRA": (tiny_bert, {"target_modules": ["query"], "use_rslora": True}, {"lora_A": 2, "lora_B": 2}),
    "modules_to_save": (
        tiny_bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        {"lora_A": 2, "lora_B": 2, "head": 2},
    ),
    "an embedding in modules_to_save": (
        tiny_gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]},
        {"lora_A": 2, "lora_B": 2, "embedding": 1},
    ),
    "bias of all": (
        tiny_bert, {"target_modules": ["query"], "bias": "all"}, {"lora_A": 2, "lora_B": 2, "norm_bias": 19},
    ),
    "bias of adapted layers": (
        tiny_bert, {"target_modules": ["query"], "bias": "lora_only"}, {"lora_A": 2, "lora_B": 2, "norm_bias": 2},
    ),
    "bias of B": (
        tiny_bert, {"target_modules": ["query"], "lora_bias": True}, {"lora_A": 2, "lora_B": 2, "norm_bias": 2},
    ),
    "trainable tokens": (
        tiny_gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]},
        {"lora_A": 2, "lora_B": 2, "embedding": 1},
    ),
    "tied embedding and head, both adapted": (
        tiny_gpt2, {"target_modules": ["wte", "lm_head"]},
        {"lora_embedding_A": 1, "lora_embedding_B": 1, "lora_A": 1, "lora_B": 1},
    ),
    "tied embedding and head, both saved": (
        tiny_gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True},
        {"lora_A": 2, "lora_B": 2, "embedding": 1},
    ),
    "KaSA": (
        tiny_bert, {"target_modules": ["query"], "kasa_config": KasaConfig()}, {"lora_A": 2, "lora_B": 2, "other": 2},
    ),
    "MonteCLoRA": (
        tiny_bert, {"target_modules": ["query"], "monteclora_config": MontecloraConfig()},
        {"lora_A": 2, "lora_B": 2, "other": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_peft_layout_gets_its_roles(case):
    base, options, expected = CASES[case]
    model = get_peft_model(base(), LoraConfig(r=2, **options))
    assert counts(model) == expected
    for entry in trainable_parameters(model):
        if entry.role in (Role.A, Role.EMBEDDING_A):
            assert ".lora_A." in entry.name or ".lora_embedding_A." in entry.name


def test_a_linear_b_is_the_factor_that_is_zero_at_start():
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "dense"]))
    for entry in trainable_parameters(model):
        assert (entry.parameter.abs().max() == 0) == (entry.role is Role.B)


ADAPTER_NAMES = [
    "lora_A", "lora_B", "lora_embedding_A", "weight", "bias", "modules_to_save", "base_layer", "lora_magnitude_vector",
    "trainable_tokens_delta", "module", "hada_w1_b", "lora_E",
]  # fmt: skip


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_an_adapters_name_does_not_matter(name):
    options = {"target_modules": ["query", "word_embeddings"], "use_dora": True, "modules_to_save": ["classifier"]}
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, **options), adapter_name=name)
    plain = get_peft_model(tiny_bert(), LoraConfig(r=2, **options))
    assert [e.role for e in trainable_parameters(model)] == [e.role for e in trainable_parameters(plain)]


@pytest.mark.parametrize("name", ["hada_w1_b", "hada_w2_a", "lokr_w1", "lora_A"])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_an_adapters_name_does_not_matter_in_other_products(kind, name):
    models = [get_peft_model(nn.Sequential(nn.Linear(64, 128)), kind(r=2, target_modules=["0"]), adapter_name=adapter)
              for adapter in (name, "default")]  # fmt: skip
    assert counts(models[0]) == counts(models[1])
    assert [e.role for e in trainable_parameters(models[0])] == [e.role for e in trainable_parameters(models[1])]


def test_a_frozen_adapter_is_left_out():
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]), adapter_name="lora_A")
    model.add_adapter("lora_B", LoraConfig(r=2, target_modules=["query"]))
    for active in ("lora_B", "lora_A"):
        model.set_adapter(active)
        entries = trainable_parameters(model)
        assert counts(model) == {"lora_A": 2, "lora_B": 2}
        assert all(entry.name.endswith(f".{active}.weight") for entry in entries)


def test_a_base_module_called_like_a_factor_does_not_confuse():
    base = nn.ModuleDict({"lora_B": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "lora_A": nn.Linear(4, 4)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lora_B.0", "lora_A"]))
    assert counts(model) == {"lora_A": 2, "lora_B": 2}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    roles = {entry.name: entry.role for entry in trainable_parameters(model)}
    for name in ("lora_B.0.base_layer", "lora_B.1", "lora_A.base_layer"):
        assert roles[f"base_model.model.{name}.weight"] not in FACTORS, name
        assert roles[f"base_model.model.{name}.bias"] not in FACTORS, name


class NamedByChance(nn.Module):
    """Trainable modules whose names hold "lora", beside an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.exploration_head = nn.Linear(8, 2)
        self.floral = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
        self.lora_like = nn.Linear(8, 2)
        self.my_lora_gate = nn.Linear(8, 1)
        self.explorations = nn.Parameter(torch.ones(3))
        self.Lora = nn.Embedding(4, 8)
        self.q = nn.Linear(8, 8)


def test_a_name_is_no_evidence():
    model = get_peft_model(NamedByChance(), LoraConfig(r=2, target_modules=["q"]))
    names = {name for name, _ in NamedByChance().named_parameters() if not name.startswith("q.")}
    for name in names:
        model.base_model.model.get_parameter(name).requires_grad_(True)
    roles = {entry.name.removeprefix("base_model.model."): entry.role for entry in trainable_parameters(model)}
    assert names < set(roles) and not FACTORS & {roles[name] for name in names}
    assert roles["Lora.weight"] is Role.EMBEDDING


def home_made(down: str, up: str, **others: nn.Module) -> nn.Module:
    layer = nn.Module()
    layer.linear = nn.Linear(8, 6).requires_grad_(False)
    setattr(layer, down, nn.Linear(8, 2, bias=False))
    setattr(layer, up, nn.Linear(2, 6, bias=False))
    for name, module in others.items():
        setattr(layer, name, module)
    return nn.Sequential(layer)


def test_a_home_made_layer_with_the_usual_names_is_recognised():
    assert counts(home_made("lora_A", "lora_B")) == {"lora_A": 1, "lora_B": 1}


@pytest.mark.parametrize(
    ("down", "up"), [("lora_left", "lora_right"), ("lora_P", "lora_Q"), ("my_lora_in", "my_lora_out")]
)
def test_factors_under_names_that_nobody_knows_are_refused_not_guessed(down, up):
    for model in (home_made(down, up), nn.ModuleList([home_made(down, up), home_made("lora_A", "lora_B")])):
        with pytest.raises(UnknownAdapterParameterError, match=rf"0\.{down}\.weight .*is an adapter's factor"):
            trainable_parameters(model)


def heads(model: nn.Module) -> set[str]:
    return {e.name.removeprefix("base_model.model.") for e in trainable_parameters(model) if e.role is Role.HEAD}


def unfrozen(base: nn.Module, names: list[str], targets: list[str]) -> nn.Module:
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    for name in names:
        base.get_submodule(name).requires_grad_(True)
    return model


class Classifier(nn.Module):
    """A user's own: a layer before an adapted backbone, and a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 16)
        self.backbone = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
        self.norm = nn.LayerNorm(16)
        self.score = nn.Linear(16, 3)


def untied_gpt2() -> GPT2LMHeadModel:
    model = tiny_gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


HEADS = {
    "the output layer of a language model": (
        lambda: unfrozen(untied_gpt2(), ["lm_head"], ["c_attn"]), {"lm_head.weight"},
    ),
    "a classifier": (
        lambda: unfrozen(tiny_bert(), ["classifier"], ["query"]), {"classifier.weight", "classifier.bias"},
    ),
    "a pooler inside the model is none": (
        lambda: unfrozen(tiny_bert(), ["bert.pooler", "classifier"], ["query"]),
        {"classifier.weight", "classifier.bias"},
    ),
    "the end of a sequence": (
        lambda: unfrozen(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), ["1", "2"], ["0"]),
        {"2.weight", "2.bias"},
    ),
    "what a user puts behind": (Classifier, {"score.weight", "score.bias"}),
    "each of several models": (
        lambda: nn.ModuleDict({key: unfrozen(untied_gpt2(), ["lm_head"], ["c_attn"]) for key in ("unet", "encoder")}),
        {"unet.base_model.model.lm_head.weight", "encoder.base_model.model.lm_head.weight"},
    ),
    "an output layer with an adapter on it": (
        lambda: unfrozen(untied_gpt2(), ["lm_head.base_layer"], ["c_attn", "lm_head"]), {"lm_head.base_layer.weight"},
    ),
    "nothing, where only biases train": (
        lambda: get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], bias="all")), set(),
    ),
    "nothing, where it is the embedding too": (lambda: unfrozen(tiny_gpt2(), ["lm_head"], ["c_attn"]), set()),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.filterwarnings("ignore")
def test_an_output_layer_that_is_unfrozen_is_a_head(case):
    build, expected = HEADS[case]
    assert heads(build()) == expected
    assert heads(torch.compile(build())) == expected


@pytest.mark.filterwarnings("ignore")
def test_an_output_layer_that_is_the_embedding_too_is_an_embedding():
    model = unfrozen(tiny_gpt2(), ["lm_head"], ["c_attn"])
    roles = {entry.name.rpartition("transformer.")[2]: entry.role for entry in trainable_parameters(model)}
    assert roles["wte.weight"] is Role.EMBEDDING and Role.HEAD not in roles.values()


class ScaledLinear(nn.Linear):
    """An output layer with factors and a trainable scale of its own."""

    def __init__(self) -> None:
        super().__init__(16, 3)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.zeros(3, 2))
        self.scale = nn.Parameter(torch.ones(()))


class WithOutput(nn.Sequential):
    def get_output_embeddings(self) -> nn.Module:
        return self[-1]


@pytest.mark.parametrize("trains", ["nothing", "the bias", "the weight"])
def test_what_a_layout_knows_on_the_output_layer_is_no_head(trains):
    """The layer's own parameters are a head where its weight trains; the adapter's are none."""
    output = ScaledLinear()
    output.bias.requires_grad_(trains != "nothing")
    output.weight.requires_grad_(trains == "the weight")
    model = WithOutput(nn.Linear(4, 16).requires_grad_(False), nn.ReLU(), output)
    register_layout("scaled", lambda name, owner: Role.OTHER if name.endswith(".scale") else None)
    try:
        roles = {entry.name.removeprefix("2."): entry.role for entry in trainable_parameters(model)}
    finally:
        unregister_layout("scaled")
    expected = {"lora_A": Role.A, "lora_B": Role.B, "scale": Role.OTHER}
    if trains == "the bias":
        expected["bias"] = Role.NORM_BIAS
    if trains == "the weight":
        expected |= {"bias": Role.HEAD, "weight": Role.HEAD}
    assert roles == expected


def test_compiled_and_wrapped_models_keep_their_roles():
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    compiled = torch.compile(model)
    assert [e.name for e in trainable_parameters(compiled)] == [e.name for e in trainable_parameters(model)]
    assert counts(nn.DataParallel(model)) == counts(model)


@given(st.lists(st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module"]), max_size=4))
def test_wrapper_prefixes_vanish_from_names(prefixes):
    assert clean_name(".".join([*prefixes, "layer", "lora_A", "default", "weight"])) == "layer.lora_A.default.weight"


def test_no_trainable_parameter_is_an_error_that_says_so():
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    model.requires_grad_(False)
    with pytest.raises(NoTrainableParametersError, match="no trainable parameter"):
        trainable_parameters(model)


@pytest.mark.parametrize(
    "model",
    [tiny_bert, lambda: get_peft_model(tiny_bert(), IA3Config(target_modules=["query"], feedforward_modules=[]))],
)
def test_a_model_without_lora_factors_is_an_error_that_says_so(model):
    with pytest.raises(NoLoraFactorsError, match="no LoRA factor"):
        trainable_parameters(model())


def test_an_unknown_adapter_factor_is_named_not_guessed():
    model = get_peft_model(tiny_bert(), AdaLoraConfig(target_modules=["query"], total_step=10))
    with pytest.raises(UnknownAdapterParameterError, match="lora_E"):
        trainable_parameters(model)


def test_a_registered_layout_is_recognised():
    class DownUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    roles = {"down.weight": Role.A, "up.weight": Role.B}
    with pytest.raises(NoLoraFactorsError):
        trainable_parameters(DownUp())
    register_layout("down-up", lambda name, owner: roles.get(name))
    try:
        assert counts(DownUp()) == {"lora_A": 1, "lora_B": 1}
    finally:
        unregister_layout("down-up")


def test_what_comes_before_frozen_layers_is_no_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    layers = model.base_model.model
    for middle, last, heads in ((True, False, []), (False, True, ["4"]), (True, True, ["2", "4"])):
        layers[2].requires_grad_(middle)
        layers[4].requires_grad_(last)
        found = {entry.name.split(".")[-2] for entry in trainable_parameters(model) if entry.role is Role.HEAD}
        assert sorted(found) == heads
