"""The output folder: nothing of the user's is lost, and files are whole or absent."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest
import yaml

from loraplus.compare import fingerprint
from loraplus.errors import InputError
from loraplus.files.output import check_output, hold_output, prepare_output
from loraplus.files.single import read_json, write_atomically, write_csv, write_json

CONFIG = {"model": "m", "data": "d.csv", "output": "o", "lr_ratio": 16.0, "seeds": 3, "workers": None}


def prepare(folder: Path, config: dict | None = None, *, overwrite: bool = False, resume: bool = False) -> Path:
    return prepare_output(folder, config or CONFIG, overwrite=overwrite, resume=resume)


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """The output folder of an earlier run."""
    folder = prepare(tmp_path / "run")
    (folder / "summary.json").write_text("{}")
    return folder


def test_a_new_folder_is_created_with_the_configuration(tmp_path: Path):
    folder = prepare(tmp_path / "a" / "b")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty") == tmp_path / "empty"


def test_a_used_folder_needs_a_flag(used: Path):
    with pytest.raises(InputError, match="--resume goes on .* --overwrite replaces"):
        prepare(used)
    with pytest.raises(InputError, match="exclude each other"):
        prepare(used, overwrite=True, resume=True)


def test_checking_touches_nothing(used: Path, tmp_path: Path):
    check_output(used, CONFIG, overwrite=True, resume=False)
    check_output(tmp_path / "new", CONFIG, overwrite=False, resume=False)
    assert (used / "summary.json").exists()
    assert not (tmp_path / "new").exists()


STUDY = {"model": "m", "data": "d.csv", "output": "o", "tuning_runs": 4}
EXPERIMENT = {"experiment": "toy", "scale": "cpu", "seeds": 3}
FILES_OF_THE_USER = {
    "train": [
        "notes.txt", "checkpoint-notes/a", "checkpoint-list.txt", "plots/a.png", "summary.json", "runs.csv",
        "checkpoint-7/my-results.txt", "checkpoint-5x/optimizer.pt", "best.yaml", "README.md", "report.html",
        "checkpoint-2024/config.json",
    ],
    "study": ["metrics.json", "README.md", "checkpoint-10/optimizer.pt", "plots/a.png", "vocab.txt"],
    "reproduce": ["README.md", "plots/notes.md", "best.yaml", "checkpoint-10/optimizer.pt", "report.html"],
}  # fmt: skip
FILES_OF_THE_RUN = {
    "train": [
        "metrics.json", "adapter_model.safetensors", "checkpoint-10/optimizer.pt",
        "checkpoint-20/rng_state.pth", "loraplus_manifest.json", "checkpoint-30/loraplus_manifest.json",
    ],
    "study": ["study.journal", "summary.json", "runs.csv", "report.html", "best.yaml"],
    "reproduce": ["study.journal", "summary.json", "index.html", "plots/deltas.png"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), [("train", CONFIG), ("study", STUDY), ("reproduce", EXPERIMENT)])
def test_overwrite_removes_what_the_command_wrote_and_nothing_else(tmp_path: Path, kind: str, config: dict):
    folder = prepare(tmp_path / "run", config)
    for name in FILES_OF_THE_USER[kind] + FILES_OF_THE_RUN[kind]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "checkpoint-40").mkdir()
    prepare(folder, {**config, "seeds": 5}, overwrite=True)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert left == sorted(["config.yaml", *FILES_OF_THE_USER[kind]])
    assert (folder / "checkpoint-40").exists() == (kind != "train")
    assert yaml.safe_load((folder / "config.yaml").read_text())["seeds"] == 5


def test_what_a_killed_command_was_writing_is_removed_by_the_next(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.yaml.77.tmp").touch()
    (folder / ".checkpoint-3.0123456789abcdef.tmp" / "checkpoint-3").mkdir(parents=True)
    (folder / ".hidden.tmp").write_text("mine")
    (folder / ".draft.1.tmp").write_text("mine")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError):
            prepare(folder, **flags)  # a file of the user's
    (folder / ".hidden.tmp").unlink()
    (folder / ".draft.1.tmp").unlink()
    with hold_output(folder):
        prepare(folder)
    assert [entry.name for entry in folder.iterdir()] == ["config.yaml"]
    (folder / "plots").mkdir()
    (folder / "plots" / ".curves.png.0123456789abcdef.tmp").touch()
    with hold_output(folder):
        assert not list((folder / "plots").iterdir())


@pytest.mark.parametrize("config", [None, "theme: dark\n", "- a\n", "a: [\n", b"\xff\xfe\x00"])
def test_overwrite_leaves_a_folder_that_is_not_ours_alone(tmp_path: Path, config: str | bytes | None):
    (tmp_path / "README.md").write_text("mine")
    if config is not None:
        content = config if isinstance(config, bytes) else config.encode()
        (tmp_path / "config.yaml").write_bytes(content)
    for overwrite in (True, False):
        with pytest.raises(InputError, match=r"holds .*config\.yaml of a loraplus run"):
            prepare(tmp_path, overwrite=overwrite, resume=not overwrite)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_overwrite_does_not_follow_links(used: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("precious")
    (elsewhere / "optimizer.pt").write_text("precious")
    (used / "checkpoint-1").symlink_to(elsewhere)
    (used / "metrics.json").symlink_to(elsewhere / "weights")
    prepare(used, overwrite=True)
    assert (elsewhere / "weights").read_text() == (elsewhere / "optimizer.pt").read_text() == "precious"
    assert [entry.name for entry in used.iterdir() if entry.is_symlink()] == []


def test_resume_wants_the_same_configuration_and_names_what_differs(used: Path):
    with pytest.raises(InputError, match="seeds was 3, now 5; rank was not a setting, now 4"):
        prepare(used, {**CONFIG, "seeds": 5, "rank": 4}, resume=True)
    before = (used / "config.yaml").read_text()
    prepare(used, {**CONFIG, "workers": 2, "output": "./o"}, resume=True)
    assert (used / "config.yaml").read_text() == before


def test_resume_takes_settings_that_came_later_at_what_they_were(used: Path):
    prepare(used, {**CONFIG, "task": "classification", "packing": None}, resume=True)
    with pytest.raises(InputError, match="task was classification, now sft"):
        prepare(used, {**CONFIG, "task": "sft"}, resume=True)


def test_a_comparison_is_known_by_what_earlier_versions_knew_it_by():
    assert fingerprint({**CONFIG, "task": "classification", "packing": None}) == fingerprint(CONFIG)
    assert fingerprint({**CONFIG, "task": "sft"}) != fingerprint(CONFIG)


def test_resume_with_nothing_there_just_starts(tmp_path: Path):
    assert (prepare(tmp_path / "new", resume=True) / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file is not a folder"):
            prepare(path)
    with pytest.raises(InputError, match="cannot write to /proc/"):
        prepare(Path("/proc/loraplus"))
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "a.txt", "")


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path):
    folder = tmp_path / "run"
    with hold_output(folder), pytest.raises(InputError, match="another loraplus command"), hold_output(folder):
        pass
    with hold_output(folder):
        pass


def test_files_are_replaced_whole_and_leave_no_traces(tmp_path: Path):
    path = write_atomically(tmp_path / "a.txt", "old")
    write_atomically(path, "nëw\r\n")
    assert path.read_bytes() == "nëw\r\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_is_readable_by_strict_parsers(tmp_path: Path):
    path = write_json(tmp_path / "a.json", {"loss": math.inf, "list": [math.nan, 1.5, (2,)], "word": "λ"})
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert content == {"loss": None, "list": [None, 1.5, [2]], "word": "λ"}
    assert read_json(path) == content


def test_csv_has_the_columns_of_all_rows(tmp_path: Path):
    path = write_csv(tmp_path / "a.csv", [{"a": 1}, {"a": "x,y", "b": 2}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "x,y", "b": "2"}]
