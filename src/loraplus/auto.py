r"""Both learning rates set from what each layer's output does, in one run.

The optimizer proposes a step u_A, u_B for the factors of every adapted layer (Adam's first moment over the root of its
second, say). How far would it move the layer's output y = W x + s·B A x, were its entries of unit size?

    d_B = s·RMS(û_B A x)    d_A = s·RMS(B û_A x)    d_z = RMS(û_A x),      û = u / RMS(u)

The rates are those at which each factor moves the output by the part ρ of itself, while A moves its own output z = A x
by no more than the part κ (B starts at zero, so at first nothing else holds A back):

    η_B = ρ·RMS(y) / d_B    η_A = min(ρ·RMS(y) / d_A, κ·RMS(z) / d_z)

A step may move more the more terms of the loss it is averaged over, and each layer less the more layers move with it:

    ρ = min(ρ₁·√n, ρ_max) / √L      for n loss terms (`movement.loss_terms`) and L adapted layers

One pair serves all layers: the geometric means of these, with λ = η_B / η_A between 2 and 4. Where κ alone holds A, its
movement can run ahead of B's and A outgrows B; then the pair keeps its product, on which the loss depends most. Where B
asks for more than 4·η_A, it gets that and no more: the steps of B are what a run collapses from. Where the next batch
says that steps stop short, both grow, up to sixfold (`automatic/growth.py`). The schedule (warm-up and decay)
multiplies both. How the constants were found, and what else was tried: docs/research/auto-rates.md.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from loraplus.automatic.checks import AS_NUMBERS, check_layers, check_steps
from loraplus.automatic.compiled import anything_is_compiled, is_compiled, run_eagerly
from loraplus.automatic.growth import Growth
from loraplus.automatic.owned_groups import OwnedGroups
from loraplus.automatic.proposal import asking_rate, proposed
from loraplus.automatic.rate_rule import LayerRates, Rule
from loraplus.errors import LoraPlusWarning, TrainerSetupError
from loraplus.rates import SETTING_OF_ROLE, Rates
from loraplus.roles import Role, trainable_parameters
from loraplus.steps.layer_updates import FeatureUpdates, LayerUpdate
from loraplus.steps.movement import (
    Movement,
    Size,
    factors,
    gathered,
    is_sharded,
    local_part,
    movement_of,
    movement_sizes,
    read,
    size_of,
)
from loraplus.steps.step_watcher import StepWatcher, torch_optimizer
from loraplus.steps.wrappers import unwrapped

_ROLES = (Role.A, Role.B)
_STATE = "loraplus_auto"
"""Where the state of an optimizer holds that of its automatic rates."""


class AutoRates(StepWatcher):
    """Sets η_A and η_B of an optimizer while it trains; install it once, and train as ever.

    η_B = ρ·RMS(y) / d_B, η_A = min(ρ·RMS(y) / d_A, κ·RMS(z) / d_z), 2 ≤ λ = η_B / η_A ≤ 4

    Both are up to six times larger where the next batch says that steps of Adam's size stop short (the rule is made for
    noisy gradients). Each is multiplied by what the scheduler makes of each group's own base rate; the rates that the
    optimizer was built with do not matter, but those of one role keep their relation (`lr_overrides`). At the first
    steps, every twentieth one and where the rates have just grown the optimizer is asked for its step on a copy of A
    and B, and takes it once, at the rates that this gave. Steps that are not of Adam's size (SGD, Lion, Adagrad, …) are
    scaled to go as far as Adam's, each of them. Between steps the groups hold the scheduler's numbers. No random number
    is drawn. Under DistributedDataParallel and FSDP2 every process arrives at the same rates. Groups that hold neither
    A nor B of this model keep their rates; several models may share an optimizer, each with an AutoRates of its own.

    Args:
        model: a PEFT model, wrapped or not, with a trainable `lora_A` or `lora_B`.
        optimizer: holds A and B in groups apart (as `loraplus.create_optimizer` makes them).
        rule: constants other than the built-in ones, for research.
        process_group: of the processes that train this model together. Default: DistributedDataParallel's or FSDP2's;
            a process without either sets rates of its own.

    Raises:
        NoLoraFactorsError: no layer to measure.
        TrainerSetupError: A and B share a group, another one has a rate that was meant to be replaced (of a tenth or
            more, the same as A's or B's), the optimizer's steps do not scale with its rate (Prodigy,
            schedule-free, Adafactor, …), no layer can be measured (experts), or the factors are flattened (FSDP1) or
            sharded away (ZeRO-3). At the first measured step: the optimizer does not hold the factors themselves
            (DeepSpeed), or the model that was called is another one.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_head=1e-3)  # doctest: +SKIP
        >>> scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 6, 100)  # doctest: +SKIP
        >>> rates = loraplus.AutoRates(model, optimizer)  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, rule: Rule | None = None, process_group: Any = None
    ) -> None:
        optimizer = torch_optimizer(optimizer)
        check_layers(model)
        groups = OwnedGroups(model, optimizer)
        size = check_steps(optimizer, groups)
        if size is None:
            groups.check_others(model)
        for other in installed(optimizer):
            if other.is_for(model):  # a notebook's cell run again
                other.remove()
        super().__init__(model, optimizer)
        self.rule = rule or Rule()
        self.steps = 0
        self.layer_rates: dict[str, LayerRates] = {}
        self.updates: FeatureUpdates | None = None
        self.lr_a = self.lr_b = 0.0  # without the schedule
        self._why = "not measured yet"
        self._groups, self._process_group = groups, process_group
        self._pair = (0.0, 0.0)  # for steps of Adam's size that have not grown
        self._size = size or 1.0
        self._units: dict[Role, float] | None = None if size is None else {Role.A: 1.0, Role.B: 1.0}
        self._growth = self._ungrown()
        self._compiled = self._missed = self._skipped = self._told = False
        self._state_hook = self._optimizer.register_state_dict_pre_hook(lambda _: self._groups.give_back())
        _register(self._optimizer, [*installed(self._optimizer), self])
        self._look()

    def rest(self) -> None:
        """Takes the hooks off the model until a next step is taken, as when training has ended."""
        super().rest()
        run_eagerly(self, False)

    def remove(self) -> None:
        """Takes all hooks off the model and the optimizer, whose groups then have their own rates."""
        super().remove()
        self._state_hook.remove()
        self._groups.give_back()
        run_eagerly(self, False)
        _register(self._optimizer, [other for other in installed(self._optimizer) if other is not self])

    @property
    def why(self) -> str:
        """What held the rates at the last measurement, and how far they have grown since steps stopped short."""
        return f"{self._why}{self._growth}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; on shards of FSDP2 without the last step, which growth is judged by."""
        pair = {"lr_a": self.lr_a, "lr_b": self.lr_b, "pair": list(self._pair), "why": self._why}
        layers = {name: [rates.lr_a, rates.lr_b] for name, rates in self.layer_rates.items()}
        updates = None if self.updates is None else [asdict(layer) for layer in self.updates.layers]
        measured = {"steps": self.steps, "layers": layers, "updates": updates}
        return {**pair, **measured, **self._groups.state_dict(), "growth": self._growth.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.lr_a, self.lr_b = float(state["lr_a"]), float(state["lr_b"])
        self.steps = int(state["steps"])
        self.layer_rates = {name: LayerRates(*rates) for name, rates in state.get("layers", {}).items()}
        if (updates := state.get("updates")) is not None:
            self.updates = FeatureUpdates(tuple(LayerUpdate(**layer) for layer in updates))
        self._groups.load_state_dict(state)
        self._pair = tuple(state.get("pair", (self.lr_a, self.lr_b)))
        self._why = state.get("why", "as an earlier version measured")
        self._growth = self._ungrown()
        if "growth" in state:  # an earlier version's has none
            self._growth.load_state_dict(state["growth"])
        self._look()

    def summary(self) -> dict[str, Any]:
        """The rates without the schedule, and what each layer asks for."""
        layers = {name: {"lora_A": rates.lr_a, "lora_B": rates.lr_b} for name, rates in self.layer_rates.items()}
        return {"lr_a": self.lr_a, "lr_b": self.lr_b, "why": self.why, "steps": self.steps, "layers": layers}

    def __str__(self) -> str:
        """What it chose and why, in one line: "A 0.00041, B 0.0016: B held at 4×"."""
        return f"A {self.lr_a:.2g}, B {self.lr_b:.2g}: {self.why}"

    def is_for(self, model: nn.Module) -> bool:
        """Whether it sets rates of this model's factors."""
        members = {id(parameter) for parameter in model.parameters()}
        return any(id(weight) in members for weight in factors(self._layers))

    def rates_of(self, group: Mapping[str, Any]) -> tuple[float, float] | None:
        """(rate at this moment of the schedule, rate without schedule) of a group whose rate is set automatically.

        Groups of the other models that share the optimizer are known too; None for any other.
        """
        for rates in installed(self._optimizer) or [self]:
            owned = rates._groups.of(group)
            if owned is not None:
                scheduled, factor = rates._groups.factors(owned)
                base = rates._rate(owned.role) * factor
                return base * scheduled, base
        return None

    def _ungrown(self) -> Growth:
        # SGD with a momentum has been seen to leap away from 2.5 times its rates, so only steps of Adam's size grow.
        return Growth(functools.partial(factors, self._layers) if self._units is None else tuple, self.rule)

    def _rate(self, role: Role) -> float:
        return self.lr_a if role is Role.A else self.lr_b

    def _multiple(self, role: Role) -> float:
        """What a rate is of the pair's: larger steps where they stop short, and of Adam's size where they are not."""
        return self._growth.factor * (1.0 if self._units is None else self._units[role])

    def _look(self) -> None:
        """Watches the forward passes up to the next step if that is to be measured."""
        regular = self.steps < self.rule.measured_at_first or self.steps % self.rule.measured_every == 0
        due = regular or self._missed or self._growth.has_changed
        self._recorder.on = due
        if due:
            self._compiled = self._compiled or is_compiled(self._recorder.modules.values())
        run_eagerly(self, due and self._compiled)

    def _before_step(self) -> Any:
        self._groups.give_back()
        self._skipped = False
        if self._recorder.on or self._units is not None or self._growth.is_watching:
            found_inf = getattr(self._optimizer, "found_inf", None)  # as GradScaler tells a fused optimizer
            self._skipped = found_inf is not None and bool(found_inf)
            if not self._skipped and any(weight.grad is not None for weight in factors(self._layers)):
                self._growth.look(self._groups.height(), self._summed)
                self._ask()
                self._growth.step_begins()
        return self._groups.lend({role: self._rate(role) for role in _ROLES})

    def _after_step(self) -> None:
        self._groups.give_back()
        self._growth.step_ends()
        self._recorder.forget()
        self.steps += not self._skipped
        self._look()

    def _ask(self) -> None:
        """Sets the rates of the coming step, from what the optimizer would do."""
        seen = terms = 0.0
        if self._recorder.on:
            seen, terms = self._summed([float(len(self._recorder.samples)), self._recorder.loss_terms])
            self._missed = not seen
            if not seen:
                self._cope_with_nothing_seen()
            else:
                self._say_what_was_not_seen()
        if seen or self._units is not None:
            steps = self._proposed()
            if self._units is not None:
                self._set_units(self._units, steps)
            if seen:
                self._measure([None if step is None else gathered(step) for step in steps], terms)
        self.lr_a, self.lr_b = (eta * self._multiple(role) for eta, role in zip(self._pair, _ROLES, strict=True))

    def _set_units(self, units: dict[Role, float], steps: Sequence[torch.Tensor | None]) -> None:
        """The rates at which the coming step goes as far as Adam's, over all A and over all B.

        Args:
            units: by role, what its rate is a multiple of; set here.
            steps: of A, B, A, B, …: (r, d_in), (d_out, r), …, or this process's parts of them.
        """
        for first, role in enumerate(_ROLES):
            parts = [local_part(step) for step in steps[first::2] if step is not None]
            norms = read([Size(torch.linalg.vector_norm(part, dtype=torch.float64), 1.0) for part in parts])
            squares = sum(norm**2 for norm in norms)
            total, count = self._summed([squares, float(sum(part.numel() for part in parts))])
            if 0 < total < math.inf:
                units[role] = self._size * math.sqrt(count / total)

    def _measure(self, steps: Sequence[torch.Tensor | None], terms: float) -> None:
        """Sets both rates from what the steps of A, B, A, B, …, (r, d_in), (d_out, r), …, do to what was recorded."""
        rho = self.rule.output_change(terms, len(self._layers)) if math.isfinite(terms) else math.nan
        moved = self._moved(steps)
        asked = {name: self.rule.asked_for(*measured, rho) for name, measured in moved.items()}
        lr_a, lr_b = (
            self._mean([getattr(rates, name) for rates in asked.values()]) or before
            for name, before in zip(("lr_a", "lr_b"), self._pair, strict=True)
        )
        lr_a, lr_b, self._why = self.rule.balanced(lr_a, lr_b)
        self._pair = (lr_a, lr_b)
        if self._units is not None:  # where λ of the rates themselves is another
            self._why += " in steps of Adam's size"
        for name, rates in asked.items():
            in_units = (
                lr and lr * self._multiple(role) for lr, role in zip((rates.lr_a, rates.lr_b), _ROLES, strict=True)
            )
            self.layer_rates[name] = LayerRates(*in_units)
        self._note_updates(moved)

    def _moved(self, steps: Sequence[torch.Tensor | None]) -> dict[str, tuple[Movement, float, float]]:
        """{layer: (what steps of RMS 1 do, RMS of A's step, RMS of B's)}, without those where any of it is no number.

        Args:
            steps: of A, B, A, B, …: (rank, inputs), (outputs, rank), …
        """
        sizes = read([Size(torch.zeros(()), 1.0) if step is None else size_of(step) for step in steps])
        seen: list[int] = []
        waiting: list[Size] = []
        for i, entry in enumerate(self._layers):
            weights = [gathered(weight.detach()).float() for weight in entry.weights]  # by every process, seen or not
            if entry.name not in self._recorder.samples:
                continue
            units = []
            for weight, place in zip(weights, (2 * i, 2 * i + 1), strict=True):
                step = steps[place]
                units.append(torch.zeros_like(weight) if step is None or not sizes[place] else step / sizes[place])
            seen.append(i)
            waiting += movement_sizes(entry, self._recorder.samples[entry.name], units[0], units[1], weights)
        values = read(waiting)
        moved = {}
        for number, i in enumerate(seen):
            entry, (size_a, size_b) = self._layers[i], sizes[2 * i : 2 * i + 2]
            whole = movement_of(entry, values[6 * number : 6 * number + 6])
            if whole.finite and math.isfinite(size_a) and math.isfinite(size_b):
                moved[entry.name] = (whole, size_a, size_b)
        return moved

    def _proposed(self) -> list[torch.Tensor | None]:
        """The optimizer's next steps of A, B, A, B, …, (r, d_in), (d_out, r), …; None where it takes none."""
        weights = factors(self._layers)
        rates = (1.0, 1.0) if self._units is None else (asking_rate(weights[::2]), asking_rate(weights[1::2]))
        # What is scaled to a size is scaled with its weight decay, or a rate for small gradients would make that large.
        steps = proposed(self._optimizer, weights, rates * len(self._layers), decay=self._units is not None)
        if all(step is None for step in steps):
            raise TrainerSetupError(
                f"{type(self._optimizer).__name__} does not hold the model's factors themselves, as under DeepSpeed; "
                f"use DDP or FSDP2, or {AS_NUMBERS}"
            )
        return steps

    def _note_updates(self, moved: Mapping[str, tuple[Movement, float, float]]) -> None:
        factor = self._groups.by_parameter()
        scaled = {}
        for entry in self._layers:
            if entry.name in moved:
                movement, size_a, size_b = moved[entry.name]
                a, b = (factor.get(id(weight), 0.0) for weight in entry.weights)
                rate_a, rate_b = (eta * self._multiple(role) for eta, role in zip(self._pair, _ROLES, strict=True))
                scaled[entry.name] = movement.scaled(rate_a * a * size_a, rate_b * b * size_b)
        if scaled:
            self.updates = FeatureUpdates.from_movements(self._layers, scaled)

    def _cope_with_nothing_seen(self) -> None:
        if anything_is_compiled() and not self._compiled:
            self._compiled = True  # this step is taken at the rates that there are, and the next one is looked at
            return
        compiled = "; if it is compiled, give lr and lr_ratio as numbers" if self._compiled else ""
        raise TrainerSetupError(
            "AutoRates saw no forward pass of the model before this step; give it the model that is trained" + compiled
        )

    def _say_what_was_not_seen(self) -> None:
        if self._told or (not self._compiled and is_compiled(self._recorder.modules.values())):
            return
        self._told = True
        unseen = [entry.name for entry in self._layers if entry.name not in self._recorder.samples]
        if unseen:
            warnings.warn(
                f"AutoRates cannot measure {len(unseen)} of {len(self._layers)} adapted layers (first: {unseen[0]}): "
                "experts, or no input, output or gradient was seen; their rates are those that the others ask for",
                LoraPlusWarning,
                stacklevel=2,
            )

    def _mean(self, values: Sequence[float | None]) -> float:
        """The geometric mean over the layers that gave a value, in all processes; 0 if none did."""
        logs = [math.log(value) for value in values if value]
        total, count = self._summed([sum(logs), float(len(logs))])
        return math.exp(total / count) if count else 0.0

    def _summed(self, values: list[float]) -> list[float]:
        """Over all processes that train this model."""
        groups = [self._process_group or self._recorder.process_group]
        weight = factors(self._layers)[0]
        if self._process_group is None and is_sharded(weight):
            groups = weight.device_mesh.get_all_groups()
        for group in groups:
            if group is not None:
                sums = torch.tensor(values, dtype=torch.float32, device=weight.device)
                torch.distributed.all_reduce(sums, group=group)
                values = sums.tolist()
        return values


def install(model: nn.Module, optimizer: torch.optim.Optimizer, asked: Rates) -> None:
    """`AutoRates` over an optimizer whose other rates were chosen for the user, as `create_optimizer` does.

    They are part of the optimizer's state: who saves that and loads it again goes on with the rates.

    Args:
        model: a PEFT model.
        optimizer: over its trainable parameters.
        asked: by the user.

    Raises:
        TrainerSetupError: what is no factor has no rate of the user's, and the optimizer's steps are not of Adam's
            size, so that no rate is known to be safe; or as `AutoRates`.
    """
    rates = AutoRates(model, optimizer)
    if rates._units is not None:
        for entry in trainable_parameters(model):
            setting = SETTING_OF_ROLE.get(entry.role)
            if entry.role not in _ROLES and (setting is None or getattr(asked, setting) is None):
                rates.remove()
                own = "" if setting is None else f"give it one ({setting}=…), "
                raise TrainerSetupError(
                    f'lr="auto" knows no rate of {type(optimizer).__name__} for {entry.name}, which is no factor; '
                    f"{own}freeze it, or use AdamW"
                )

    optimizer.register_state_dict_post_hook(_put_state)
    optimizer.register_load_state_dict_pre_hook(_take_state)


def _put_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for rates in installed(optimizer)[:1]:
        state[_STATE] = rates.state_dict()


def _take_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for rates in installed(optimizer)[:1]:
        if _STATE in state:
            rates.load_state_dict(state[_STATE])


def installed(optimizer: Any) -> list[AutoRates]:
    """All that set rates in an optimizer, wrapped or not: one for each model that it trains."""
    return list(getattr(unwrapped(optimizer), "loraplus_autos", ()))


def _register(optimizer: Any, rates: list[AutoRates]) -> None:
    """Keeps them where `explain` and checkpoints find the rates in use; `loraplus_auto` is the first of them."""
    optimizer.loraplus_autos = rates
    optimizer.loraplus_auto = rates[0] if rates else None
