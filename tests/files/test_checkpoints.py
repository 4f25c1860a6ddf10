"""Checkpoints of LoraPlusTrainer and of attached trainers: whole or absent, and looked at before they are used."""

from __future__ import annotations

import errno
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from integrations.test_transformers import Tokens, adapted, common
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import loraplus
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.errors import CheckpointError, DamagedCheckpointError, LoraPlusWarning
from loraplus.files.checkpoints import checkpoint_fault, checkpoints, newest_whole
from loraplus.files.whole import TEMPORARY

FINAL = "adapter_model.safetensors"


def with_arguments(folder, **more):
    args = LoraPlusTrainingArguments(**options(folder, **more), loraplus_lr_ratio=4.0)
    return LoraPlusTrainer(adapted(), args, train_dataset=Tokens(), eval_dataset=Tokens())


def attached(folder, **more):
    args = TrainingArguments(**options(folder, **more))
    return loraplus.attach(Trainer(adapted(), args, train_dataset=Tokens(), eval_dataset=Tokens()), lr_ratio=4.0)


def automatic(folder, **more):
    args = TrainingArguments(**options(folder, **more))
    return loraplus.attach(Trainer(adapted(), args, train_dataset=Tokens(), eval_dataset=Tokens()), lr="auto")


def options(folder, **more):
    return {**common(folder, max_steps=6, warmup_steps=0, logging_steps=2), "save_strategy": "steps", "save_steps": 2,
            "eval_strategy": "steps", "eval_steps": 2, **more}  # fmt: skip


@pytest.fixture(scope="module", params=[with_arguments, attached, automatic])
def run(request, tmp_path_factory):
    """(what makes the trainer, the folder of its run, the final adapter)."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    trainer = request.param(folder)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return request.param, folder, load_file(folder / "final" / FINAL)


def ends_as(trainer, expected, resume):
    trainer.train(resume_from_checkpoint=resume)
    folder = Path(trainer.args.output_dir) / "final"
    trainer.save_model(str(folder))
    found = load_file(folder / FINAL)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_every_checkpoint_is_sealed_and_nothing_else_is_left(run):
    _, folder, _ = run
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert all(checkpoint_fault(path) is None for path in checkpoints(folder))
    assert not [path for path in folder.rglob("*") if TEMPORARY.fullmatch(path.name)]
    modes = {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1  # the umask's, for weights, too


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {"flipped": bytes(content), "cut": bytes(content[:-3]), "emptied": b"", "zeroed": bytes(len(content))}[how]
    )


@pytest.mark.parametrize("how", ["removed", "emptied", "cut", "flipped", "zeroed"])
def test_a_damaged_checkpoint_is_passed_over_whatever_file_it_is(run, how, tmp_path):
    make, folder, expected = run
    files = sorted(path.name for path in (folder / "checkpoint-4").iterdir() if path.name != "README.md")
    assert len(files) >= 8
    for name in files if make is with_arguments else files[how == "cut" :: 4]:
        place = shutil.copytree(folder, tmp_path / name)
        shutil.rmtree(place / "checkpoint-6")
        damaged(place / "checkpoint-4" / name, how)
        trainer = make(place)
        with pytest.warns(LoraPlusWarning, match=r"passed over: .*checkpoint-4: .*; going on from .*checkpoint-2"):
            assert ends_as(trainer, expected, resume=True), name
        assert trainer.state.global_step == 6 and newest_whole(place)[0] == place / "checkpoint-6"


@pytest.mark.parametrize("what", ["empty", "half", "without a state", "another's"])
def test_what_was_never_a_whole_checkpoint_is_passed_over(run, what, tmp_path):
    make, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    shutil.rmtree(place / "checkpoint-6")
    new = place / "checkpoint-5"
    if what in ("empty", "another's"):
        new.mkdir()
        if what == "another's":
            (new / "config.json").write_text("{}")
    else:  # as an earlier version left them
        shutil.copytree(place / "checkpoint-4", new)
        for name in ("loraplus_manifest.json", "loraplus.json", "trainer_state.json", "rng_state.pth"):
            (new / name).unlink()
        if what == "half":
            (new / "optimizer.pt").unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert ends_as(make(place), expected, resume=True)
    told = [str(warning.message) for warning in said if issubclass(warning.category, LoraPlusWarning)]
    assert len(told) == (what != "another's") and all("cut short" in line for line in told)


def test_a_checkpoint_given_by_name_is_refused_with_the_one_to_take_instead(run, tmp_path):
    make, folder, _ = run
    place = shutil.copytree(folder, tmp_path / "r")
    damaged(place / "checkpoint-4" / "optimizer.pt", "flipped")
    trainer = make(place)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 cannot be used: optimizer.pt was changed; resume from .*-6"
    ):
        trainer.train(resume_from_checkpoint=str(place / "checkpoint-4"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_where_every_checkpoint_is_damaged_none_is_replaced_unasked(run, tmp_path):
    make, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    for path in checkpoints(place):
        damaged(path / FINAL, "flipped")
    with pytest.raises(
        DamagedCheckpointError, match=r"no checkpoint can be used: .*train without resume_from_checkpoint"
    ):
        make(place).train(resume_from_checkpoint=True)
    assert ends_as(make(place), expected, resume=None)
    assert all(checkpoint_fault(path) is None for path in checkpoints(place))


class Full(TrainerCallback):
    """A disk that is full from a step on, for whoever writes."""

    def __init__(self, monkeypatch, step, write):
        self.patch, self.step, self.write = monkeypatch, step, write

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.write(self.patch)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_is_full(*_, **__):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 0")


def safetensors_is_full(*_, **__):
    raise type("SafetensorError", (Exception,), {})("IoError: No space left on device (os error 28)")


WRITERS = {
    "torch": lambda patch: patch.setattr(torch, "save", torch_is_full),
    "optimizer": lambda patch: patch.setattr(torch, "save", no_space),
    "weights": lambda patch: patch.setattr("peft.peft_model.safe_save_file", safetensors_is_full),
    "state": lambda patch: patch.setattr("transformers.TrainerState.save_to_json", no_space),
    "manifest": lambda patch: patch.setattr("loraplus.files.manifest.write_whole", no_space),
    "rename": lambda patch: patch.setattr("pathlib.Path.rename", no_space),
}


@pytest.mark.parametrize("writer", list(WRITERS))
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint_whole(run, writer, tmp_path):
    make, _, expected = run
    with pytest.MonkeyPatch.context() as patch:
        trainer = make(tmp_path)
        trainer.add_callback(Full(patch, 4, WRITERS[writer]))
        with pytest.raises(
            CheckpointError, match=r"checkpoint-4 could not be written \(.*\); .*checkpoint-2 is whole: "
        ) as told:
            trainer.train()
    assert len(str(told.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert ends_as(make(tmp_path), expected, resume=True)


def test_a_run_that_ends_while_it_writes_leaves_no_checkpoint_and_the_next_run_clears_up(run, tmp_path):
    make, _, expected = run

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    def dies(patch):
        patch.setattr(torch, "save", killed)
        patch.setattr("loraplus.integrations.trainer_checkpoints.shutil.rmtree", lambda *_, **__: None)

    with pytest.MonkeyPatch.context() as patch:
        trainer = make(tmp_path)
        trainer.add_callback(Full(patch, 4, dies))
        with pytest.raises(Killed):
            trainer.train()
    left = [path.name for path in tmp_path.iterdir() if TEMPORARY.fullmatch(path.name)]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"] and len(left) == 1
    assert ends_as(make(tmp_path), expected, resume=True)
    assert not (tmp_path / left[0]).exists()


def test_a_run_resumed_at_its_end_makes_no_further_step(run, tmp_path):
    make, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    trainer = make(place)
    assert ends_as(trainer, expected, resume=True)
    assert trainer.state.global_step == 6


def test_the_best_checkpoint_is_found_where_the_folder_is_now(run, tmp_path):
    make, _, _ = run
    trainer = make(
        tmp_path / "here", load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True
    )
    trainer.train()
    assert trainer.state.best_global_step == 2  # of the losses the highest, so the first
    shutil.rmtree(tmp_path / "here" / "checkpoint-6")
    (tmp_path / "here").rename(tmp_path / "there")
    again = make(
        tmp_path / "there", load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-2")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_a_best_checkpoint_that_is_damaged_is_named_and_not_loaded(run, tmp_path):
    make, _, _ = run
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make(tmp_path, **best)
    trainer.train()
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    damaged(tmp_path / "checkpoint-2" / "optimizer.pt", "flipped")  # of it only the weights are used
    trainer = make(tmp_path, **best)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    damaged(tmp_path / "checkpoint-2" / FINAL, "flipped")
    with pytest.raises(
        DamagedCheckpointError, match=r"checkpoint-2, the best checkpoint of a finished training, cannot be"
    ):
        make(tmp_path, **best).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    trainer = make(tmp_path, **best)
    with pytest.warns(
        LoraPlusWarning, match=r"checkpoint-2, the best checkpoint so far, cannot be used: .* was changed"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


def test_only_checkpoints_are_rotated(run, tmp_path):
    make, _, _ = run
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "mine.txt").write_text("mine")
    make(tmp_path, save_total_limit=1).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-6", "checkpoint-notes"]


def test_what_the_user_has_in_a_checkpoints_place_stays(run, tmp_path):
    make, _, _ = run
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "mine.txt").write_text("mine")
    (tmp_path / "checkpoint-4").write_text("mine")
    with pytest.raises(CheckpointError, match="checkpoint-4 is not a folder, and a checkpoint may be written there"):
        make(tmp_path).train()
    assert (tmp_path / "checkpoint-4").read_text() == "mine"
    (tmp_path / "checkpoint-4").unlink()
    make(tmp_path).train()
    assert checkpoint_fault(tmp_path / "checkpoint-2") is None
    assert (tmp_path / "checkpoint-2" / "mine.txt").read_text() == "mine"


def test_a_subclass_may_add_files_leave_checkpoints_out_and_name_its_own_folder(tmp_path):
    class Own(LoraPlusTrainer):
        def _get_output_dir(self, trial):
            return str(tmp_path / "own")

        def _save_checkpoint(self, model, trial):
            if self.state.global_step == 2:
                return
            place = tmp_path / "own" / f"checkpoint-{self.state.global_step}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "head.bin").write_bytes(b"mine")
            super()._save_checkpoint(model, trial)

    args = LoraPlusTrainingArguments(**options(tmp_path / "out"), loraplus_lr_ratio=4.0)
    trainer = Own(adapted(), args, train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "own")] == ["checkpoint-6", "checkpoint-4"]
    for checkpoint in checkpoints(tmp_path / "own"):
        assert checkpoint_fault(checkpoint) is None and (checkpoint / "head.bin").read_bytes() == b"mine"
    again = Own(adapted(), args, train_dataset=Tokens(), eval_dataset=Tokens())
    again.train(resume_from_checkpoint=True)
    assert again._resumed_from == tmp_path / "own" / "checkpoint-6"


def test_a_checkpoint_that_trainer_has_begun_is_written_in_its_place(run, tmp_path):
    """As Trainer does with enable_jit_checkpoint, when it is told to end."""
    make, _, _ = run
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "checkpoint-is-incomplete.txt").touch()
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    assert checkpoint_fault(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-2" / "checkpoint-is-incomplete.txt").exists()


def test_a_card_that_was_edited_damages_nothing_nor_does_saving_into_a_checkpoint(run, tmp_path):
    make, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    (place / "checkpoint-6" / "README.md").write_text("my card")
    assert checkpoint_fault(place / "checkpoint-6") is None
    trainer = make(place)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(place / "checkpoint-6"))
    assert checkpoint_fault(place / "checkpoint-6") is None
    assert ends_as(make(place), expected, resume=True)


def as_an_earlier_version_left_it(checkpoint):
    (checkpoint / "loraplus_manifest.json").unlink()
    record = (checkpoint / "loraplus.json").read_text()
    (checkpoint / "loraplus.json").write_text(record.replace('"sealed": true', '"earlier": true'))


def test_checkpoints_of_an_earlier_version_that_are_damaged_are_not_replaced_unasked(run, tmp_path):
    make, folder, _ = run
    place = shutil.copytree(folder, tmp_path / "r")
    for checkpoint in checkpoints(place):
        (checkpoint / "loraplus_manifest.json").unlink()
        (checkpoint / "loraplus.json").write_text("{}")
        damaged(checkpoint / "optimizer.pt", "flipped")
    with pytest.raises(DamagedCheckpointError, match="no checkpoint can be used: .*optimizer.pt is damaged"):
        make(place, save_total_limit=1).train(resume_from_checkpoint=True)
    assert len(checkpoints(place)) == 3


def test_a_checkpoint_of_an_earlier_version_can_still_be_used(run, tmp_path):
    make, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    shutil.rmtree(place / "checkpoint-6")
    checkpoint = place / "checkpoint-4"
    as_an_earlier_version_left_it(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraPlusWarning)
        assert ends_as(make(place), expected, resume=True)
    damaged(checkpoint / "optimizer.pt", "flipped")
    assert checkpoint_fault(checkpoint) == "optimizer.pt is damaged"


@pytest.mark.parametrize(
    ("name", "change"),
    [(FINAL, lambda content: content.replace(b"lora_B", b"lora_C")),
     ("trainer_state.json", lambda content: content.replace(b"log_history", b"log_hastory")),
     ("trainer_state.json", lambda content: content.replace(b"TrainerControl", b"TrainerContral"))],
)  # fmt: skip
def test_damage_that_only_shows_when_a_file_is_used_is_one_line(run, name, change, tmp_path):
    make, folder, _ = run
    place = shutil.copytree(folder, tmp_path / "r")
    for checkpoint in checkpoints(place):
        as_an_earlier_version_left_it(checkpoint)
        content = (checkpoint / name).read_bytes()
        assert change(content) != content
        (checkpoint / name).write_bytes(change(content))
    with pytest.raises(DamagedCheckpointError, match="checkpoint-6"):
        make(place).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_an_optimizer_says_that_it_starts_anew(tmp_path):
    with_arguments(tmp_path, save_only_model=True, max_steps=4).train()
    with pytest.warns(LoraPlusWarning, match="checkpoint-4 holds no state of the optimizer"):
        with_arguments(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)
