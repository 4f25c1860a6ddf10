"""`loraplus train --resume` after kills, damage and full disks: the same adapter, or one line that says what to do."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraplus.files.checkpoints import checkpoints

ADAPTER = "adapter_model.safetensors"
KINDS = {
    "plain": ["--lr", "5e-2"],
    "auto": ["--lr", "auto"],
    "accumulation": ["--lr", "5e-2", "--gradient-accumulation-steps", 2, "--lr-scheduler-type", "constant"],
}


@pytest.fixture(scope="module")
def few_reviews(tmp_path_factory, reviews_csv) -> Path:
    """So few that a short run makes several passes."""
    path = tmp_path_factory.mktemp("few") / "reviews.csv"
    path.write_text("\n".join(reviews_csv.read_text().splitlines()[:61]) + "\n")
    return path


@pytest.fixture(scope="module")
def flags(model_folder, few_reviews):
    def build(output: Path, kind: str, *more: object) -> list[object]:
        return ["train", "--model", model_folder, "--data", few_reviews, "--output", output, "--max-steps", 12,
                "--batch-size", 8, "--rank", 2, "--eval-steps", 3, *KINDS[kind], *more]  # fmt: skip

    return build


@pytest.fixture(scope="module", params=list(KINDS))
def run(request, tmp_path_factory, flags):
    """(kind, a folder with a checkpoint for every evaluation of a run, its adapter): nobody interrupted it."""
    output = tmp_path_factory.mktemp(request.param) / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraplus.integrations.trainer_checkpoints.rotate", lambda *_: None)
        from loraplus.cli import main

        with pytest.raises(SystemExit) as stop:
            main([str(flag) for flag in flags(output, request.param)])
    assert not stop.value.code
    assert [path.name for path in checkpoints(output)] == [f"checkpoint-{step}" for step in (12, 9, 6, 3)]
    return request.param, output, load_file(output / ADAPTER)


def stopped_after(folder: Path, step: int, place: Path) -> Path:
    """A copy of a run as a kill after a checkpoint would have left it."""
    shutil.copytree(folder, place)
    for path in checkpoints(place):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for name in (
        "metrics.json",
        ADAPTER,
        "adapter_config.json",
        "loraplus.json",
        "loraplus_manifest.json",
        "curves.csv",
    ):
        (place / name).unlink()
    return place


def is_same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_file(folder / ADAPTER)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "step", [0, 3, 9, 12]
)  # before the first checkpoint, in the first pass, the second, at the end
def test_a_run_that_goes_on_ends_in_the_same_adapter_curves_and_loss(run, step, tmp_path, flags, loraplus_command):
    kind, folder, expected = run
    place = stopped_after(folder, step, tmp_path / "r")
    outcome = loraplus_command(*flags(place, kind, "--resume", "--json"))
    assert outcome.code == 0 and is_same(place, expected)
    assert (place / "curves.csv").read_text() == (folder / "curves.csv").read_text()
    before, after = (json.loads((path / "metrics.json").read_text()) for path in (folder, place))
    assert after["steps"] == 12 and after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-6)
    assert after["train_seconds"] > (0.5 * before["train_seconds"] if step == 12 else 0)
    assert after["seconds_per_step"] > 0
    timing = {"train_seconds", "seconds_per_step", "train_loss"}
    assert {key: before[key] for key in before.keys() - timing} == {key: after[key] for key in after.keys() - timing}


def test_the_curves_end_in_the_last_weights_loss_and_not_in_that_of_the_best(run):
    _, folder, _ = run
    history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    (last,) = (entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == 12)
    *_, row = csv.DictReader((folder / "curves.csv").open())
    assert (row["step"], float(row["eval_loss"])) == ("12", last)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", ADAPTER])
@pytest.mark.parametrize("content", [None, b"", b"null", b"{}", b"[1]", b"[" * 100_000])
def test_the_checkpoint_before_a_damaged_one_is_taken(run, name, content, tmp_path, flags, loraplus_command):
    kind, folder, expected = run
    if kind != "plain" and content is not None:
        pytest.skip("one kind of run tells")
    place = stopped_after(folder, 9, tmp_path / "r")
    path = place / "checkpoint-9" / name
    path.unlink() if content is None else path.write_bytes(content)
    outcome = loraplus_command(*flags(place, kind, "--resume", "--plain"))
    assert outcome.code == 0 and is_same(place, expected)
    (line,) = outcome.err.strip().splitlines()
    assert f"checkpoint-9: {name} " in line and line.endswith("checkpoint-6")
    assert "going on at step 6 of 12" in outcome.out


def test_a_folder_that_a_killed_process_was_filling_is_no_checkpoint(run, tmp_path, flags, loraplus_command):
    kind, folder, expected = run
    place = stopped_after(folder, 6, tmp_path / "r")
    (place / "checkpoint-9").mkdir()
    (place / ".checkpoint-9.0123456789abcdef.tmp" / "checkpoint-9").mkdir(parents=True)
    (place / ".metrics.json.77.tmp").touch()
    outcome = loraplus_command(*flags(place, kind, "--resume"))
    assert outcome.code == 0 and is_same(place, expected)
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", [ADAPTER, "adapter_config.json", "tokenizer.json", "loraplus.json", "curves.csv", "metrics.json"]
)
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_finished_run_that_lacks_a_file_says_so_and_writes_it_anew(run, name, how, tmp_path, flags, loraplus_command):
    kind, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    path = place / name
    path.unlink() if how == "removed" else path.write_bytes(b"")
    before = (folder / name).read_bytes()
    outcome = loraplus_command(*flags(place, kind, "--resume"))
    assert outcome.code == 0 and is_same(place, expected)
    if name == "metrics.json":
        assert json.loads(path.read_text())["steps"] == 12
    else:
        assert path.read_bytes() == before
    said = "is damaged" if name == "metrics.json" else f"is {'missing' if how == 'removed' else 'empty'}"
    assert (name == "metrics.json" and how == "removed") or f"{name} {said}; it is written anew from" in outcome.err
    assert loraplus_command(*flags(place, kind, "--resume")).err == ""


def test_a_finished_adapter_that_was_changed_is_refused_and_left_alone(run, tmp_path, flags, refused):
    kind, folder, _ = run
    place = shutil.copytree(folder, tmp_path / "r")
    content = bytearray((place / ADAPTER).read_bytes())
    content[-1] ^= 1
    (place / ADAPTER).write_bytes(content)
    assert f"{ADAPTER} was changed since the run was finished; move it away" in refused(*flags(place, kind, "--resume"))
    assert (place / ADAPTER).read_bytes() == content
    (place / "README.md").write_text("my card")  # a card is there to be written in


def test_a_finished_run_without_adapter_or_checkpoint_says_how_to_train_again(run, tmp_path, flags, refused):
    kind, folder, _ = run
    place = shutil.copytree(folder, tmp_path / "r")
    (place / ADAPTER).unlink()
    for path in checkpoints(place):
        shutil.rmtree(path)
    assert "--overwrite trains again" in refused(*flags(place, kind, "--resume"))


@pytest.mark.parametrize("content", ["null", "[1]", "", "{"])
def test_damaged_facts_of_the_data_are_one_line(run, content, tmp_path, flags, refused):
    kind, folder, _ = run
    place = stopped_after(folder, 6, tmp_path / "r")
    (place / "data_facts.json").write_text(content)
    assert "data_facts.json is damaged; if the data is what" in refused(*flags(place, kind, "--resume"))


def test_a_file_in_a_checkpoints_place_is_found_before_the_run_and_a_folder_keeps_what_is_in_it(
    run, tmp_path, flags, refused, loraplus_command
):
    kind, folder, expected = run
    place = stopped_after(folder, 6, tmp_path / "r")
    mine = place / "checkpoint-9"
    mine.write_text("mine")
    assert "checkpoint-9 is not a folder, and a checkpoint may be written there" in refused(
        *flags(place, kind, "--resume")
    )
    assert mine.read_text() == "mine"
    mine.unlink()
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert loraplus_command(*flags(place, kind, "--resume")).code == 0 and is_same(place, expected)
    assert (mine / "notes.txt").read_text() == "mine"


def test_an_emptied_configuration_says_how_to_start_again(run, tmp_path, flags, refused, loraplus_command):
    kind, folder, expected = run
    place = shutil.copytree(folder, tmp_path / "r")
    (place / "config.yaml").write_text("")
    assert "config.yaml is damaged or gone; --overwrite starts the run again" in refused(
        *flags(place, kind, "--resume")
    )
    assert loraplus_command(*flags(place, kind, "--overwrite")).code == 0 and is_same(place, expected)


def test_a_finished_run_with_a_changed_file_and_a_lost_one_is_left_alone(run, tmp_path, flags, refused):
    kind, folder, _ = run
    place = shutil.copytree(folder, tmp_path / "r")
    (place / "adapter_config.json").write_text((place / "adapter_config.json").read_text().replace("{", "{ ", 1))
    (place / "tokenizer.json").unlink()
    assert "adapter_config.json was changed since the run was finished" in refused(*flags(place, kind, "--resume"))
    assert not (place / "tokenizer.json").exists()


def test_a_disk_that_is_full_at_the_end_loses_nothing(run, tmp_path, flags, refused, loraplus_command):
    kind, folder, expected = run
    place = stopped_after(folder, 9, tmp_path / "r")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraplus.integrations.trainer_checkpoints.move_into", full)
        outcome = loraplus_command(*flags(place, kind, "--resume", "--json"))
    assert (
        outcome.code == 2
        and outcome.last_line.startswith("loraplus: ")
        and "No space left on device" in outcome.last_line
    )
    assert not (place / ADAPTER).exists() and not [path for path in place.iterdir() if path.suffix == ".tmp"]
    assert loraplus_command(*flags(place, kind, "--resume")).code == 0 and is_same(place, expected)
