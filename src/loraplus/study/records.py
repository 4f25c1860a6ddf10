"""What to run (`Trial`, or `Run` in an experiment of the paper) and what came back (`Record`), as studies keep it.

A record is stored as JSON with a digest, so that a changed one is not taken for what came back. Earlier versions kept
records without a digest, and those of experiments in a form of their own; `Record.from_dict` reads them all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from loraplus.study.arms import ALL

Phase = Literal["tuning", "final", "untuned"]
Value = float | int | str
Range = tuple[float, float, bool]
"""(lowest, highest, whether on a logarithmic scale) of a number that Optuna shows."""
ARMS = ("lora", "loraplus")
"""The arms of the main result and of the untuned picture; all that there are: `arms.ALL`."""
# What a run has as attributes in a storage.
RECORD, KEY, BEAT = "record", "key", "beat"
_DIGEST = "sha256"
_NO_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # neither JSON nor a database takes them


class Keyed(Protocol):
    """Something to run; two of one key are the same run."""

    @property
    def key(self) -> str:
        """Identity within a study."""
        ...

    @property
    def numbers(self) -> Mapping[str, tuple[float, Range]]:
        """What Optuna shows as parameters: {name: (value, range)}; one range a name in the whole study."""
        ...

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What `trial_of` needs besides."""
        ...


TrialT = TypeVar("TrialT", bound=Keyed)


@dataclass(frozen=True)
class Trial:
    """One training run of a study: the rates, the seed, why it is run, and its length if it is not the full one."""

    phase: Phase
    arm: str
    lr: float
    lr_ratio: float
    seed: int
    steps: int | None = None

    _RANGES: ClassVar[Mapping[str, Range]] = {"lr": (1e-12, 1e4, True), "lr_ratio": (1.0, 1e9, True)}

    @property
    def geometric_mean_lr(self) -> float:
        """√(η_A·η_B), the one number that λ = 1 and λ > 1 runs can be compared by."""
        return self.lr * math.sqrt(self.lr_ratio)

    @property
    def key(self) -> str:
        """Identity of the run within a study; two trials of one key are the same run."""
        length = "" if self.steps is None else f"/{self.steps}"
        return f"{self.phase}/{self.arm}/{self.lr:.6g}/{self.lr_ratio:.6g}/{self.seed}{length}"

    @property
    def numbers(self) -> Mapping[str, tuple[float, Range]]:
        """η_A and λ."""
        return {name: (getattr(self, name), values) for name, values in self._RANGES.items()}

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Phase, arm, seed and length."""
        return {name: value for name, value in asdict(self).items() if name not in self._RANGES}


@dataclass(frozen=True, eq=False)
class Run:
    """One run of an experiment. Its parameters alone tell it from others.

    Args:
        params: Names and values. A text that looks like a number is refused: a table would give it back as a number.

    Example:
        >>> Run({"optimizer": "adam", "width": 64, "lr": 1e-3}).key
        'optimizer=adam/width=64/lr=0.001'
    """

    params: Mapping[str, Value]

    _RANGE: ClassVar[Range] = (-1e12, 1e12, False)

    def __post_init__(self) -> None:
        for name, value in self.params.items():
            if isinstance(value, bool) or (isinstance(value, str) and parsed(value) != value) or value == "":
                raise ValueError(f"{name}={value!r}: give a number, or text that is not empty and reads as no number")

    @property
    def key(self) -> str:
        """Identity within the experiment; two runs of one key are the same run."""
        return "/".join(f"{name}={value}" for name, value in self.params.items())

    @property
    def numbers(self) -> Mapping[str, tuple[float, Range]]:
        """All parameters but texts."""
        return {name: (float(v), self._RANGE) for name, v in self.params.items() if not isinstance(v, str)}

    @property
    def attributes(self) -> Mapping[str, Any]:
        """All parameters."""
        return {"params": dict(self.params)}

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def parsed(text: str) -> Value:
    """A cell of a table: a whole number, a number, or text.

    Example:
        >>> [parsed(text) for text in ("3", "1e-05", "adam")]
        [3, 1e-05, 'adam']
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def trial_of(kept: Mapping[str, Any]) -> Trial | Run:
    """The trial or run of attributes and numbers, taken together.

    Raises:
        KeyError, TypeError, ValueError: something is missing or wrong.
    """
    if "params" in kept:
        return Run(kept["params"])
    needed = {spec.name: kept[spec.name] for spec in fields(Trial) if spec.name != "steps"}
    return Trial(**needed, steps=kept.get("steps"))


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training; a language model has no accuracy."""

    step: int
    eval_loss: float
    eval_accuracy: float | None = None


@dataclass(frozen=True)
class Record(Generic[TrialT]):
    """The outcome of one run. A diverged one counts as done, has eval_loss = inf and no test results.

    Args:
        trial: What was run.
        status: How it ended.
        steps, eval_loss, eval_accuracy, seconds_per_step: Of a training run; a language model has no accuracy.
        curve: Evaluations on the validation split during training.
        test_losses, test_correct: One entry a test example, in the order of the test split, for the phases final and
            untuned only: tuning never sees the test split. A language model has no `test_correct`; its test losses are
            such that the mean over examples is that over tokens.
        seconds: Wall-clock time of the run, with its evaluations.
        rates_reached: (η_A, η_B) that a method which sets its own rates arrived at, without the schedule.
        values: What an experiment measures of a whole run, or what an arm's run comes to on the test
            examples beside its losses, by name.
        rows: Of an experiment's run that trains many variants at once: one mapping each, all with the same names, such
            as {"lr_a": 1e-3, "lr_b": 1e-2, "test_loss": 0.2}.
        shown: What Optuna shows as the run's value. Default: the loss.
    """

    trial: TrialT
    status: Literal["done", "diverged"]
    steps: int = 0
    eval_loss: float = math.inf
    eval_accuracy: float | None = None
    seconds_per_step: float = 0.0
    curve: tuple[CurvePoint, ...] = ()
    test_losses: tuple[float, ...] = field(default=(), repr=False)
    test_correct: tuple[bool, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    rates_reached: tuple[float, float] | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Mapping[str, Value], ...] = ()
    shown: float | None = None

    @property
    def value(self) -> float | None:
        """What Optuna shows as the run's value; None if it failed."""
        value = self.eval_loss if self.shown is None else self.shown
        return value if self.status == "done" and math.isfinite(value) else None

    @property
    def lr(self) -> float | None:
        """η_A of an arm's run; None if the method set it and it is not known."""
        return self._rates[0]

    @property
    def lr_b(self) -> float | None:
        """η_B of the run, likewise."""
        return self._rates[1]

    @property
    def lr_ratio(self) -> float | None:
        """λ of the run, likewise."""
        return self._rates[2]

    @property
    def _rates(self) -> tuple[float | None, float | None, float | None]:
        trial: Any = self.trial
        if ALL[trial.arm].tuned:
            return trial.lr, trial.lr * trial.lr_ratio, trial.lr_ratio
        lr, lr_b = self.rates_reached or (None, None)
        return lr, lr_b, lr_b / lr if lr and lr_b is not None else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form. A loss that is not finite becomes null, other such numbers the words for them."""
        data = _in_words(asdict(self)) | {"found": self.rates_reached}
        del data["rates_reached"]
        if not math.isfinite(self.eval_loss):
            data["eval_loss"] = None
        left_out = [name for name in _OF_EXPERIMENTS if data[name] in ([], {}, None)]
        return {name: value for name, value in data.items() if name not in left_out}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record[Any]:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: something is missing, or of an arm or a status that there is none of.
        """
        trial = trial_of(data.get("trial", data))  # earlier versions, of an experiment
        if isinstance(trial, Trial) and trial.arm not in ALL:
            raise ValueError(f"of an arm that there is not: {trial.arm!r}")
        if data["status"] not in ("done", "diverged"):
            raise ValueError(f"of a status that there is not: {data['status']!r}")
        measured = {name: data[name] for name in _MEASURED if isinstance(trial, Trial) or name in data}
        if measured.get("eval_loss") is None:
            measured["eval_loss"] = math.inf
        points = (CurvePoint(**p) if isinstance(p, Mapping) else CurvePoint(*p) for p in _in_numbers(data["curve"]))
        return Record(
            trial,
            data["status"],
            **measured,
            curve=tuple(points),
            test_losses=tuple(data.get("test_losses", ())),
            test_correct=tuple(data.get("test_correct", ())),
            seconds=data.get("seconds", 0.0),
            rates_reached=tuple(data["found"]) if data.get("found") else None,
            values=_in_numbers(data.get("values", {})),
            rows=tuple(_in_numbers(data.get("rows", ()))),
            shown=data.get("shown"),
        )


_MEASURED = ("steps", "eval_loss", "eval_accuracy", "seconds_per_step")  # of every training run
_OF_EXPERIMENTS = ("values", "rows", "shown")  # left out where there are none


def _in_words(data: object) -> Any:
    """The same data, with words for numbers that are not finite."""
    if isinstance(data, Mapping):
        return {name: _in_words(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_in_words(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def _in_numbers(data: object) -> Any:
    """Inverse of `_in_words`."""
    if isinstance(data, Mapping):
        return {name: _in_numbers(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_in_numbers(value) for value in data]
    return _NO_NUMBERS.get(data, data) if isinstance(data, str) else data


def stored(record: Record) -> dict[str, Any]:
    """A record as it is stored: with its digest."""
    data: dict[str, Any] = json.loads(json.dumps(record.to_dict()))
    return {**data, _DIGEST: _digest(data)}


def restored(data: object) -> Record[Any]:
    """Inverse of `stored`.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    if not isinstance(data, Mapping):
        raise ValueError("an outcome that is none")
    kept = {name: value for name, value in data.items() if name != _DIGEST}
    if _DIGEST in data and data[_DIGEST] != _digest(kept):
        raise ValueError("an outcome that has been changed")
    try:
        return Record.from_dict(kept)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an outcome that lacks something or has too much ({error})") from None


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
