"""Trainer's checkpoints and saved models, whole or absent.

A checkpoint is written in a folder of its own, sealed with a manifest and renamed to `checkpoint-N`. So is what
`save_model` writes, file by file. A full disk ends the run in one line, and leaves the checkpoints that are there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from loraplus.errors import CheckpointError, DamagedCheckpointError, LoraPlusError, LoraPlusWarning, one_line
from loraplus.files.checkpoints import (
    NAME,
    STATE_FILE,
    check_checkpoint,
    check_places,
    checkpoint_to_resume,
    checkpoints,
    holds_optimizer,
    model_fault,
    names_written,
    newest_whole,
    rotate,
)
from loraplus.files.commands import CARD_FILE
from loraplus.files.manifest import is_sealed, seal
from loraplus.files.replacing import put_all_back, replace_folder
from loraplus.files.scratch import folder_beside, made_folder
from loraplus.files.whole import follow_umask, move_into, remove_leftovers, sync_folder, temporary_path

ADAPTER_FILE = "adapter_model.safetensors"
_LONGEST_QUOTE = 200
_OF_WRITING = ("PytorchStreamWriter", "unexpected pos", "file write failed")


if TYPE_CHECKING:  # what is mixed into a Trainer has what a Trainer has
    from transformers import Trainer as _MixedInto
else:
    _MixedInto = object


class WholeCheckpoints(_MixedInto):
    """Gives any Trainer class checkpoints that are there whole or not at all."""

    _staging: Path | None = None
    _resumed_from: Path | None = None
    _passed_over: Collection[Path] = ()
    _anew = "train without resume_from_checkpoint"
    _only_ours = False

    # A Trainer's, which says that there may be none.
    args: Any
    model: Any
    optimizer: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("_get_output_dir")
        if own is not None:  # a subclass's: while a checkpoint is written it is elsewhere, too
            cls._get_output_dir = functools.wraps(own)(
                lambda self, trial: own(self, trial) if self._staging is None else str(self._staging)
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        with writing(target, folder), self._staged_by_all(target) as staging:
            new = staging / target.name
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(folder / Path(best).name)
            self._wait()  # each process has written its part
            if self.args.should_save and new.is_dir():  # a subclass may leave a checkpoint out
                self._write_record(new, sealed=True)
                self.state.save_to_json(str(new / STATE_FILE))
                follow_umask(new)
                # A card is there to be written in.
                seal(new, [path for path in new.rglob("*") if path.is_file() and path.name != CARD_FILE])
                self._put_in_place(new, target)
            self._wait()
            if self.args.local_process_index == 0 and not self.args.should_save and new.is_dir():
                self._put_in_place(new, target)  # what a machine with a disk of its own has to keep
                staging.rmdir()
        if self.args.push_to_hub and target.is_dir():
            self._push_from_checkpoint(str(target))
        if self.args.should_save and target.is_dir():
            best = self.state.best_model_checkpoint
            kept = [target, *([Path(best)] if best else [])]
            rotate(folder, self.args.save_total_limit, kept, self._passed_over)

    def _put_in_place(self, new: Path, target: Path) -> None:
        sync_folder(new)
        written = {path.name for path in new.iterdir()} | (names_written(target) if target.is_dir() else set())
        replace_folder(new, target, written)

    def _write_record(self, folder: Path, *, sealed: bool = False) -> None:
        """Writes what is to stand beside a model."""

    @contextlib.contextmanager
    def _staged_by_all(self, target: Path) -> Iterator[Path]:
        """The same new folder in every process."""
        check_places(target.parent)
        staging = target.with_name(self._from_first(lambda: temporary_path(target).name))
        if not self.args.should_save:
            yield staging
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        with made_folder(staging):
            yield staging

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # once it is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._staging is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with saved_whole(Path(output_dir or self.args.output_dir), Path(self.args.output_dir)) as folder:
            super()._save(str(folder), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        with _reading(resume_from_checkpoint):
            _check_names(Path(resume_from_checkpoint), args[0] if args else kwargs.get("model") or self.model)
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with _reading(self._resumed_from):
            super()._load_callback_state()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: Trainer would make one more step
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _wait(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _from_first(self, ask: Callable[[], Any]) -> Any:
        """What the first process answers, in every process."""
        answer = [ask() if self.args.process_index == 0 else None]
        if self.args.world_size > 1:
            broadcast_object_list(answer)
        return answer[0]

    def _whole_checkpoint(self, asked: Any) -> Any:
        """What `train(resume_from_checkpoint=…)` was given, or in place of True the newest checkpoint that is whole.

        Raises:
            DamagedCheckpointError: it is damaged, or there are only damaged ones.
        """
        folder = Path(self._get_output_dir(None))
        if self.args.should_save and folder.is_dir():
            put_all_back(folder, NAME)
            remove_leftovers(folder)
        check_places(folder)
        self._resumed_from, self._passed_over = None, ()
        if not asked:
            return None
        self._wait()
        chosen, self._passed_over, error = self._from_first(lambda: self._judged(asked, folder))
        if error is not None:
            raise DamagedCheckpointError(error)
        if isinstance(chosen, str):
            self._resumed_from = Path(chosen)
            if self.args.process_index == 0 and self._resumed_from.is_dir() and not holds_optimizer(self._resumed_from):
                warnings.warn(
                    f"{chosen} holds no state of the optimizer (save_only_model): the weights go on, the optimizer and "
                    "its schedule start anew",
                    LoraPlusWarning,
                    stacklevel=2,
                )
        return chosen

    def _judged(self, asked: Any, folder: Path) -> tuple[Any, Collection[Path], str | None]:
        """(the checkpoint, those passed over, what is wrong)."""
        try:
            if asked is not True:
                if Path(asked).is_dir():
                    check_checkpoint(Path(asked))
                return str(asked), (), None
            if not folder.is_dir() or not checkpoints(folder):
                return True, (), None  # for Trainer to say
            checkpoint, passed = checkpoint_to_resume(folder, self._anew, ours=self._only_ours)
            return None if checkpoint is None else str(checkpoint), tuple(passed), None
        except DamagedCheckpointError as error:
            return None, (), str(error)

    def _find_best(self) -> None:
        """Has a resumed run know where its best checkpoint is now, or that it is no more.

        Raises:
            DamagedCheckpointError: it is damaged, and no steps follow of which one may be as good.
        """
        resumed = self._resumed_from
        if resumed is None or not self.args.load_best_model_at_end:
            return
        place, fault = self._from_first(lambda: _best_and_fault(resumed))
        if place is None:
            return
        self.state.best_model_checkpoint = place
        if fault is None:
            return
        if self.state.global_step >= self.state.max_steps:
            raise DamagedCheckpointError(
                f"{place}, the best checkpoint of a finished training, cannot be used: {fault}; train again, or load "
                f"the last weights from {resumed}"
            )
        self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None
        if self.args.process_index == 0:
            warnings.warn(
                f"{place}, the best checkpoint so far, cannot be used: {fault}; the best of the steps that follow "
                "takes its place",
                LoraPlusWarning,
                stacklevel=2,
            )


def _best_and_fault(resumed: Path) -> tuple[str | None, str | None]:
    """(the best checkpoint, where it is now; what is wrong with its weights), as the resumed one tells."""
    state = json.loads((resumed / STATE_FILE).read_text(encoding="utf-8"))
    if not (saved := state.get("best_model_checkpoint")):
        return None, None
    place = resumed.with_name(Path(saved).name)
    if not place.is_dir():  # resumed into another folder
        place = Path(saved)
    if place == resumed:  # its files were checked when it was chosen
        return str(place), None
    return str(place), model_fault(place) if place.is_dir() else "it is not there"


@contextlib.contextmanager
def saved_whole(target: Path, run: Path) -> Iterator[Path]:
    """A folder to save a model in; in the end each of its files is renamed to its place in the target.

    Args:
        target: may be there, with other files.
        run: the folder of the run's checkpoints.

    Raises:
        CheckpointError: the disk is full, say; the target is as it was.
    """
    with writing(target, run):
        target.mkdir(parents=True, exist_ok=True)
        with folder_beside(target / "model") as folder:
            if (target / CARD_FILE).is_file():  # PEFT adds to a model's card
                shutil.copy(target / CARD_FILE, folder)
            yield folder
            follow_umask(folder)
            move_into(folder, target)


def _check_names(checkpoint: Path, model: Any) -> None:
    """Makes sure that an adapter's file holds all that the model trains: PEFT passes over names that it does not know.

    Raises:
        DamagedCheckpointError: names the first tensor that is missing.
    """
    path, adapters = checkpoint / ADAPTER_FILE, getattr(model, "peft_config", {})
    if len(adapters) != 1 or is_sealed(checkpoint) or not path.is_file():
        return
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
    wanted = get_peft_model_state_dict(model, adapter_name=next(iter(adapters)), save_embedding_layers=False)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DamagedCheckpointError(
            f"{checkpoint} cannot be used: {ADAPTER_FILE} lacks {len(missing)} of the adapter's {len(wanted)} tensors "
            f"(first: {missing[0]}); resume from another, or start the run again"
        )


@contextlib.contextmanager
def _reading(checkpoint: Any) -> Iterator[None]:
    """Turns what a damaged file of a checkpoint raises, in whatever library, into one line.

    A manifest has told of damage before; a checkpoint of an earlier version, or of Trainer itself, has none.

    Raises:
        DamagedCheckpointError: names the checkpoint.
    """
    try:
        yield
    except Exception as error:
        unsealed = checkpoint is not None and Path(checkpoint).is_dir() and not is_sealed(Path(checkpoint))
        if isinstance(error, LoraPlusError) or not unsealed:
            raise
        said = one_line(f"{type(error).__name__}: {error}", _LONGEST_QUOTE)
        raise DamagedCheckpointError(
            f"{checkpoint} cannot be loaded ({said}); resume from another, or start the run again"
        ) from error


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
        reason = None if isinstance(error, LoraPlusError) else _of_the_disk(error, run)
        if reason is None:
            raise
        whole, _ = newest_whole(run)
        kept = f"{whole} is whole: mend that, and go on from it" if whole else "there is no checkpoint yet"
        raise CheckpointError(f"{target} could not be written ({reason}); {kept}") from error


def _of_the_disk(error: BaseException | None, folder: Path) -> str | None:
    """Why a file could not be written, None if the error is of another kind."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:  # those of networks have none
            return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
        if type(error).__name__ == "SafetensorError" or any(sign in str(error) for sign in _OF_WRITING):
            full = folder.is_dir() and shutil.disk_usage(folder).free < 2**20
            return "the disk is full" if full else str(error)
        error = error.__cause__
    return None
