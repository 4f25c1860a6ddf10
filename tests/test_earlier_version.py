"""What the version of November 2026 wrote, before checkpoints had manifests and outcomes digests, opens after it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from loraplus.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "faults"))

from small import encoder, texts

EARLIER = Path(__file__).resolve().parent / "earlier_version"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """Copies one of the folders to where its model and data are."""
    monkeypatch.chdir(tmp_path)
    encoder(Path("encoder"))
    texts(Path("texts.csv"))

    def copy(kind: str) -> Path:
        return shutil.copytree(EARLIER / kind, tmp_path / kind)

    return copy


def resumed(kind: str, folder: Path) -> None:
    """The command that began a folder, with --resume."""
    config = {
        key: value for key, value in yaml.safe_load((folder / "config.yaml").read_text()).items() if value is not None
    }
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main([kind, "--config", str(folder.parent / "config.yaml"), "--output", folder.name, "--resume", "--plain"])
    assert not stop.value.code


@pytest.mark.parametrize(("kind", "step"), [("train", 6), ("auto", 3)])
def test_a_checkpoint_is_gone_on_from(earlier, kind, step, capsys):
    folder = earlier(kind)
    resumed("train", folder)
    assert f"going on at step {step} of 12" in capsys.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 12
    assert (folder / "checkpoint-12" / "loraplus_manifest.json").is_file()


def test_a_study_is_summarised_from_its_runs_without_training(earlier, capsys):
    folder = earlier("compare")
    before = json.loads((folder / "summary.json").read_text())
    journal = (folder / "study.journal").read_bytes()
    (folder / "summary.json").unlink()
    resumed("compare", folder)
    after = json.loads((folder / "summary.json").read_text())
    assert after["verdict"] == before["verdict"] and after["arms"] == before["arms"]
    assert "16 runs planned, 16 of them already done" in capsys.readouterr().out
    assert (folder / "study.journal").read_bytes().startswith(journal)


def test_a_search_is_told_from_its_runs_without_training(earlier):
    folder = earlier("tune")
    before = json.loads((folder / "tune.json").read_text())
    (folder / "tune.json").unlink()
    resumed("tune", folder)
    assert json.loads((folder / "tune.json").read_text())["best"] == before["best"]
