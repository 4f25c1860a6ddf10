"""The doctor inside a script's own process: it watches the first steps, writes what it found, and ends the process."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from loraplus.doctor.findings import find, idle_optimizers, models_of, trainer_of
from loraplus.doctor.judging import Expected, judge
from loraplus.doctor.live import expected_of
from loraplus.doctor.observer import Observed, Observer
from loraplus.errors import LoraPlusError
from loraplus.group_rates import rate_as_number

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
        self._written = False
        self._process = os.getpid()
        self._observer = Observer(settings["steps"], self._stop)
        self._note_what_is_built()
        atexit.register(self._write)  # a script may end before that many steps

    def _note_what_is_built(self) -> None:
        add, built = Optimizer.add_param_group, self._built

        def add_param_group(optimizer: Any, group: Any) -> None:
            add(optimizer, group)
            added = optimizer.param_groups[-1]
            rate = rate_as_number(added.get("lr"))
            if rate is not None:
                built.update({id(parameter): rate for parameter in added["params"]})

        Optimizer.add_param_group = add_param_group

    def _stop(self) -> None:
        self._write()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)  # nothing that the script would do at its end is done: no save, no upload

    def _write(self) -> None:
        if self._written or not self._observer.seen or os.getpid() != self._process:  # a fork has the hooks, too
            return
        self._written = True
        self._observer.remove()
        try:
            content = self._diagnosis()
        except LoraPlusError as error:
            content = {"refused": str(error)}
        except Exception as error:  # told by the process that started this one
            content = {"failed": f"{type(error).__name__}: {error}"}
        path = Path(self._settings["folder"], f"{os.environ.get('RANK', '0')}-{self._process}")
        path.with_suffix(".tmp").write_text(json.dumps(content), encoding="utf-8")
        path.with_suffix(".tmp").replace(path.with_suffix(".json"))

    def _diagnosis(self) -> dict[str, Any]:
        seen = self._observer.seen
        gc.collect()  # optimizers and models that nobody has any more
        models = models_of([observed.optimizer for observed in seen])
        optimizers = [*seen, *map(Observed, idle_optimizers(seen, models))]
        trainer = next(filter(None, (trainer_of(observed.optimizer) for observed in seen)), None)
        findings = find(models, optimizers, self._built)
        return judge(findings, self._expected(trainer), self._settings["source"]).to_dict()

    def _expected(self, trainer: Any) -> Expected:
        given = self._settings["lr_ratio"]
        expected = expected_of(trainer, given)
        if expected.lr_ratio is None and self._settings["asked"] is not None:
            expected = Expected(self._settings["asked"], "the command line says", expected.weight_decay)
        where, named = expected.where, bool(self._settings["named"])
        return Expected(expected.lr_ratio, where or self._settings["named"], expected.weight_decay, named)
