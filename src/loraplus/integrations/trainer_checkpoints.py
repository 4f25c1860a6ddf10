"""Trainer's checkpoints and saved models, whole or absent.

A checkpoint is written in a folder of its own, sealed with a manifest and renamed to `checkpoint-N`. So is what
`save_model` writes, file by file. A full disk ends the run in one line, and leaves the checkpoints that are there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import get_last_checkpoint

from loraplus import manifest
from loraplus.errors import CheckpointError, DamagedCheckpointError, LoraPlusWarning
from loraplus.integrations.whole_checkpoints import (
    STATE_FILE,
    check_checkpoint,
    check_place,
    checkpoint_fault,
    checkpoint_to_resume,
    newest_whole,
    rotate,
)
from loraplus.scratch import folder_beside, made_folder
from loraplus.whole import follow_umask, move_into, put_in_place, remove_leftovers, temporary_path

CARD_FILE = "README.md"
_OF_WRITING = ("PytorchStreamWriter", "unexpected pos", "file write failed")


class WholeCheckpoints:
    """Gives any Trainer class checkpoints that are there whole or not at all."""

    _staging: Path | None = None
    _resumed_from: Path | None = None

    # What the Trainer that this is mixed into provides.
    accelerator: Any
    args: Any
    control: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        with writing(target, folder):
            check_place(target)
            with self._staged_by_all(target) as staging:
                self._staging = staging
                try:
                    super()._save_checkpoint(model, trial)  # type: ignore[misc]
                finally:
                    self._staging = None
                self._best_is_in(folder, staging)
                self._wait()  # each process has written its part
                if self.args.should_save:
                    new = staging / target.name
                    self.state.save_to_json(str(new / STATE_FILE))
                    follow_umask(new)
                    manifest.seal(new)
                    put_in_place(new, target)
                self._wait()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(folder, self.args.save_total_limit, [target, *([Path(best)] if best else [])])

    @contextlib.contextmanager
    def _staged_by_all(self, target: Path) -> Iterator[Path]:
        """The same new folder in every process."""
        staging = temporary_path(target)
        if self.args.world_size > 1:
            names = [staging.name]
            broadcast_object_list(names)
            staging = staging.with_name(names[0])
        if not self.args.should_save:
            yield staging
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with made_folder(staging):
            yield staging

    def _best_is_in(self, folder: Path, staging: Path) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(folder / Path(best).name)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # once it is in its place
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._staging is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        with saved_whole(Path(output_dir or self.args.output_dir)) as folder:
            super()._save(str(folder), state_dict)  # type: ignore[misc]

    def _wait(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: Trainer would make one more step
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _whole_checkpoint(self, asked: Any) -> Any:
        """What `train(resume_from_checkpoint=…)` was given, or in place of True the newest checkpoint that is whole.

        Raises:
            DamagedCheckpointError: it is damaged, or there are only damaged ones.
        """
        if self.args.should_save:
            remove_leftovers(Path(self.args.output_dir))
        self._resumed_from = None
        if not asked or (asked is True and not _any_checkpoint(self.args.output_dir)):
            return asked
        found: list[Any] = [None, None]
        if self.args.process_index == 0:
            found = self._judged(asked)
        if self.args.world_size > 1:
            broadcast_object_list(found)
        chosen, error = found
        if error is not None:
            raise DamagedCheckpointError(error)
        if chosen is not None:
            self._resumed_from = Path(chosen)
        return chosen

    def _judged(self, asked: str | Literal[True]) -> list[Any]:
        """[the checkpoint, what is wrong]; one of them is None."""
        try:
            if asked is not True:
                if Path(asked).is_dir():
                    check_checkpoint(Path(asked))
                return [asked, None]
            found = checkpoint_to_resume(Path(self.args.output_dir), "train without resume_from_checkpoint")
            return [None if found is None else str(found), None]
        except DamagedCheckpointError as error:
            return [None, str(error)]

    def _find_best(self) -> None:
        """Has a resumed run know where its best checkpoint is now, or that it is no more."""
        step = self.state.best_global_step
        if self._resumed_from is None or step is None or not self.args.load_best_model_at_end:
            return
        place = self._resumed_from.with_name(f"checkpoint-{step}")
        if not place.is_dir() and self.state.best_model_checkpoint:  # resumed into another folder
            place = Path(self.state.best_model_checkpoint)
        fault = checkpoint_fault(place) if place.is_dir() else "it is not there"
        if fault is None:
            self.state.best_model_checkpoint = str(place)
            return
        self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None
        warnings.warn(
            f"{place}, the best checkpoint so far, cannot be used: {fault}; the best of the steps that follow "
            "takes its place",
            LoraPlusWarning,
            stacklevel=2,
        )


def _any_checkpoint(folder: str) -> bool:
    return os.path.isdir(folder) and get_last_checkpoint(folder) is not None


@contextlib.contextmanager
def saved_whole(target: Path) -> Iterator[Path]:
    """A folder to save a model in; in the end each of its files is renamed to its place in the target.

    Raises:
        CheckpointError: the disk is full, say; the target is as it was.
    """
    with writing(target, target):
        target.mkdir(parents=True, exist_ok=True)
        with folder_beside(target / "model") as folder:
            if (target / CARD_FILE).is_file():  # PEFT adds to a model's card
                shutil.copy(target / CARD_FILE, folder)
            yield folder
            follow_umask(folder)
            move_into(folder, target)


@contextlib.contextmanager
def writing(target: Path, run: Path) -> Iterator[None]:
    """Turns what a full or lost disk raises, in whatever library, into one line.

    Args:
        target: what is being written.
        run: the folder of the run's checkpoints.

    Raises:
        CheckpointError: says what could not be written, and which checkpoint is whole.
    """
    try:
        yield
    except Exception as error:
        reason = _of_the_disk(error, run)
        if reason is None or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{target} could not be written ({reason}); {_way_on(run)}") from error


def _of_the_disk(error: BaseException | None, folder: Path) -> str | None:
    """Why a file could not be written, None if the error is of another kind."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if type(error).__name__ == "SafetensorError" or any(sign in str(error) for sign in _OF_WRITING):
            return str(error) if _has_room(folder) else "the disk is full"
        error = error.__cause__ or error.__context__
    return None


def _has_room(folder: Path) -> bool:
    return not folder.is_dir() or shutil.disk_usage(folder).free > 2**20


def _way_on(folder: Path) -> str:
    whole, _ = newest_whole(folder) if folder.is_dir() else (None, None)
    return f"{whole} is whole, go on from it once there is room" if whole else "no checkpoint is there yet"
