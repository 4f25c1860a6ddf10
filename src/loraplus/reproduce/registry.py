"""The experiments by name. A new one is a class in a file of its own, and a line here and in descriptions.py."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from loraplus.errors import InputError
from loraplus.reproduce.descriptions import DESCRIPTIONS, Description

if TYPE_CHECKING:
    from loraplus.reproduce.experiment import Experiment

# Imported when asked for: some need packages that others do not.
EXPERIMENTS = {
    "toy": "loraplus.reproduce.toy:Toy",
    "coordinates": "loraplus.reproduce.coordinates:Coordinates",
    "glue-roberta": "loraplus.reproduce.glue_roberta:GlueRoberta",
    "glue-gpt2": "loraplus.reproduce.glue_gpt2:GlueGpt2",
    "llama-mnli": "loraplus.reproduce.llama_mnli:LlamaMnli",
    "llama-flan": "loraplus.reproduce.llama_flan:LlamaFlan",
    "decoder": "loraplus.reproduce.decoder:Decoder",
    "init": "loraplus.reproduce.init:Init",
}


def check_name(name: str) -> None:
    """Makes sure that there is an experiment of a name.

    Raises:
        InputError: there is none; the nearest is named.
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}"
        raise InputError(f"there is no experiment {name!r}; {hint} (loraplus reproduce --list)")


def described(name: str) -> Description:
    """The description of an experiment. Its class is imported only if descriptions.py does not have it.

    Args:
        name: one of `EXPERIMENTS`.
    """
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    kind = experiment_class(name)
    return Description(kind.title, kind.claims, kind.scales)


def experiment_class(name: str) -> type[Experiment]:
    """The class of an experiment.

    Raises:
        InputError: there is none of that name.
    """
    check_name(name)
    module, attribute = EXPERIMENTS[name].split(":")
    experiment: type[Experiment] = getattr(import_module(module), attribute)
    return experiment
