r"""Adapter layouts: which parameter of which library is A, which is B.

A frozen layer y = W x is corrected by a low-rank product, y = W x + s·B A x. **A reads the layer's input, B writes
its output** (Hayou et al., arXiv 2402.12354, section 1); the factor that is zero in a fresh linear adapter is B. Where
a library starts the other factor at zero (LyCORIS' LoKr), the place decides: the argument is about the sum over the
layer's width that A takes, and A takes it whichever of the two starts at zero.

What stands between the factors is neither: KaSA's `lora_diag`, the r singular values in y = W x + s·B diag(d) A x, and
the priors of MonteCLoRA's sampler read no layer's input and write no layer's output, so the argument about the width
does not reach them, and they keep lr (`Role.OTHER`). So do the core of a Tucker product (`lora_mid`, `hada_t1`), scalar
factors, and a matrix that is not factored at all (LoKr's `lokr_w1`): it reads and writes at once.

Each layout is a recogniser and the names of its pairs; `register_layout` adds another. Recognisers look at names and at
the module that owns the parameter, never at shapes, and import none of the libraries. That a name is a factor's is not
all: `partners` asks for the other of the pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from loraplus.parts import Role

Recogniser = Callable[[str, nn.Module], "Role | None"]
"""Takes a parameter's clean name and the module that owns it; returns its role, or None if the layout is another."""

Patterns = tuple[tuple[re.Pattern[str], Role], ...]


def _patterns(*pairs: tuple[str, Role]) -> Patterns:
    """Patterns for the end of a name, from the start of a component on."""
    return tuple((re.compile(rf"(?:^|\.)(?:{pattern})$"), role) for pattern, role in pairs)


def _first(patterns: Patterns, name: str) -> Role | None:
    return next((role for pattern, role in patterns if pattern.search(name)), None)


# Without the adapter's own name, which `recognise` takes out of the dict that holds it.
_PEFT = _patterns(
    (r"lora_A\.weight", Role.A),
    (r"lora_B\.weight", Role.B),
    (r"lora_embedding_A", Role.EMBEDDING_A),
    (r"lora_embedding_B", Role.EMBEDDING_B),
    (r"lora_magnitude_vector(?:\.weight)?", Role.MAGNITUDE),
    (r"lora_[AB]\.bias", Role.NORM_BIAS),  # LoraConfig(lora_bias=True): an offset, not a factor
    (r"lora_diag", Role.OTHER),  # KaSA
    (r"lora_monteclora_sampler\.(?:std_prior|expert_weights_prior)", Role.OTHER),
    (r"trainable_tokens_delta", Role.EMBEDDING),
)
_MODULES_TO_SAVE = re.compile(r"(?:^|\.)modules_to_save\.")


def recognise_peft(name: str, owner: nn.Module) -> Role | None:
    """PEFT, and diffusers since it uses PEFT: factors in a dict by adapter name, heads under `modules_to_save`."""
    role = _first(_PEFT, name)
    if role is None and isinstance(owner, nn.ParameterDict):  # AdaLoRA's
        role = {"lora_A": Role.A, "lora_B": Role.B}.get(name.rpartition(".")[2])
    return saved_in_full(name, owner) if role is None else role


def saved_in_full(name: str, owner: nn.Module) -> Role | None:
    """The role of what PEFT trains in full (`modules_to_save`)."""
    if not _MODULES_TO_SAVE.search(name):
        return None
    return Role.EMBEDDING if isinstance(owner, nn.Embedding) else Role.HEAD


_DIFFUSERS = _patterns(
    (r"(?:\w+_lora|lora_layer|lora_linear_layer)\.down\.weight", Role.A),
    (r"(?:\w+_lora|lora_layer|lora_linear_layer)\.up\.weight", Role.B),
)


def recognise_diffusers(name: str, owner: nn.Module) -> Role | None:
    """diffusers' own LoRALinearLayer and LoRAConv2dLayer: `to_q_lora.down.weight`, `lora_layer.up.weight`."""
    return _first(_DIFFUSERS, name)


_KOHYA = _patterns(  # a number where sd-scripts splits one layer's output into several adapters
    (r"lora_down(?:\.\d+)?\.weight", Role.A),
    (r"lora_up(?:\.\d+)?\.weight", Role.B),
    (r"lora_mid\.weight", Role.OTHER),
)


def recognise_kohya(name: str, owner: nn.Module) -> Role | None:
    """kohya's sd-scripts and LyCORIS' LoCon: `lora_unet_…_to_q.lora_down.weight`, `lora_te_….lora_up.weight`."""
    return _first(_KOHYA, name)


def recognise_litgpt(name: str, owner: nn.Module) -> Role | None:
    """litgpt and loralib: `lora_A` and `lora_B` are plain parameters of the adapted layer, LoRAQKVLinear's too."""
    role = {"lora_A": Role.A, "lora_B": Role.B}.get(name.rpartition(".")[2])
    if role is None or isinstance(owner, (nn.ParameterDict, nn.ModuleDict)):  # PEFT's
        return None
    if isinstance(owner, nn.Embedding):
        return Role.EMBEDDING_A if role is Role.A else Role.EMBEDDING_B
    return role


_TORCHTUNE = _patterns((r"lora_a\.weight", Role.A), (r"lora_b\.weight", Role.B))


def recognise_torchtune(name: str, owner: nn.Module) -> Role | None:
    """torchtune: `lora_a.weight`, `lora_b.weight`, and DoRALinear's `magnitude`."""
    if name.rpartition(".")[2] == "magnitude" and hasattr(owner, "lora_a"):
        return Role.MAGNITUDE
    return _first(_TORCHTUNE, name)


# ΔW is (w1_a w1_b) ∘ (w2_a w2_b) in LoHa and w1 ⊗ (w2_a w2_b) in LoKr: `_b` meets the input, `_a` makes the output.
# PEFT has both.
_LYCORIS = _patterns(
    (r"(?:hada|lokr)_w[12]_b", Role.A),
    (r"(?:hada|lokr)_w[12]_a", Role.B),
    (r"hada_t[12]|lokr_w[12]|lokr_t2", Role.OTHER),
    (r"(?:lora|lycoris)_[^.]+\.down_list\.\d+", Role.A),  # DyLoRA
    (r"(?:lora|lycoris)_[^.]+\.up_list\.\d+", Role.B),
)


def recognise_lycoris(name: str, owner: nn.Module) -> Role | None:
    """LyCORIS: LoHa, LoKr and DyLoRA; DoRA's scale, scalars, whole matrices and norms beside them."""
    role = _first(_LYCORIS, name)
    if role is not None or not type(owner).__module__.startswith("lycoris."):
        return role
    last = name.rpartition(".")[2]
    if last in {"dora_scale", "scalar"}:
        return Role.MAGNITUDE if last == "dora_scale" else Role.OTHER
    return {"FullModule": Role.OTHER, "NormModule": Role.NORM_BIAS}.get(type(owner).__name__)


# Only under an adapter: MLPs have layers of these names, too.
_MEGATRON = _patterns((r"\w*adapter\w*\.linear_in\.weight", Role.A), (r"\w*adapter\w*\.linear_out\.weight", Role.B))


def recognise_megatron(name: str, owner: nn.Module) -> Role | None:
    """NeMo and Megatron-Bridge: `….adapter.linear_in.weight`, canonical `adapter_q`, DoRA's `weight_magnitude`."""
    if name.rpartition(".")[2] == "weight_magnitude" and hasattr(owner, "linear_in"):
        return Role.MAGNITUDE
    return _first(_MEGATRON, name)


class Layout(NamedTuple):
    """How one library names what it trains.

    Args:
        recognise: tells the role of a parameter.
        pairs: what A and B of one layer are called, without `.weight`, as "A B"; several with commas between them.
            A factor counts only beside the other of its pair.
    """

    recognise: Recogniser
    pairs: str


# The last is asked first, so a new one goes to the top; what was registered is asked before all of these.
_layouts = {
    "lycoris": Layout(
        recognise_lycoris,
        "hada_w1_b hada_w1_a, hada_w2_b hada_w2_a, lokr_w1_b lokr_w1_a, lokr_w2_b lokr_w2_a, down_list up_list",
    ),
    "megatron": Layout(recognise_megatron, "linear_in linear_out"),
    "torchtune": Layout(recognise_torchtune, "lora_a lora_b"),
    "litgpt": Layout(recognise_litgpt, "lora_A lora_B"),
    "kohya": Layout(recognise_kohya, "lora_down lora_up"),
    "diffusers": Layout(recognise_diffusers, "down up"),
    "peft": Layout(recognise_peft, "lora_A lora_B, lora_embedding_A lora_embedding_B"),
}
PAIRS = frozenset((a, b) for layout in _layouts.values() for a, b in map(str.split, layout.pairs.split(",")))
_registered: dict[str, Recogniser] = {}


def register_layout(name: str, recognise: Recogniser) -> None:
    """Teaches loraplus another adapter layout. Later registrations are asked first.

    Args:
        name: what to call the layout; registering a name again replaces it.
        recognise: takes (clean parameter name, owning module), returns a `Role` or None.

    Example:
        >>> register_layout("down-up", lambda name, owner: Role.A if name.endswith("down.weight") else None)
        >>> unregister_layout("down-up")
    """
    unregister_layout(name)
    _registered[name] = recognise


def unregister_layout(name: str) -> None:
    """Forgets a layout."""
    _registered.pop(name, None)
    _layouts.pop(name, None)


def registered(name: str, owner: nn.Module) -> Role | None:
    """The role that a layout of the user's own gives a parameter."""
    for layout in reversed(list(_registered.values())):
        if (role := layout(name, owner)) is not None:
            return role
    return None


def recognise(name: str, owner: nn.Module, holder: nn.Module | None = None) -> Role | None:
    """The role that the first layout to know the parameter's name gives it; None if none does.

    A name is no evidence that there is a pair of factors: `partners` says where the other one stands.

    Args:
        name: without what wrappers add.
        owner: the module that holds the parameter.
        holder: the module that holds the owner.

    Example:
        >>> recognise("layers.0.to_q.lora_up.weight", nn.Linear(2, 8))
        <Role.B: 'lora_B'>
        >>> recognise("q.lora_B.lora_A.weight", nn.Linear(2, 8), nn.ModuleDict())  # B of an adapter called lora_A
        <Role.B: 'lora_B'>
    """
    if (role := registered(name, owner)) is not None:
        return role
    short = without_adapter(name, owner, holder)
    for form in (short,) if short == name else (short, name):
        for layout in reversed(list(_layouts.values())):
            if (role := layout.recognise(form, owner)) is not None:
                return role
    return None


def without_adapter(name: str, owner: nn.Module, holder: nn.Module | None) -> str:
    """A name without the key of the dict that holds the parameter or its owner: PEFT's name of an adapter.

    Adapters may have any name, a factor's too, so it is the dict that says which part of the name is one.

    Example:
        >>> without_adapter("q.lora_B.lora_A.weight", nn.Linear(2, 8), nn.ModuleDict())
        'q.lora_B.weight'
    """
    parts = name.split(".")
    if isinstance(owner, nn.ParameterDict):
        return ".".join(parts[:-1])
    if isinstance(holder, nn.ModuleDict):
        return ".".join([*parts[:-2], parts[-1]])
    return name
