"""Where a model's factors sit among an optimizer's groups, and what has become of that since the groups were built."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from loraplus.errors import LoraPlusError
from loraplus.notices import told_once
from loraplus.roles import Role, TrainableParameter, clean_name, trainable_parameters
from loraplus.steps.group_rates import Groups, base_rate, group_labels
from loraplus.watching.model_changes import ModelChanges

_TOLERANCE = 1e-3


class Membership:
    """The group of every A and B as it was first seen. Holds no model and no parameter alive.

    Args:
        relations: {label of a group: its rate over that of A's group}, of the groups that were there at first.
    """

    def __init__(self, relations: Mapping[str, float]) -> None:
        self._relations = relations
        self._models: list[weakref.ref[nn.Module]] = []
        self._changes: list[ModelChanges] = []  # of each model, since it was last looked at
        self._places: dict[int, str] = {}  # as they were then
        self._homes: dict[int, str] = {}  # id of a factor: label of the group that it was first seen in
        self._elsewhere: set[int] = set()  # ids of those that another optimizer trains

    def add(self, model: nn.Module, groups: Groups) -> None:
        """Looks after a model's factors from now on; one that is looked after already stays as it is."""
        if all(known() is not model for known in self._models):
            places = _places(groups)
            self._places = self._places if self._models else places
            self._models.append(weakref.ref(model))
            self._changes.append(ModelChanges(model))
            for entry in _factors(model):
                if id(entry.parameter) not in places:
                    self._elsewhere.add(id(entry.parameter))
                else:
                    self._homes.setdefault(id(entry.parameter), places[id(entry.parameter)])

    def names(self) -> dict[int, str]:
        """{id of a parameter: its name}, of all models."""
        models = [model for known in self._models if (model := known()) is not None]
        return {id(parameter): clean_name(name) for model in models for name, parameter in model.named_parameters()}

    def problems(self, groups: Groups, reference: int) -> dict[str, str]:
        """{name of a factor: what is wrong with its place}, of what has changed since the last look.

        Args:
            groups: the optimizer's, now.
            reference: index of A's group.
        """
        places = _places(groups)
        if places == self._places and not any(changes.may_be() for changes in self._changes):
            return {}
        models = [model for known in self._models if (model := known()) is not None]
        self._changes, self._places = [ModelChanges(model) for model in models], places
        members = {id(parameter) for model in models for parameter in model.parameters()}
        built = {key for key, label in places.items() if label in self._relations}
        if not built <= members:  # sharded or flattened since, or of a model that is not known here
            return {}
        labels = group_labels(groups)
        rates = {label: base_rate(group) for label, group in zip(labels, groups, strict=True)}
        of_a = rates[labels[reference]] if labels else None
        of_a = of_a and of_a / (self._relations.get(labels[reference]) or 1.0)
        relations = {label: rate / of_a for label, rate in rates.items() if rate and of_a} | dict(self._relations)
        # Some optimizers step over a part of their groups at a time.
        complete = self._relations.keys() <= rates.keys()
        problems: dict[str, str] = {}
        for model in models:
            factors = _factors(model)
            problems |= self._moved(factors, places, relations, complete)
            problems |= self._added(factors, places, relations)
        return problems

    def _moved(
        self,
        factors: Iterable[TrainableParameter],
        places: Mapping[int, str],
        relations: Mapping[str, float],
        complete: bool,
    ) -> dict[str, str]:
        problems = {}
        for entry in factors:
            now, home = places.get(id(entry.parameter)), self._homes.get(id(entry.parameter))
            if now is None and complete and id(entry.parameter) not in self._elsewhere:
                problems[entry.name] = "is in no group, so it does not learn"
            elif now and home and now != home and not _same(relations.get(now), relations.get(home)):
                problems[entry.name] = f"was moved from {home} to {now}"
        return problems

    def _added(
        self, factors: Sequence[TrainableParameter], places: Mapping[int, str], relations: Mapping[str, float]
    ) -> dict[str, str]:
        """Factors that have come into a group, unfrozen or loaded later, without their rate in relation to A's."""

        def of(role: Role, *, known: bool) -> float | None:
            keys = [id(entry.parameter) for entry in factors if entry.role is role]
            labels = [places[key] for key in keys if key in places and (key in self._homes) is known]
            return next((relations[label] for label in labels if label in relations), None)

        of_a, of_b, of_new_a = of(Role.A, known=True), of(Role.B, known=True), of(Role.A, known=False)
        problems = {}
        for entry in factors:
            place = places.get(id(entry.parameter))
            if place is None or id(entry.parameter) in self._homes:
                continue
            beside = of_new_a or of_a
            if entry.role is Role.B and of_a and of_b and beside and place in relations:
                ratio = relations[place] / beside
                if not _same(ratio, of_b / of_a):
                    problems[entry.name] = (
                        f"came into {place} at {ratio:.4g} times the rate of its A, {of_b / of_a:.4g} times elsewhere"
                    )
        for entry in factors:
            if (place := places.get(id(entry.parameter))) is not None:
                self._homes.setdefault(id(entry.parameter), place)
        return problems


def _places(groups: Groups) -> dict[int, str]:
    """{id of a parameter: label of its group}."""
    return {
        id(parameter): label
        for label, group in zip(group_labels(groups), groups, strict=True)
        for parameter in group["params"]
    }


@told_once(silent=True)
def _factors(model: nn.Module) -> list[TrainableParameter]:
    try:
        return [entry for entry in trainable_parameters(model) if entry.role in (Role.A, Role.B)]
    except LoraPlusError:  # merged, frozen or disabled: nothing to look after
        return []


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=_TOLERANCE)
