"""Paths that nobody can open are one line; nothing is taken for something that is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraplus.errors import InputError
from loraplus.files.paths import is_file, is_folder, is_inside, resolve_model, resolved, user_path
from loraplus.inspection import inspect_folder
from loraplus.reproduce.command import Options, redraw
from loraplus.tasks.adapter import adapter_settings
from loraplus.tasks.evaluation_folder import check_output as evaluation_output
from loraplus.tasks.table import read_table

READERS = {"data": read_table, "adapter": adapter_settings, "model": resolve_model, "inspect": inspect_folder}
NAMES = {
    "nobody's home": "~nosuchuser/x.csv",
    "a long name": "a" * 5000 + ".csv",
    "a long path": "/".join(["abc"] * 2000) + ".csv",
    "a long part": "/tmp/" + "a" * 300 + "/b.csv",
    "bytes": "n\udcff/x.csv",
    "a zero byte": "/tmp/a\0b.csv",
    "below a file": "/dev/null/x.csv",
    "no file": "/dev/zero",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_opened_is_one_line(reader, name):
    with pytest.raises(InputError) as caught:
        READERS[reader](NAMES[name])
    assert len(str(caught.value)) <= 500 and "\x00" not in str(caught.value)


FOLLOWED = {
    "a path": resolved,
    "an evaluation's output": lambda name: evaluation_output(name, overwrite=True),
    "results to draw again": lambda name: redraw(Options(name="toy", output="plots"), name),
}


@pytest.mark.parametrize("what", FOLLOWED)
def test_a_link_that_leads_to_itself_is_one_line(tmp_path, what):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match="leads to no place"):
        FOLLOWED[what](str(loop))


@pytest.fixture
def as_nobody():
    """This test as a user that has no rights; on another account than root it is one already."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def closed(tmp_path):
    """A folder without permission to look into it, with a folder and a file in it."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == Path.home().owner() and str(parent).startswith("/tmp/pytest"):
            parent.chmod(0o755)
    folder = tmp_path / "closed"
    (folder / "below").mkdir(parents=True)
    (folder / "d.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "secret.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "secret.csv").chmod(0o000)
    folder.chmod(0o000)
    yield folder
    folder.chmod(0o755)


def test_a_folder_that_may_not_be_looked_into_says_so(closed, as_nobody):
    for call in (
        lambda: read_table(str(closed / "d.csv")),
        lambda: read_table(str(closed.parent / "secret.csv")),
        lambda: adapter_settings(str(closed)),
        lambda: resolve_model(str(closed / "below")),
        lambda: inspect_folder(str(closed)),
    ):
        with pytest.raises(InputError, match="cannot read .*permission denied"):
            call()


def test_what_is_there_is_found(tmp_path):
    (tmp_path / "f").touch()
    assert is_folder(tmp_path) and not is_file(tmp_path)
    assert is_file(tmp_path / "f") and not is_folder(tmp_path / "f")
    assert not is_file(tmp_path / "g") and user_path("~") == Path.home()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\0b", 5, None])
def test_a_file_that_a_file_names_lies_in_its_folder(name):
    assert not is_inside(name) and is_inside("a/b..c")
