"""A folder is replaced in one step: wherever it is killed, the old or the new one is there, and the user's files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus.errors import InputError
from loraplus.files import replacing
from loraplus.files.replacing import put_back, replace_folder
from loraplus.files.scratch import folder_beside, scratch_folder
from loraplus.files.single import write_atomically

FILE_OPERATIONS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.utime",
)


def killed_at(number: int, below: Path, action: Callable[[], None]) -> bool:
    """Carries out an action in a process of its own that ends, as by SIGKILL, at its file operation `number`."""
    child = os.fork()
    if child == 0:
        left = number

        def watch(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in FILE_OPERATIONS and any(str(below) in os.fsdecode(a) for a in arguments
                                                if isinstance(a, (str, bytes, os.PathLike))):  # fmt: skip
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def replaced(target: Path) -> None:
    put_back(target)
    with folder_beside(target) as new:
        (new / "weights").write_text("new")
        (new / "record").write_text("new")
        replace_folder(new, target, {"weights", "record", "part"})


def old(target: Path) -> None:
    (target / "notes" / "deep").mkdir(parents=True)
    (target / "notes" / "deep" / "mine.txt").write_text("mine")
    (target / "notes" / "link").symlink_to("deep")
    for name in ("weights", "record", "part"):
        (target / name).write_text("old")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


MINE = {"notes/deep/mine.txt": "mine"}
OLD = MINE | {"weights": "old", "record": "old", "part": "old"}
NEW = MINE | {"weights": "new", "record": "new"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_file_operation_loses_nothing_and_the_next_run_clears_up(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    kills = 0
    while True:
        place = tmp_path / str(kills)
        target = place / "m"
        old(target)
        was_killed = killed_at(kills, place, lambda at=target: replaced(at))
        if exchange:
            assert contents(target) in (OLD, NEW)
        put_back(target)
        assert contents(target) in (OLD, NEW)
        assert os.readlink(target / "notes" / "link") == "deep"
        assert [path.name for path in place.iterdir()] == ["m"], "nothing is left"
        replaced(target)
        assert contents(target) == NEW and [path.name for path in place.iterdir()] == ["m"]
        if not was_killed:
            break
        kills += 1
    assert kills >= 10


def test_what_a_living_process_holds_stays_and_what_a_dead_one_left_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as mine:
        ready, child = os.pipe(), os.fork()
        if child == 0:
            with scratch_folder():
                os.write(ready[1], b"x")
                os._exit(9)  # no clearing up
        os.read(ready[0], 1)
        os.waitpid(child, 0)
        (tmp_path / "loraplus-study-abc").mkdir()  # no name of ours
        with scratch_folder() as other:
            assert {path.name for path in tmp_path.iterdir()} == {
                Path(mine).name, Path(other).name, "loraplus-study-abc"}  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["loraplus-study-abc"]


def test_a_file_cut_off_by_a_kill_goes_with_the_next_write_of_its_folder(tmp_path):
    from loraplus.files.output import hold_output
    from loraplus.files.single import check_file

    for number in range(3):
        killed_at(number, tmp_path, lambda: write_atomically(tmp_path / "p.csv", "x"))
    (tmp_path / ".mine.tmp").touch()
    check_file(str(tmp_path / "p.csv"), [".csv"], overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"p.csv", ".mine.tmp"}
    killed_at(1, tmp_path, lambda: write_atomically(tmp_path / "q.csv", "x"))
    with hold_output(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} <= {"p.csv", ".mine.tmp"}


def test_a_name_that_is_in_both_is_refused(tmp_path):
    old(tmp_path / "m")
    with folder_beside(tmp_path / "m") as new:
        (new / "notes").touch()
        with pytest.raises(InputError, match="notes is of no earlier merge"):
            replace_folder(new, tmp_path / "m", set())
    assert contents(tmp_path / "m") == OLD
