"""What the structure of a model says of its parameters, where a name alone is no evidence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from loraplus.adapters.layouts import without_adapter
from loraplus.adapters.orientation import wrapped_roles
from loraplus.adapters.partners import PARTNERS, fit, has_pair, pair_within, partner_names
from loraplus.parts import Role

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# Beside a pair of factors, parameters of these names are factors too, whether their layout is known or not.
_FACTOR = re.compile(
    r"lora_(?:[A-Za-z]|down|up|mid|embedding_[AB])|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?|oft_blocks"
)
_LORA_WORD = re.compile(r"(?:^|_)(?:lora|lycoris)(?:_|$)", re.IGNORECASE)


class Structure:
    """The modules of a model by place.

    Args:
        model: any module, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owners: dict[str, nn.Module] = {}
        self.in_layer_norm: set[str] = set()
        self._holders: dict[int, nn.Module] = {}
        self._by_name: dict[str, nn.Module] = {}
        clean = {"": ""}  # {path: the same without wrappers}
        self._in_adapter: set[int] = set()
        for path, module in model.named_modules(remove_duplicate=False):
            parent, _, own = path.rpartition(".")
            if isinstance(module, nn.LayerNorm) or (path and parent in self.in_layer_norm):
                self.in_layer_norm.add(path)
            self.owners[path] = module
            wraps = own in WRAPPERS or (own == "module" and not clean.get(parent))
            clean[path] = f"{clean.get(parent, '')}{'' if wraps else f'.{own}'}".removeprefix(".")
            self._by_name[clean[path]] = module
            if path:
                above = self.owners[parent]
                self._holders.setdefault(id(module), self._holders.get(id(above), above) if own in WRAPPERS else above)
            self._in_adapter |= {id(part) for container in _containers(module) for part in container.modules()}
        self.wrapped = wrapped_roles(self.owners.values())

    def holder(self, module: nn.Module) -> nn.Module | None:
        """The module that holds another, wrappers not counted."""
        return self._holders.get(id(module))

    def has_partner(self, name: str, parameter: object, owner: nn.Module, role: Role) -> bool:
        """Whether the other factor of a pair stands where it must, and fits; of a magnitude, whether a pair does.

        Args:
            name: without what wrappers add.
            parameter: of that name.
            owner: the module that holds it.
            role: what it would be.
        """
        others = list(partner_names(name, owner, self.holder(owner)))
        for other in others:
            place, _, last = other.rpartition(".")
            beside = self._by_name.get(place)
            if beside is None or not _holds(beside, last):
                continue
            this, that = (owner, parameter), (beside, beside._parameters.get(last))
            if role is Role.MAGNITUDE:
                makes_pair = self.has_partner(other, that[1], beside, Role.A)
            elif role in (Role.A, Role.EMBEDDING_A):
                makes_pair = fit(this, that)
            else:
                makes_pair = role is Role.NORM_BIAS or fit(that, this)
            if makes_pair:
                return True
        return not others  # its layout knows it by more than a name

    def role_within_layer(self, name: str, owner: nn.Module) -> Role | None:
        """The role of a matrix that no layout knows and that has its partner in the linear layer which holds both."""
        pair, parts = pair_within(self.holder(owner)), name.split(".")
        if pair is None or parts[-1] != "weight":
            return None
        return dict(zip(pair, (Role.A, Role.B), strict=True)).get(parts[-2])

    def partner_names(self, name: str, owner: nn.Module) -> Iterator[str]:
        """The names that the other factor of a pair may have: a layout's, and by its place in the layer of both."""
        yield from partner_names(name, owner, self.holder(owner))
        role, pair = self.role_within_layer(name, owner), pair_within(self.holder(owner))
        if role is not None and pair is not None:
            yield ".".join([*name.split(".")[:-2], pair[role is Role.A], "weight"]).removeprefix(".")

    def is_factor(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether a parameter that no layout knows is part of an adapter's product all the same.

        The evidence is where it stands: as a matrix in the part of a layer that PEFT calls the adapter's, in a module
        of LyCORIS, beside a pair of factors and named like them, or as one of two matrices called lora-something that
        make a low rank.
        """
        holder = self.holder(owner)
        if id(owner) in self._in_adapter and parameter.ndim > 1:
            return True
        if any(type(module).__module__.startswith("lycoris.") for module in (owner, holder)):
            return True
        above = [owner, *(module for module in (holder, self.holder(holder) if holder else None) if module is not None)]
        own = without_adapter(name, owner, holder).removesuffix(".weight").rpartition(".")[2]
        if _FACTOR.fullmatch(own) and own not in PARTNERS and any(has_pair(layer) for layer in above):
            return True
        return any(
            _LORA_WORD.search(part) and _completes_a_low_rank(parameter, layer)
            for part, layer in zip(reversed(name.split(".")), above, strict=False)
        )

    def heads(self, factor_owners: Iterable[nn.Module]) -> set[int]:
        """ids of the modules that make the model's output: its output layers, and what stands behind all adapters."""
        adapted = {id(owner) for owner in factor_owners}
        outputs = list(_behind(self.model, adapted))
        for module in self.owners.values():
            if hasattr(type(module), "get_output_embeddings"):
                output = _output_layer(module)
                outputs += [output] if isinstance(output, nn.Module) else []
        return {id(inner) for module in outputs for inner in module.modules() if id(inner) not in self._in_adapter}


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """What a layer of PEFT's tuners declares to be the adapter's."""
    names = getattr(type(module), "adapter_layer_names", ())
    for name in (*names, *getattr(type(module), "other_param_names", ())) if isinstance(names, tuple) else ():
        container = module._modules.get(name)
        if container is not None and name != "modules_to_save":
            yield container


def _holds(module: Any, name: str) -> bool:
    """Whether a module has a tensor of a name: as a parameter, flattened by FSDP1, parametrized, or packed."""
    tensors = {**module._buffers, **module._parameters}
    if tensors.get(name) is not None or name in vars(module) or name in module._modules.get("parametrizations", ()):
        return True
    return name == "weight" and any(value is not None for own, value in tensors.items() if own != "bias")


def _completes_a_low_rank(parameter: nn.Parameter, layer: nn.Module) -> bool:
    """Whether something else in a layer that is called lora has the other half of r × in and out × r."""
    for name, other in layer.named_parameters():
        if other is parameter or min(parameter.ndim, other.ndim) < 2 or not _LORA_WORD.search(name.split(".")[0]):
            continue
        for down, up in ((parameter.shape, other.shape), (other.shape, parameter.shape)):
            if down[0] == up[1] < min(down[1], up[0]):
                return True
    return False


def _behind(module: nn.Module, adapted: set[int]) -> Iterator[nn.Module]:
    """Children that come after the last one with an adapter, where the model first has several with parameters."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    if len(children) == 1 or isinstance(module, (nn.ModuleDict, nn.ModuleList)):  # a wrapper, or several models
        for child in children:
            yield from _behind(child, adapted)
        return
    places = [place for place, child in enumerate(children) if any(id(part) in adapted for part in child.modules())]
    behind = children[places[-1] + 1 :] if places else []
    for child in reversed(behind):
        if not all(parameter.requires_grad for parameter in child.parameters()):
            break  # what comes before frozen weights is in the middle of the model, whatever it is
        yield child


def _output_layer(module: Any) -> Any:
    try:
        return module.get_output_embeddings()
    except (NotImplementedError, AttributeError, TypeError):  # transformers' models without an output layer
        return None
