"""What `speed_up` was asked for, and small models with their data, as the comparison takes them."""

from __future__ import annotations

import json

import pytest

from loraplus.bench.prepared import prepare
from loraplus.speed import speed_up
from loraplus.tasks.config import TaskConfig


class Asked:
    """`speed_up` itself, which notes what it was asked for and then does to the model what `does` does."""

    def __init__(self):
        self.levers, self.does = [], lambda model: None

    def __call__(self, model, *, levers):
        self.levers.append(levers)
        report = speed_up(model, levers=levers)
        self.does(model)
        return report


@pytest.fixture
def asked(monkeypatch):
    made = Asked()
    monkeypatch.setattr("loraplus.bench.arms.speed_up", made)
    return made


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Texts of 4 to 27 words."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{'grass is green ' * (1 + i % 8)}{i}"}) + "\n" for i in range(90)))
    return path


@pytest.fixture(scope="session")
def classifier(model_folder, reviews_csv):
    config = TaskConfig(model=str(model_folder), data=str(reviews_csv), batch_size=16, rank=2, max_length=32)
    return prepare(config, batches=3)


@pytest.fixture(scope="session")
def decoder(decoder_folder, texts):
    config = TaskConfig(
        task="lm", model=str(decoder_folder), data=str(texts), batch_size=8, rank=2, target_modules="all-linear"
    )
    return prepare(config, batches=2)
