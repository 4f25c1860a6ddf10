"""Whether anything was learnt: the permutation test, and what the verdict of a comparison makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from loraplus.study.learning import learning, nothing_learnt, nothing_sentence, some_seeds_sentence
from loraplus.study.records import Record, Trial
from loraplus.tasks.learnt import LEVEL, chance_p, product


@pytest.mark.parametrize("kind", ["classes", "rare classes", "labels", "numbers"])
def test_answers_by_chance_count_as_learnt_once_in_twenty_times(kind):
    draw = np.random.default_rng(0)

    def drawn():
        if kind == "numbers":
            return draw.normal(size=60)
        return (
            draw.random((60, 3)) < 0.3 if kind == "labels" else (draw.random(60) < (0.5 if kind == "classes" else 0.1))
        )

    fit = (product,) if kind == "numbers" else ()
    found = [chance_p(drawn(), drawn(), *fit, seed=i) < LEVEL for i in range(300)]
    assert np.mean(found) < 0.09


def test_answers_that_fit_are_told_from_chance_also_where_one_class_is_rare():
    draw = np.random.default_rng(0)
    truth = draw.random(200) < 0.05
    assert chance_p(np.where(draw.random(200) < 0.02, ~truth, truth), truth) < 0.01
    assert chance_p(np.zeros(200, bool), truth) == 1.0  # 95% accuracy


def test_constant_numbers_learnt_nothing():
    truth = np.random.default_rng(0).normal(size=50)
    assert chance_p(np.full(50, 0.7), truth - truth.mean(), product) > LEVEL
    assert chance_p(truth + 5, truth - truth.mean(), product) < LEVEL


def test_large_data_are_sampled():
    truth = np.arange(1_000_000) % 2
    assert chance_p(truth, truth) < LEVEL


def record(arm, seed, p, **values):
    trial = Trial("final", arm, 1e-3, 1.0, seed)
    found = {} if p is None else {"chance_p": p, "macro_f1": 0.4, "majority_share": 0.7, **values}
    return Record(
        trial, "done", 20, 0.6, 0.7, 0.1, test_losses=(0.6,) * 10, test_correct=(True,) * 7 + (False,) * 3, values=found
    )


def arms(**p_values):
    return {arm: learning([record(arm, seed, p) for seed, p in enumerate(ps)]) for arm, ps in p_values.items()}


def test_a_seed_that_fits_by_luck_does_not_make_an_arm_learn():
    assert arms(lora=[0.02, 0.5, 0.9])["lora"]["learnt"] == 0  # 0.05 / 3
    assert arms(lora=[0.001, 0.5, 0.9])["lora"]["learnt"] == 1


def test_what_is_not_known_is_not_claimed():
    found = arms(lora=[None, 1.0], loraplus=[1.0, 1.0])
    assert found["lora"] is None and nothing_learnt(found) == []
    assert "LoRA+ on 2 of 2 seeds" in some_seeds_sentence(found, but=()) and learning([]) is None


def test_arms_that_learnt_nothing_are_not_compared():
    found = arms(lora=[1.0, 1.0], loraplus=[1.0, 0.9], prodigy=[0.001, 0.001])
    assert nothing_learnt(found) == ["lora", "loraplus"]
    assert nothing_learnt(arms(lora=[0.001, 1.0], loraplus=[1.0, 1.0])) == []
    text = nothing_sentence(found, ["lora", "loraplus"])
    assert "LoRA 70.0% and LoRA+ 70.0%, where always the most frequent class has 70.0%" in text and "--check" in text
    assert "Prodigy" not in text
    assert some_seeds_sentence(found, but=["lora", "loraplus"]) == ""
    assert "LoRA+ on 1 of 2 seeds" in some_seeds_sentence(arms(lora=[0.001] * 2, loraplus=[0.001, 1.0]), but=())
