"""A stand-in for `speed_up`, and small models with their data, as the comparison takes them."""

from __future__ import annotations

import json
import types

import pytest

from loraplus.bench.prepared import prepare
from loraplus.tasks.config import TaskConfig


class StandIn:
    """Does to a model what `does` does, and keeps what it was asked for."""

    LEVERS = ("adapters", "loss")

    def __init__(self):
        self.asked, self.does = [], lambda model: None

    def __call__(self, model, levers=None):
        self.asked.append(levers)
        self.does(model)
        return types.SimpleNamespace(replaced=[], left=[])


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    monkeypatch.setattr("loraplus.speed.LEVERS", StandIn.LEVERS)
    monkeypatch.setattr("loraplus.speed.speed_up", made)
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
