"""The doctor inside a script's own process: it watches the first steps, writes what it found, and ends the process."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from loraplus.diagnosis.findings import alive, find, has_factors, idle_optimizers, models_of, trainer_of
from loraplus.diagnosis.judging import judge
from loraplus.diagnosis.live import expected_of
from loraplus.diagnosis.observer import Observed, Observer
from loraplus.diagnosis.ratio import Expected
from loraplus.diagnosis.script import SO_FAR, STOPPED
from loraplus.errors import LoraPlusError
from loraplus.steps.group_rates import rate_as_number
from loraplus.steps.wrappers import unwrapped

_AT_ZERO = 200  # steps at a rate of 0, as in a warm-up, that are waited for
_WITHOUT_FACTORS = 50  # steps of an optimizer that trains no adapter: another may follow
_LOOKS = 3  # backward passes before which optimizers are looked for that torch's hooks do not reach
_SECONDS_TO_BE_ENDED = 60.0  # by the doctor, who may have been killed
_A_RUN = 2  # steps: optimizers that step in turn have not taken as many when the next one begins
_watches: list[Watch] = []


def watch(settings: Mapping[str, Any]) -> None:
    """Begins, once in a process.

    Args:
        settings: `folder` for what is found, `steps` to watch, `source`, and what is expected: `lr_ratio` or None,
            `named` (what names a ratio, or ""), `asked` (the λ that the command line names, or None).
    """
    if not _watches:
        _watches.append(Watch(settings))


class Watch:
    """Hooks on all optimizers of this process, and what they were built with."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._built: dict[int, float] = {}
        self._found: dict[str, Any] = {}
        self._process = os.getpid()
        self._observer = Observer(self._before_another, self._after_step)
        self._note_what_is_built()
        self._reach_unhooked()
        atexit.register(self._at_exit)  # a script may end before that many steps

    def _note_what_is_built(self) -> None:
        add, built = Optimizer.add_param_group, self._built

        @functools.wraps(add)
        def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
            add(self, param_group)
            added = self.param_groups[-1]
            rate = rate_as_number(added.get("lr"))
            if rate is not None:
                built.update({id(parameter): rate for parameter in added["params"]})

        Optimizer.add_param_group = add_param_group

    def _reach_unhooked(self) -> None:
        """Once gradients are computed, the optimizers of a script are there."""
        backward, left = torch.autograd.backward, [_LOOKS]

        @functools.wraps(backward)
        def watched_backward(*args: Any, **kwargs: Any) -> Any:
            if left[0] and not self._observer.seen:
                left[0] -= 1
                self._observer.reach_unhooked()
            return backward(*args, **kwargs)

        torch.autograd.backward = watched_backward

    def _before_another(self, optimizer: Any) -> None:
        """An optimizer that begins after another has taken steps is that of a next run in the same process."""
        if self._found and any(observed.steps >= _A_RUN for observed in self._observer.seen):
            self._stop()

    def _after_step(self, observed: Observed) -> None:
        if os.getpid() != self._process:  # a fork has the hooks, too
            return
        wanted = self._settings["steps"]
        trains = any(map(has_factors, models_of([observed.optimizer], alive().modules)))
        if trains:
            self._look(self._observer.seen)
            self._put(SO_FAR)
        if observed.at_zero >= _AT_ZERO or observed.steps >= (wanted if trains else wanted + _WITHOUT_FACTORS):
            if not self._found:
                self._look(self._observer.seen)
            self._stop()

    def _at_exit(self) -> None:
        """A script that ends by itself: what its last step showed, or what an optimizer without a step would do."""
        if os.getpid() == self._process:
            if not self._found and not self._observer.seen:
                gc.collect()
                there = alive()
                idle = [each for each in there.optimizers if unwrapped(each) is each and hasattr(each, "param_groups")]
                if idle and any(map(has_factors, models_of(idle, there.modules))):
                    self._look(list(map(Observed, idle)))
            elif not self._found:
                self._look(self._observer.seen)
            self._write()

    def _stop(self) -> None:
        """Nothing that the script would do after this is done, and nothing that its parent does once it has ended."""
        self._write(STOPPED)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        folder, until = Path(self._settings["folder"]), time.monotonic() + _SECONDS_TO_BE_ENDED
        while folder.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os._exit(0)

    def _look(self, seen: Sequence[Observed]) -> None:
        try:
            self._found = self._diagnosis(seen)
        except LoraPlusError as error:
            self._found = {"refused": str(error)}
        except Exception as error:  # told by the process that started this one
            self._found = {"failed": f"{type(error).__name__}: {error}"}

    def _write(self, ending: str = ".json") -> None:
        self._observer.remove()
        if self._found:
            self._put(ending)

    def _put(self, ending: str) -> None:
        path = Path(self._settings["folder"], f"{os.environ.get('RANK', '0')}-{self._process}")
        path.with_suffix(".tmp").write_text(json.dumps(self._found), encoding="utf-8")
        path.with_suffix(".tmp").replace(path.with_suffix(ending))

    def _diagnosis(self, seen: Sequence[Observed]) -> dict[str, Any]:
        gc.collect()  # optimizers and models that nobody has any more
        there = alive()
        models = models_of([observed.optimizer for observed in seen], there.modules)
        optimizers = [*seen, *map(Observed, idle_optimizers(seen, models, there.optimizers))]
        findings = find(models, optimizers, self._built)
        return judge(
            findings, self._expected(trainer_of(seen, there.trainers), seen), self._settings["source"]
        ).to_dict()

    def _expected(self, trainer: Any, seen: Sequence[Observed]) -> Expected:
        expected = expected_of(trainer, self._settings["lr_ratio"])
        if expected.lr_ratio is None and self._settings["asked"] is not None:
            return replace(expected, lr_ratio=self._settings["asked"], where="the command line says", watched=True)
        ours = any(observed.is_ours for observed in seen)
        names_ratio = bool(self._settings["named"]) and not ours  # ours has the ratio that it was given, 1 too
        where = expected.where or self._settings["named"]
        return replace(expected, where=where, names_ratio=names_ratio, watched=True)
