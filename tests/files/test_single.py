"""Files are written whole, under names that nobody can guess, with the permissions of the umask."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from loraplus.errors import InputError
from loraplus.files import single, whole
from loraplus.files.output import check_output
from loraplus.files.single import check_file, read_json, write_atomically, write_json
from loraplus.files.whole import TEMPORARY, follow_umask

CONFIG = {"model": "m", "data": "d", "output": "o", "lr_ratio": 16.0}


@pytest.fixture
def umask():
    earlier = os.umask(0o027)
    yield 0o640
    os.umask(earlier)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask):
    written = write_atomically(tmp_path / "a.csv", "a")
    (tmp_path / "private").touch(mode=0o600)
    follow_umask(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {umask}
    assert written.read_text() == "a"


def test_temporary_names_cannot_be_guessed_and_a_link_there_is_not_followed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda old, new: seen.append(Path(old).name))
    for _ in range(3):
        write_atomically(tmp_path / "p.csv", "x")
    assert len(set(seen)) == 3 and all(map(TEMPORARY.fullmatch, seen))
    (tmp_path / "target").write_text("precious")
    monkeypatch.setattr(whole.secrets, "token_hex", lambda size: "0" * 16)
    (tmp_path / ".q.csv.0000000000000000.tmp").symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "q.csv", "x")
    assert (tmp_path / "target").read_text() == "precious"


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("call", "fails", "says"), [("fsync", full, "No space left"), ("open", read_only, "Read-only")]
)
def test_an_output_that_takes_nothing_is_found_before_the_work_and_nothing_stays(
    tmp_path, monkeypatch, call, fails, says
):
    monkeypatch.setattr(os, call, fails)
    for check in (
        lambda: check_file(str(tmp_path / "p.csv"), (".csv",), overwrite=False),
        lambda: check_output(tmp_path / "new", CONFIG, overwrite=False, resume=False),
    ):
        with pytest.raises(InputError, match=f"cannot write to .*{says}"):
            check()
    assert not any(tmp_path.iterdir())


def test_an_output_that_cannot_be_there_is_one_line(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in (tmp_path / "link", tmp_path / "link" / "below", Path("/proc/x"), tmp_path / ("a" * 300)):
        with pytest.raises(InputError, match="cannot write to"):
            check_output(name, CONFIG, overwrite=False, resume=False)
    for name in ("/proc/x.csv", str(tmp_path / "no" / "p.csv"), str(tmp_path / ("a" * 300 + ".csv"))):
        with pytest.raises(InputError):
            check_file(name, (".csv",), overwrite=False)


@pytest.mark.parametrize("name", ["n\udcffx", "a\0b"])
@pytest.mark.parametrize("key", ["output", "data", "model"])
def test_a_name_that_is_no_text_ends_a_run_before_it_begins(tmp_path, monkeypatch, key, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--{key}: .* is not UTF-8 text"):
        check_output("o", {**CONFIG, key: name}, overwrite=False, resume=False)
    assert not any(tmp_path.iterdir())


def test_text_that_is_none_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no Unicode text"):
        write_json(tmp_path / "a.json", {"a": "\ud800"})
    assert not any(tmp_path.iterdir())


def test_a_temporary_file_of_a_killed_command_does_not_lock_a_folder(tmp_path):
    (tmp_path / ".config.yaml.0123456789abcdef.tmp").touch()
    check_output(tmp_path, CONFIG, overwrite=False, resume=False)


def test_a_json_file_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(single, "_LARGEST_JSON", 100)
    (tmp_path / "a.json").write_text('"' + "a" * 200 + '"')
    with pytest.raises(InputError, match="too large"):
        read_json(tmp_path / "a.json")
