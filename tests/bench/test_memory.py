from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from loraplus.bench.arms import arms_of
from loraplus.bench.memory import measured


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
def test_the_peak_holds_at_least_the_logits_and_not_the_model(folder_of, reviews_csv):
    from conftest import tiny_config
    from transformers import BertForSequenceClassification

    from loraplus.tasks.config import TaskConfig

    wide = tiny_config(vocab_size=64, hidden_size=256, intermediate_size=4096, num_attention_heads=4)
    folder = folder_of(BertForSequenceClassification(wide))
    config = TaskConfig(model=str(folder), data=str(reviews_csv), batch_size=64, rank=2, target_modules="all-linear")
    best = arms_of("classification")[1]
    failing = replace(best, name="no such stack's", stack="loraplus", levers=("nothing of this name",))
    found = measured(config, 2, [best, failing], seconds=120)
    # Two layers keep 64·13 tokens of 4,096 numbers before and after the activation function: 13 MiB each.
    assert isinstance(found[best.name], float) and 40 < found[best.name] < 400
    assert str(found[failing.name]).startswith("not measured: ")


def test_what_is_not_measured_in_time_says_so(model_folder, reviews_csv):
    from loraplus.tasks.config import TaskConfig

    config = TaskConfig(model=str(model_folder), data=str(reviews_csv))
    best = arms_of("classification")[1]
    assert measured(config, 1, [best], seconds=0.5) == {best.name: "not measured: no time was left"}
