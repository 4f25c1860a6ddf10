"""Layouts other than PEFT's, on modules of the real libraries.

The independent witness is the layer itself: A must meet the layer's input and B must make its output, which shows in
their shapes on a layer of 12 inputs, 20 outputs and rank 3; and B is the factor that is zero at start.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import loraplus
from loraplus import NoLoraFactorsError, Role, UnknownAdapterParameterError
from loraplus.adapters.partners import partner_names
from loraplus.roles import register_layout, trainable_parameters, unregister_layout

IN, OUT, RANK = 12, 20, 3


def library(name: str):
    """Imports an optional library, or skips the test naming it."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed", exc_type=ImportError)


def roles(module: nn.Module) -> dict[str, Role]:
    return {entry.name: entry.role for entry in trainable_parameters(module)}


def lycoris_module(kind: str, base: nn.Module | None = None, **options) -> nn.Module:
    cls = getattr(library("lycoris.modules"), kind)
    base = nn.Linear(IN, OUT) if base is None else base
    return cls("lycoris_layer", base, lora_dim=RANK, alpha=1, **options)


def zero_at_start(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad and not p.any()}


def test_diffusers_own_layers():
    lora = library("diffusers.models.lora")
    for layer in (lora.LoRALinearLayer(IN, OUT, RANK), lora.LoRAConv2dLayer(IN, OUT, RANK, kernel_size=(3, 3))):
        holder = nn.ModuleDict({"processor": nn.ModuleDict({"to_q_lora": layer})})
        assert roles(holder) == {"processor.to_q_lora.down.weight": Role.A, "processor.to_q_lora.up.weight": Role.B}
        assert zero_at_start(holder) == {"processor.to_q_lora.up.weight"}


def test_diffusers_text_encoder_projection():
    lora = library("diffusers.models.lora")
    projection = lora.PatchedLoraProjection(nn.Linear(IN, OUT).requires_grad_(False), rank=RANK)
    assert roles(projection) == {"lora_linear_layer.down.weight": Role.A, "lora_linear_layer.up.weight": Role.B}


def test_a_unet_adapted_through_diffusers():
    from peft import LoraConfig

    diffusers = library("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=2, layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None,
    )  # fmt: skip
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "to_v", "conv1"]))
    found = roles(unet)
    assert set(found.values()) == {Role.A, Role.B}
    assert {name for name, role in found.items() if role is Role.B} == zero_at_start(unet)


def kohya_network(algo: str, **options):
    """LyCORIS' network in kohya's naming, over a small U-Net and text encoder."""
    diffusers, kohya = library("diffusers"), library("lycoris.kohya")
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=2, layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    network = kohya.create_network(1.0, RANK, 1.0, None, text_encoder, unet, algo=algo, preset="attn-mlp", **options)
    network.apply_to(text_encoder, unet, True, True)
    network.requires_grad_(True)
    return network


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_kohya_names_of_a_unet_and_a_text_encoder(algo):
    network = kohya_network(algo, factor=2)
    found = roles(network)
    assert any(name.startswith("lora_unet_") for name in found) and any(name.startswith("lora_te_") for name in found)
    by_last = {}
    for name, role in found.items():
        by_last.setdefault(name.removesuffix(".weight").rpartition(".")[2], set()).add(role)
    expected = {
        "locon": {"lora_down": {Role.A}, "lora_up": {Role.B}},
        "loha": {
            "hada_w1_a": {Role.B}, "hada_w1_b": {Role.A}, "hada_w2_a": {Role.B}, "hada_w2_b": {Role.A},
        },
        "lokr": {"lokr_w1": {Role.OTHER}, "lokr_w2_a": {Role.B}, "lokr_w2_b": {Role.A}, "lokr_w2": {Role.OTHER}},
    }[algo]  # fmt: skip
    assert by_last.items() <= expected.items() and by_last


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoConModule", {}),
        ("LoConModule", {"weight_decompose": True}),
        ("LohaModule", {}),
        ("DyLoraModule", {"block_size": 1}),
    ],
)
def test_lycoris_a_meets_the_input_and_b_is_zero_and_makes_the_output(kind, options):
    module = nn.ModuleDict({"lora_unet_layer": lycoris_module(kind, **options)})
    found = roles(module)
    assert {found[name] for name in zero_at_start(module)} == {Role.B}
    for name, parameter in module.named_parameters():
        if name.endswith("dora_scale"):
            assert found[name] is Role.MAGNITUDE
        else:
            assert (IN if found[name] is Role.A else OUT) in parameter.shape, name


@pytest.mark.parametrize("both", [False, True])
def test_lokr_starts_the_factor_at_zero_that_meets_the_input(both):
    base = nn.Linear(64, 128, bias=False)
    module = lycoris_module("LokrModule", base, factor=8, decompose_both=both)
    found = roles(module)
    assert zero_at_start(module) == {"lokr_w2_b"} and found["lokr_w2_b"] is Role.A
    assert found["lokr_w2_a"] is Role.B
    if both:
        assert (found["lokr_w1_a"], found["lokr_w1_b"]) == (Role.B, Role.A)
    else:
        assert found["lokr_w1"] is Role.OTHER


def test_lokr_b_scales_rows_of_the_output_and_a_columns_of_the_input():
    module = lycoris_module("LokrModule", nn.Linear(64, 128, bias=False), factor=4)
    found = roles(module)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, parameter in module.named_parameters():
        if found[name] not in (Role.A, Role.B):
            continue
        before = module.get_weight((128, 64)).detach().clone()
        row = found[name] is Role.B  # the factor's first row of outputs, or its first column of inputs
        with torch.no_grad():
            (parameter[0] if row else parameter[:, 0]).zero_()
        after = module.get_weight((128, 64)).detach()
        changed = (before != after).any(dim=1 if row else 0)
        assert changed.any() and not changed.all(), name  # some outputs (of B), some inputs (of A), never all
        with torch.no_grad():
            nn.init.normal_(parameter)


def test_lycoris_on_convolutions_keeps_the_core_at_lr():
    convolution = nn.Conv2d(IN, OUT, 3)
    found = roles(lycoris_module("LoConModule", convolution, use_tucker=True))
    assert found == {"lora_down.weight": Role.A, "lora_mid.weight": Role.OTHER, "lora_up.weight": Role.B}
    found = roles(lycoris_module("LohaModule", convolution, use_tucker=True))
    assert {name for name, role in found.items() if role is Role.OTHER} == {"hada_t1", "hada_t2"}


def test_lycoris_scalar_and_its_companions_keep_lr():
    assert roles(lycoris_module("LoConModule", use_scalar=True))["scalar"] is Role.OTHER
    holder = nn.ModuleDict(
        {
            "lycoris_a": lycoris_module("LoConModule"),
            "lycoris_full": lycoris_module("FullModule"),
            "lycoris_norm": library("lycoris.modules").NormModule("lycoris_norm", nn.LayerNorm(OUT)),
        }
    )
    found = roles(holder)
    assert {found["lycoris_full.weight"], found["lycoris_full.bias"]} == {Role.OTHER}
    assert {found["lycoris_norm.w_norm"], found["lycoris_norm.b_norm"]} == {Role.NORM_BIAS}


@pytest.mark.parametrize("kind", ["GLoRAModule", "TLoraModule", "DiagOFTModule"])
def test_lycoris_methods_with_other_products_are_errors_that_name_the_parameter(kind):
    module = lycoris_module(kind)
    first = next(name for name, _ in module.named_parameters())
    with pytest.raises(UnknownAdapterParameterError, match=f"lycoris_layer.{first}"):
        trainable_parameters(nn.ModuleDict({"lycoris_layer": module}))


def test_t_lora_as_the_docs_register_it():
    module = nn.ModuleDict({"lycoris_layer": lycoris_module("TLoraModule")})
    ends = {"q_layer.weight": Role.A, "p_layer.weight": Role.B, "lambda_layer": Role.OTHER}
    register_layout("t-lora", lambda name, owner: next((ends[end] for end in ends if name.endswith(end)), None))
    try:
        assert roles(module) == {f"lycoris_layer.{end}": role for end, role in ends.items()}
    finally:
        unregister_layout("t-lora")


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_pefts_hadamard_and_kronecker_products(kind):
    import peft

    base = nn.Sequential(nn.Linear(64, 128))
    model = peft.get_peft_model(base, getattr(peft, kind)(r=RANK, target_modules=["0"]))
    found = roles(model)
    assert {Role.A, Role.B} <= set(found.values())
    for name, role in found.items():
        assert role is {"a": Role.B, "b": Role.A}.get(name.removesuffix(".default")[-1], Role.OTHER), name


def test_litgpt_linear_and_qkv_linear():
    lora = library("litgpt.lora")
    for layer in (
        lora.LoRALinear(IN, OUT, r=RANK),
        lora.LoRAQKVLinear(
            IN, 3 * IN, head_size=IN // 2, n_head=2, n_query_groups=2, r=RANK, enable_lora=(True, False, True)
        ),
    ):
        layer.linear.requires_grad_(False)
        assert roles(layer) == {"lora_A": Role.A, "lora_B": Role.B}
        assert zero_at_start(layer) == {"lora_B"} and layer.lora_A.shape[-1] == IN


def test_a_litgpt_model():
    lora = library("litgpt.lora")
    config = lora.Config(
        block_size=8, vocab_size=32, padded_vocab_size=32, n_layer=1, n_head=2, n_embd=16, lora_r=2, lora_alpha=4,
        lora_query=True, lora_value=True, lora_projection=True, lora_mlp=True, lora_head=True,
    )  # fmt: skip
    model = lora.GPT(config)
    for module in model.modules():
        if isinstance(module, lora.LoRALinear) and getattr(module, "lora_B", None) is not None:
            module.reset_parameters()
    lora.mark_only_lora_as_trainable(model, bias="none")
    found = roles(model)
    assert set(found.values()) == {Role.A, Role.B}
    assert {name for name, role in found.items() if role is Role.B} == zero_at_start(model)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3)
    with pytest.raises(NoLoraFactorsError, match="to measure"):  # automatic rates know PEFT's layers only
        loraplus.AutoRates(model, optimizer)


@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear"])
def test_torchtune_linears(kind):
    layer = getattr(library("torchtune.modules.peft"), kind)(IN, OUT, rank=RANK, alpha=4.0)
    layer.weight.requires_grad_(False)
    expected = {"lora_a.weight": Role.A, "lora_b.weight": Role.B}
    if kind == "DoRALinear":
        layer.initialize_dora_magnitude()
        expected["magnitude"] = Role.MAGNITUDE
    assert roles(layer) == expected
    assert zero_at_start(layer) == {"lora_b.weight"}


class Torchtune(nn.Module):
    """torchtune's naming, for machines that do not have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Linear(IN, RANK, bias=False), nn.Linear(RANK, OUT, bias=False)
        self.magnitude = nn.Parameter(torch.ones(OUT))


def test_torchtune_names():
    found = roles(nn.ModuleDict({"q_proj": Torchtune()}))
    assert found == {
        "q_proj.lora_a.weight": Role.A, "q_proj.lora_b.weight": Role.B, "q_proj.magnitude": Role.MAGNITUDE,
    }  # fmt: skip


class ParallelLinear(nn.Module):
    """Megatron's layer: it knows the sizes of the whole, and each rank has some of its rows."""

    def __init__(self, inputs: int, outputs: int, ranks: int) -> None:
        super().__init__()
        self.input_size, self.output_size = inputs, outputs
        self.weight = nn.Parameter(torch.zeros(outputs // ranks, inputs))


def parallel_adapter(ranks: int) -> nn.Module:
    """Megatron-Bridge's ParallelLinearAdapter."""
    adapter = nn.Module()
    adapter.linear_in, adapter.linear_out = ParallelLinear(12, 4, ranks), ParallelLinear(4, 20, ranks)
    return adapter


@pytest.mark.plugin("NeMo, Megatron-Bridge")
@pytest.mark.parametrize("ranks", [1, 2])
def test_published_interface_of_megatron_bridge_names_whole_or_on_ranks(ranks):
    layer = nn.Module()
    layer.adapter = parallel_adapter(ranks)
    canonical = nn.Module()
    canonical.adapter = nn.ModuleDict({"adapter_q": parallel_adapter(ranks), "adapter_v": parallel_adapter(ranks)})
    dora = nn.Module()
    dora.adapter = parallel_adapter(ranks)
    dora.adapter.weight_magnitude = nn.Parameter(torch.ones(20))
    nemo = nn.ModuleDict({"lora_kqv_adapter": parallel_adapter(ranks)})
    found = roles(
        nn.ModuleDict({"linear_proj": layer, "linear_qkv": canonical, "linear_fc1": dora, "adapter_layer": nemo})
    )
    assert found.pop("linear_fc1.adapter.weight_magnitude") is Role.MAGNITUDE
    assert len(found) == 10
    assert all(role is (Role.A if ".linear_in." in name else Role.B) for name, role in found.items())


def linear_adapter(inputs: int, outputs: int, a: str, b: str) -> nn.Linear:
    """Megatron-Bridge's LinearAdapter, a linear layer with its factors right beside its weight; under any names."""
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.add_module(b, nn.Linear(RANK, outputs, bias=False))
    layer.add_module(a, nn.Linear(inputs, RANK, bias=False))
    return layer


@pytest.mark.parametrize("names", [("linear_in", "linear_out"), ("down", "up"), ("first", "second")])
@pytest.mark.parametrize("outputs", [IN, OUT])
def test_two_layers_within_a_linear_one_that_make_a_product_of_its_size_are_its_factors(names, outputs):
    a, b = names
    model = nn.ModuleDict({"q": linear_adapter(IN, outputs, a, b), "k": Torchtune()})
    found = roles(model)
    assert found["q." + a + ".weight"] is Role.A and found["q." + b + ".weight"] is Role.B
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=0.1, lr_ratio=16)
    doctored = loraplus.doctor(optimizer, model, lr_ratio=16)
    assert doctored.ok and {pair.layer for pair in doctored.pairs} == {"q", "k"}


def test_layers_within_a_linear_one_that_make_no_low_rank_of_its_size_are_none():
    wide = nn.Linear(4, 6).requires_grad_(False)  # its "rank" would be above its own
    wide.first, wide.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 6, bias=False)
    other = nn.Linear(12, 20).requires_grad_(False)
    other.first, other.second = nn.Linear(12, 4, bias=False), nn.Linear(4, 12, bias=False)
    found = roles(nn.ModuleDict({"wide": wide, "other": other, "q_proj": Torchtune()}))
    assert {role for name, role in found.items() if not name.startswith("q_proj.")} == {Role.OTHER}


def test_layers_of_an_mlp_that_are_called_as_megatrons_factors_are_none():
    mlp = nn.ModuleDict({"linear_in": nn.Linear(12, 24), "linear_out": nn.Linear(24, 12)})
    found = roles(nn.ModuleDict({"mlp": mlp, "q_proj": Torchtune()}))
    assert {role for name, role in found.items() if name.startswith("mlp.")}.isdisjoint({Role.A, Role.B})


def test_a_magnitude_that_belongs_to_no_adapter_is_a_plain_parameter():
    plain = nn.Module()
    plain.magnitude = nn.Parameter(torch.ones(3))
    with pytest.raises(NoLoraFactorsError):
        trainable_parameters(plain)


def test_sd_scripts_split_projections():
    adapter = nn.Module()
    adapter.lora_down = nn.ModuleList([nn.Linear(IN, RANK, bias=False) for _ in range(2)])
    adapter.lora_up = nn.ModuleList([nn.Linear(RANK, OUT, bias=False) for _ in range(2)])
    found = roles(nn.ModuleDict({"lora_unet_single_blocks_0_linear1": adapter}))
    assert sorted(found.values()) == [Role.A, Role.A, Role.B, Role.B]


def test_loralib_embeddings_are_embedding_factors():
    class Embedding(nn.Embedding):  # loralib's is an nn.Embedding with both factors as plain parameters
        def __init__(self) -> None:
            super().__init__(IN, OUT)
            self.weight.requires_grad_(False)
            self.lora_A, self.lora_B = nn.Parameter(torch.zeros(RANK, IN)), nn.Parameter(torch.randn(OUT, RANK))

    assert roles(Embedding()) == {"lora_A": Role.EMBEDDING_A, "lora_B": Role.EMBEDDING_B}


def test_every_layout_leaves_the_names_of_others_alone_and_its_pairs_are_known():
    """A new layout has a name here."""
    layouts = importlib.import_module("loraplus.adapters.layouts")
    names = {
        "peft": "q.lora_B.weight",  # without the adapter's name
        "diffusers": "to_q_lora.up.weight",
        "kohya": "lora_te_q.lora_up.weight",
        "litgpt": "q.lora_B",
        "torchtune": "q.lora_b.weight",
        "lycoris": "lora_te_q.hada_w2_a",
        "megatron": "linear_qkv.adapter.linear_out.weight",
    }
    assert set(names) == set(layouts._layouts)
    for key, layout in layouts._layouts.items():
        assert {of for of, name in names.items() if layout.recognise(name, nn.Linear(1, 1)) is not None} == {key}
        assert list(partner_names(names[key], nn.Linear(1, 1))), f"{key}: its `pairs` have not the pair of {names[key]}"
