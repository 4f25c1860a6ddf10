"""What each command writes to its folder, which keys show that a configuration is its own, and which came later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplus.files.checkpoints import checkpoints
from loraplus.files.manifest import MANIFEST_FILE, is_as_listed

CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
SCORES_FILE = "scores.json"
DATA_FILE = "data_facts.json"
PLOTS_FOLDER = "plots"
LOGS_FOLDER = "logs"
NOT_COMPARED = ("workers", "output", "report_to")
"""Settings that may differ on resuming: they do not change what is computed."""
LATER_SETTINGS = {
    "task": "classification",
    "loss_on": None,
    "packing": None,
    "long_examples": None,
    "chat_template": None,
    "load_in_4bit": False,
    "samples": 3,
    "lr_magnitude": None,
    "lr_overrides": None,
    "lr_ratio_overrides": None,
    "prompt_column": None,
    "completion_column": None,
    "messages_column": None,
    "encoding": None,
    "speed_up": True,  # runs before it computed the same, to rounding
}
"""Settings that came later, with the value that runs without them had."""


@dataclass(frozen=True)
class Command:
    """All that `--overwrite` may delete of what a command wrote; anything else in its folder is the user's.

    Args:
        known_by: keys that a configuration has if it is this command's.
        files: that it writes, beside the configuration.
        pattern: of more such files.
        of_language: files that it writes where the task trains a language model.
        with_scores: files that stand beside its scores.json; earlier versions wrote neither.
        has_checkpoints: whether checkpoints are among what it writes, and a card that is its own until it is edited.
    """

    known_by: frozenset[str]
    files: tuple[str, ...]
    pattern: str = ""
    of_language: tuple[str, ...] = ()
    with_scores: tuple[str, ...] = ()
    has_checkpoints: bool = False

    def written(self, folder: Path, config: Mapping[str, Any]) -> list[Path]:
        """What it has written, or may have, to a folder with such a configuration."""
        is_language, scored = config.get("task") in ("sft", "lm"), (folder / SCORES_FILE).is_file()
        more = (self.of_language if is_language else ()) + (self.with_scores if scored else ())
        card = (CARD_FILE,) if self.has_checkpoints and is_as_listed(folder, CARD_FILE) else ()
        # What tells whose a file is goes after it, so that a clearing that was interrupted can be repeated.
        paths = [folder / name for name in (*card, *more, *self.files)]
        paths += sorted(folder.glob(self.pattern)) if self.pattern else []
        if "tensorboard" in str(config.get("report_to")):
            paths += sorted((folder / LOGS_FOLDER).glob("*/events.out.tfevents.*"))
        return paths + (checkpoints(folder) if self.has_checkpoints else [])


_STUDY = ("study.journal", "study.journal.lock", "workers.log", "summary.json", "runs.csv")
_RUN = frozenset({"model", "data", "output"})
_TOKENIZER = (  # which of them there are depends on the model
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt "
    "spiece.model sentencepiece.bpe.model tokenizer.model chat_template.jinja"
).split()
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "config.json", "loraplus.json", MANIFEST_FILE)
TRAIN = Command(
    _RUN | {"lr_ratio"},
    (DATA_FILE, "metrics.json", "curves.csv", *_ADAPTER, *_TOKENIZER, SCORES_FILE),
    of_language=("samples.json", "report.html"),
    with_scores=("report.html",),
    has_checkpoints=True,
)
COMMANDS = (
    Command(frozenset({"experiment", "scale", "seeds"}), (*_STUDY, "index.html"), pattern=f"{PLOTS_FOLDER}/*.png"),
    Command(_RUN | {"tuning_runs"}, (*_STUDY, "report.html", "tune.json", "trials.csv", "best.yaml")),
    TRAIN,
)
"""The first command whose keys a configuration has is the one that wrote it. Order matters: several have a λ."""


def command_of(config: Iterable[str]) -> Command | None:
    """The command that a configuration with such keys is of; None if it is no loraplus run's."""
    keys = set(config)
    return next((command for command in COMMANDS if command.known_by <= keys), None)


def names_of_all() -> set[str]:
    """Every name of a file that some command writes."""
    return {CONFIG_FILE}.union(*((*command.files, *command.of_language) for command in COMMANDS))
