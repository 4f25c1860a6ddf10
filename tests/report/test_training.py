"""The page of a training run: offline, escaped, made from the files of a folder alone."""

from __future__ import annotations

import re

import pytest

from loraplus.errors import InputError
from loraplus.files.single import write_csv, write_json, write_yaml
from loraplus.report.training import write_report

EVIL = "</script><script>alert(1)</script><img src=x>"
METRICS = {
    "eval_loss": 1.25, "eval_perplexity": 3.49, "steps": 20, "best_step": 15, "lr": 1e-3, "lr_ratio": 16.0,
    "auto": False, "batch_size": 8, "packing": True, "seconds_per_step": 0.1,
    "data": {
        "source": EVIL, "format": "conversation", "loss_on": "all", "train_examples": 9, "validation_examples": 1,
        "duplicates_removed": 0, "train_tokens": 99, "train_target_tokens": 90, "validation_target_tokens": 10,
        "max_length": 64, "longer_than_context": 2, "long_examples": "cut", "tokens_cut": 7, "examples_dropped": 0,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_yaml(tmp_path / "config.yaml", {"task": "sft", "model": EVIL, "data": "d", "output": "o", "lr_ratio": 16.0})
    write_json(tmp_path / "metrics.json", METRICS)
    write_csv(tmp_path / "curves.csv", [{"step": 1, "train_loss": 2.0}, {"step": 2, "eval_loss": 1.25}])
    sample = {"source": "d, line 1", "prompt": EVIL, "reference": EVIL, "base": EVIL, "adapted": EVIL}
    write_json(tmp_path / "samples.json", [sample])
    return tmp_path


def test_the_page_is_offline_and_escapes_what_models_say(folder):
    page = write_report(folder).read_text()
    assert len(page) < 100_000 and "<h1>Perplexity 3.49 after 15 steps</h1>" in page
    assert "<script>alert" not in page and "<img" not in page and page.count("&lt;script&gt;alert(1)") >= 6
    assert not re.search(r"(src|href)\s*=\s*[\"']", page)
    assert "1.2500 a token, perplexity 3.490" in page and "2 longer examples (cut): 7 tokens cut" in page


def test_a_folder_without_a_language_model_is_refused(folder):
    write_json(folder / "metrics.json", {"eval_accuracy": 0.9})
    with pytest.raises(InputError, match="holds no run with --task sft or lm"):
        write_report(folder)
