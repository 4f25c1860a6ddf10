"""Mutation testing: changes the code in small ways, one at a time, and shows the changes that no near test notices.

`make mutants MODULE=src/loraplus/rates.py SECONDS=300`, or `python tests/mutants.py --help`. The operators are those of
cosmic-ray and four of our own. Every place of the module is changed in one way before any is changed in a second, in
an order that is always the same; so a bounded run looks at the whole module. Code and tests are copied first: the
working tree is never touched. A survivor is a question: is a test missing, or does the change change nothing?
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What takes long to import, once for all: each mutant's tests run in a fork.
HEAVY = ("torch", "transformers", "peft", "accelerate", "optuna", "sqlalchemy", "scipy.stats", "hypothesis", "pytest")
_SHARED = "tests/study/test_shared_study.py::test_"
_STORE = [
    "tests/study/test_store.py", "tests/study/test_one_outcome.py", f"{_SHARED}a_run_is_claimed_by_one_process_only",
    f"{_SHARED}an_abandoned_run_is_free_at_once", f"{_SHARED}a_heartbeat_keeps_a_run",
    "-k", "not postgresql and not sqlite",
]  # fmt: skip
NEAREST: dict[str, list[str]] = {
    "layouts": ["tests/test_layouts.py", "tests/test_roles.py"],
    "roles": ["tests/test_roles.py", "tests/test_layouts.py"],
    "partners": ["tests/test_partners.py", "tests/test_layouts.py"],
    "rates": ["tests/test_rates.py", "tests/test_groups.py"],
    "groups": ["tests/test_groups.py", "tests/test_existing_groups.py"],
    "existing_groups": ["tests/test_existing_groups.py"],
    "optimizer": ["tests/test_optimizers.py", "tests/test_groups.py"],
    "auto": ["tests/test_auto.py"],
    "owned_groups": ["tests/test_owned_groups.py"],
    "movement": ["tests/test_auto.py", "tests/test_feature_updates.py"],
    "watch": ["tests/test_watch.py"],
    "step_probe": ["tests/test_step_probe.py"],
    "twin": ["tests/test_twin.py", "tests/test_auto.py"],
    "study/lease": ["tests/study/test_lease.py"],
    "study/store": _STORE,
    "study/statistics": ["tests/study/test_statistics.py"],
    "study/pairs": ["tests/study/test_statistics.py"],
    "study/search/halving": ["tests/study/test_halving.py"],
    "study/search/parabola": ["tests/study/test_parabola.py", "tests/study/test_halving.py"],
    "study/search": ["tests/study/test_search.py"],
    "study/plan": ["tests/study/test_runner.py"],
}
"""The tests of each module that `make mutants` goes through; what is near is also what is quick."""


Change = tuple[Any, int]
"""An operator, and which of the places that it finds it changes."""


@dataclass(frozen=True)
class Mutant:
    """One change: the whole code with it, and the line before and after."""

    line: int
    before: str
    after: str
    code: str


def changes(code: str, seed: int = 0) -> list[Change]:
    """All changes of a module in the order in which they are tried: one of every place, then a second of each, …"""
    from cosmic_ray.ast import ast_nodes, get_ast

    skipped = _annotations(code)
    at: dict[tuple[int, int], list[Change]] = defaultdict(list)
    for operator in _operators():
        positions = [start for node in ast_nodes(get_ast(code)) for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(positions):
            if not any(first <= start < last for first, last in skipped):
                at[start].append((operator, occurrence))
    order = random.Random(seed)
    places = [order.sample(found, len(found)) for _, found in sorted(at.items())]
    order.shuffle(places)
    return [found[turn] for turn in range(max(map(len, places), default=0)) for found in places if turn < len(found)]


def mutants(code: str) -> Iterator[Mutant | None]:
    """The mutant of each of `changes`; None for one that comes to the same as an earlier one."""
    from cosmic_ray.mutating import mutate_code

    seen = {code, None}
    for operator, occurrence in changes(code):
        changed = None
        with contextlib.suppress(AttributeError):  # ExceptionReplacer on `except (A, B)`
            changed = mutate_code(code, operator, occurrence)
        yield None if changed in seen else _mutant(code, changed)
        seen.add(changed)


def _mutant(code: str, changed: str) -> Mutant:
    pairs = zip(code.splitlines(), changed.splitlines(), strict=False)
    line, (before, after) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return Mutant(line, before.strip(), after.strip(), changed)


def _annotations(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types stand, which nothing evaluates."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            found.append(node.annotation)
    return [((e.lineno, e.col_offset), (e.end_lineno or 0, e.end_col_offset or 0)) for e in found if e is not None]


def _operators() -> Iterator[Any]:
    """cosmic-ray's that need no arguments, and those that people's mistakes are like."""
    from cosmic_ray.operators.operator import Operator
    from cosmic_ray.plugins import get_operator, operator_names
    from parso.python.tree import Name, Number

    swap = {"min": "max", "max": "min", "any": "all", "all": "any"}

    class Replaces(Operator):
        """Puts other words in the place of a node."""

        words: Any = staticmethod(lambda node: [])

        def mutation_positions(self, node: Any) -> Iterator[Any]:
            yield from ((node.start_pos, node.end_pos) for _ in self.words(node))

        def mutate(self, node: Any, index: int) -> Any:
            return Name(self.words(node)[index], node.start_pos, prefix=node.get_first_leaf().prefix)

        @classmethod
        def examples(cls) -> tuple[()]:
            return ()

    class OtherNumber(Replaces):
        words = staticmethod(
            lambda node: (
                [f"({node.value} * 2)", f"({node.value} / 2)"]
                if isinstance(node, Number) and node.value.strip("0.")
                else []
            )
        )

    class OtherExtreme(Replaces):
        words = staticmethod(lambda node: [swap[node.value]] if isinstance(node, Name) and node.value in swap else [])

    class NoCall(Replaces):
        """A statement that is only a call is left out."""

        words = staticmethod(
            lambda node: ["pass"] if node.type == "atom_expr" and node.parent.type == "simple_stmt" else []
        )

    class NoAssignment(Replaces):
        """An assignment in place (`x += 1`) is left out."""

        words = staticmethod(
            lambda node: (
                ["pass"]
                if node.type == "expr_stmt"
                and node.children[1].type == "operator"
                and node.children[1].value not in ("=", ":")
                else []
            )
        )

    for name in sorted(operator_names()):
        if not (operator := get_operator(name)).arguments():
            yield operator()
    yield from (OtherNumber(), OtherExtreme(), NoCall(), NoAssignment())


class Bench:
    """Runs tests on a copy of the code, each time in a fork that imports the code anew."""

    def __init__(self, module: Path, tests: list[str], folder: Path) -> None:
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.folder, self.module, self.tests = folder, folder / module, tests
        self.log = folder / "tests.log"
        os.environ |= {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [
            str(folder / "src"),
            *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "tests"),
        ]
        for name in HEAVY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    def passes(self, code: str, seconds: float) -> bool:
        """Whether the tests pass on this code in so many seconds."""
        self.module.write_text(code, encoding="utf-8")
        child = os.fork()
        if not child:
            self._run()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    def _run(self) -> None:
        os.setsid()
        os.chdir(self.folder)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            import pytest

            status = int(pytest.main([*self.tests, "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]))
            if not Path(sys.modules["loraplus"].__file__ or "").is_relative_to(self.folder):
                status = 1
        finally:
            os._exit(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="src/loraplus/rates.py, say")
    parser.add_argument("--seconds", type=float, default=900, help="stop after so many (default: 900)")
    parser.add_argument("--changes", type=int, help="try no more than so many")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="what pytest is given; default: the nearest tests")
    asked = parser.parse_args()
    module = Path(asked.module).resolve()
    if not module.is_relative_to(ROOT / "src/loraplus") or not module.is_file():
        parser.error(f"{asked.module} is no file of src/loraplus")
    name = module.relative_to(ROOT / "src/loraplus").with_suffix("").as_posix()
    tests = asked.tests or [
        word for word in NEAREST.get(name, []) if not word.endswith(".py") or (ROOT / word).exists()
    ]
    if not tests:
        parser.error(f"no nearest tests of {name} are known: name them with --tests, or in {Path(__file__).name}")
    code = module.read_text(encoding="utf-8")
    left = len(changes(code))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loraplus-mutants-") as folder:
        bench = Bench(module.relative_to(ROOT), tests, Path(folder))
        before = time.monotonic()
        if not bench.passes(code, asked.seconds):
            print(bench.log.read_text(), f"the tests of {name} fail without any change", sep="\n", file=sys.stderr)
            return 2
        limit = 10 + 3 * (time.monotonic() - before)
        survivors = tried = 0
        for mutant in mutants(code):
            if tried == asked.changes or time.monotonic() - started > asked.seconds:
                break
            left -= 1
            if mutant is None:
                continue
            tried += 1
            if bench.passes(mutant.code, limit):
                survivors += 1
                print(f"{asked.module}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
    print(f"{name}: {tried - survivors} of {tried} changes noticed, {survivors} survived; {left} more not tried")
    return 0


if __name__ == "__main__":
    sys.exit(main())
