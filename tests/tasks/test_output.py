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
from loraplus.tasks.output import (
    check_output,
    hold_output,
    prepare_output,
    read_json,
    write_atomically,
    write_csv,
    write_json,
)

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


def test_overwrite_removes_only_what_loraplus_writes(used: Path):
    (used / "notes.txt").write_text("mine")
    (used / "checkpoint-10").mkdir()
    (used / "checkpoint-10" / "optimizer.pt").write_text("x")
    prepare(used, {**CONFIG, "seeds": 5}, overwrite=True)
    assert sorted(entry.name for entry in used.iterdir()) == ["config.yaml", "notes.txt"]
    assert yaml.safe_load((used / "config.yaml").read_text())["seeds"] == 5


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
    (used / "checkpoint-1").symlink_to(elsewhere)
    prepare(used, overwrite=True)
    assert (elsewhere / "weights").read_text() == "precious"
    assert not (used / "checkpoint-1").is_symlink()


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
