"""From records to a verdict: what is found is said, and so is what is not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from loraplus.errors import DivergedError
from loraplus.study.records import ARMS, CurvePoint, Record, Trial
from loraplus.study.summary import runs_csv_rows, summarise


def record(phase, arm, lr, ratio, seed, eval_loss, accuracy=0.8, examples=400, status="done"):
    generator = np.random.default_rng(seed)  # the same draw in both arms: paired examples
    correct = (
        () if phase == "tuning" or status != "done" else tuple(bool(v) for v in generator.random(examples) < accuracy)
    )
    return Record(
        trial=Trial(phase, arm, lr, ratio, seed),
        status=status,
        steps=100,
        eval_loss=eval_loss,
        eval_accuracy=accuracy,
        seconds_per_step=0.5,
        curve=(CurvePoint(50, eval_loss + 0.2, 0.6), CurvePoint(100, eval_loss, accuracy)) if status == "done" else (),
        test_losses=tuple(0.2 if c else 1.0 for c in correct),
        test_correct=correct,
    )


def study(plus_accuracy, *, plus_loss=0.40, seeds=2, extra=()):
    records = [record("tuning", "lora", lr, 1, 0, loss) for lr, loss in ((1e-3, 0.5), (3e-3, 0.42), (1e-2, 0.6))]
    records += [
        record("tuning", "loraplus", lr, 16, 0, loss) for lr, loss in ((3e-4, 0.45), (1e-3, 0.41), (3e-3, math.inf))
    ]
    for seed in range(1, seeds + 1):
        for arm, accuracy, loss in (("lora", 0.8, 0.42), ("loraplus", plus_accuracy, plus_loss)):
            records.append(record("final", arm, 1e-3, 1 if arm == "lora" else 16, seed, loss, accuracy))
        records.append(record("untuned", "lora", 3e-4, 1, seed, 0.55, 0.7))
        records.append(record("untuned", "loraplus", 3e-4, 16, seed, 0.43, 0.79))
    return [*records, *extra]


def summary_of(records):
    summary = summarise(records, config={"model": "m"}, data_facts={"labels": ["a", "b"]})
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    return summary


def test_a_tie_is_called_no_difference_and_the_untuned_lead_is_told():
    summary = summary_of(study(0.8))
    assert "no difference found" in summary["verdict"]
    assert "Untuned" in summary["verdict"]
    assert "ahead of" in summary["verdict"]
    assert "2 seeds" in summary["verdict"]
    assert summary["paired"]["accuracy_difference"]["mean"] == 0
    assert summary["paired"]["p_value"] == 1


def test_a_clear_lead_is_called_better_and_a_clear_lag_worse():
    assert "LoRA+ is better than LoRA" in summary_of(study(0.9, seeds=6))["verdict"]
    verdict = summary_of(study(0.6, seeds=6))["verdict"]
    assert "LoRA+ is worse than LoRA" in verdict
    assert "seed to seed" not in verdict


def test_the_schema_of_the_summary():
    summary = summary_of(study(0.8))
    assert summary["schema_version"] == 1
    assert (
        set(summary["arms"])
        == set(summary["untuned"]) - {"accuracy_difference", "loss_difference", "p_value"}
        == set(ARMS)
    )
    plus = summary["arms"]["loraplus"]
    assert plus["best"] == {"lr": 1e-3, "lr_ratio": 16}
    assert (plus["tuning_runs"], plus["diverged_runs"], plus["best_at_edge"]) == (3, 1, False)
    assert plus["seeds"] == [1, 2]
    assert set(plus["test"]["accuracy"]) == {"mean", "low", "high"}
    assert plus["seconds_per_step"] == 0.5
    assert summary["cost"]["seconds_per_step_ratio"] == 1.0


def test_a_best_point_at_the_edge_of_what_was_tried_is_flagged():
    records = [r for r in study(0.8) if not (r.trial.phase == "tuning" and r.trial.lr == 1e-2)]
    assert summary_of(records)["arms"]["lora"]["best_at_edge"]


def test_steps_to_target_go_both_ways():
    steps = summary_of(study(0.8, plus_loss=0.40))["steps_to_target"]
    assert steps["lora_to_reach_loraplus"] is None
    assert steps["loraplus_to_reach_lora"] == pytest.approx(95.0)
    assert steps["target_loss"] == {"lora": pytest.approx(0.42), "loraplus": pytest.approx(0.40)}


def test_a_seed_that_diverged_in_one_arm_is_left_out_of_both_and_counted():
    extra = [
        record("final", "lora", 1e-3, 1, 9, 0.42),
        record("final", "loraplus", 1e-3, 16, 9, math.inf, status="diverged"),
    ]
    summary = summary_of(study(0.8, extra=extra))
    assert summary["arms"]["lora"]["seeds"] == summary["arms"]["loraplus"]["seeds"] == [1, 2]
    assert summary["paired"]["diverged_seeds"] == 1


def test_an_arm_without_any_finished_tuning_run_is_an_error():
    records = [r for r in study(0.8) if r.trial.phase != "tuning" or r.trial.arm == "lora"]
    records.append(record("tuning", "loraplus", 1e-3, 16, 0, math.inf, status="diverged"))
    with pytest.raises(DivergedError, match=r"LoRA\+ diverged"):
        summary_of(records)


def test_runs_csv_has_one_row_a_run_with_both_rates():
    rows = runs_csv_rows(study(0.8))
    assert len(rows) == 14
    assert rows[4]["lr_b"] == pytest.approx(16e-3)
    assert rows[5]["eval_loss"] is None
    assert rows[0]["test_accuracy"] is None
    assert 0.7 < rows[6]["test_accuracy"] < 0.9
