"""From records to a verdict: what is found is said, and so is what is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from loraplus.errors import DivergedError
from loraplus.study import statistics
from loraplus.study.records import ARMS, CurvePoint, Record, Trial
from loraplus.study.summary import runs_csv_rows, summarise
from loraplus.study.wording import signed


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """The words and fields do not hang on the last digit of an interval."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 999)


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


def study(plus_accuracy, *, plus_loss=0.40, seeds=3, extra=()):
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
    assert "This rests on 3 seeds" in summary["verdict"]
    assert summary["paired"]["accuracy_difference"]["mean"] == 0
    assert summary["paired"]["p_value"] == summary["paired"]["p_value_holm"] == 1
    assert summary["paired"]["found"] is False and summary["untuned"]["found"] is True


def test_a_clear_lead_is_called_better_and_a_clear_lag_worse():
    assert "LoRA+ is better than LoRA" in summary_of(study(0.9, seeds=6))["verdict"]
    verdict = summary_of(study(0.6, seeds=6))["verdict"]
    assert "LoRA+ is worse than LoRA" in verdict
    assert "This rests on" not in verdict and "A verdict takes" not in verdict


def test_the_schema_of_the_summary():
    summary = summary_of(study(0.8))
    assert summary["schema_version"] == 1
    assert (
        set(summary["arms"])
        == set(summary["untuned"])
        - {"accuracy_difference", "loss_difference", "p_value", "found", "by_seed", "over_examples"}
        == set(ARMS)
    )
    assert summary["decision"]["measure"] == "accuracy" and summary["decision"]["family"] == ["loraplus"]
    plus = summary["arms"]["loraplus"]
    assert plus["best"] == {"lr": 1e-3, "lr_ratio": 16}
    assert (plus["tuning_runs"], plus["diverged_runs"], plus["best_at_edge"]) == (3, 1, False)
    assert plus["seeds"] == [1, 2, 3]
    assert set(plus["test"]["accuracy"]) == {"mean", "low", "high"}
    assert plus["seconds_per_step"] == 0.5
    assert summary["cost"]["seconds_per_step_ratio"] == 1.0


def test_a_best_point_at_the_edge_of_what_was_tried_is_flagged():
    records = [r for r in study(0.8) if not (r.trial.phase == "tuning" and r.trial.lr == 1e-2)]
    assert summary_of(records)["arms"]["lora"]["best_at_edge"]


def test_steps_to_target_go_both_ways():
    steps = summary_of(study(0.8, plus_loss=0.40))["steps_to_target"]
    assert steps["lora_to_reach_loraplus"] is None
    assert steps["loraplus_to_reach_lora"] == 95
    assert isinstance(steps["loraplus_to_reach_lora"], int)
    assert steps["target_loss"] == {"lora": pytest.approx(0.42), "loraplus": pytest.approx(0.40)}


def test_a_seed_that_diverged_in_one_arm_is_left_out_of_both_and_counted():
    extra = [
        record("final", "lora", 1e-3, 1, 9, 0.42),
        record("final", "loraplus", 1e-3, 16, 9, math.inf, status="diverged"),
    ]
    summary = summary_of(study(0.8, extra=extra))
    assert summary["arms"]["lora"]["seeds"] == summary["arms"]["loraplus"]["seeds"] == [1, 2, 3]
    assert summary["paired"]["diverged_seeds"] == 1
    assert "LoRA+ diverged on 1 of 4 seeds; seeds that an arm diverged on are left out of both" in summary["verdict"]


def test_a_seed_that_both_arms_diverged_on_counts_once():
    extra = [record("final", arm, 1e-3, 1, 9, math.inf, status="diverged") for arm in ARMS]
    assert summary_of(study(0.8, extra=extra))["paired"]["diverged_seeds"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_final_run_with_a_test_loss_that_is_not_finite_counts_as_diverged(bad):
    records = study(0.8)
    at = next(i for i, r in enumerate(records) if r.trial.phase == "final" and r.trial.arm == "loraplus")
    records[at] = replace(records[at], test_losses=(bad, *records[at].test_losses[1:]))
    summary = summary_of(records)
    assert summary["paired"]["diverged_seeds"] == 1
    assert summary["arms"]["lora"]["seeds"] == [2, 3]
    assert summary["paired"]["found"] is None and "2 seeds cannot tell" in summary["verdict"]
    assert runs_csv_rows(records)[at]["test_loss"] is None


@pytest.mark.parametrize("diverged", [1, 3])
def test_the_verdict_tells_that_an_untuned_arm_diverged(diverged):
    records = [
        replace(r, status="diverged", eval_loss=math.inf, curve=(), test_losses=(), test_correct=())
        if (r.trial.phase, r.trial.arm) == ("untuned", "loraplus") and r.trial.seed <= diverged
        else r
        for r in study(0.8)
    ]
    verdict = summary_of(records)["verdict"]
    assert f"LoRA+ diverged on {diverged} of 3 seeds" in verdict
    assert ("no seed is left to compare" in verdict) == (diverged == 3)


def test_arms_that_disagree_on_one_example_only_are_told_apart_by_nothing():
    records = study(0.8)
    for i, r in enumerate(records):
        if r.trial.phase == "final" and r.trial.arm == "loraplus":
            records[i] = replace(r, test_correct=(not r.test_correct[0], *r.test_correct[1:]))
    summary = summary_of(records)
    assert summary["paired"]["p_value"] > 0.05
    assert "no difference found" in summary["verdict"]


@pytest.mark.parametrize("curve", [(), (CurvePoint(50, math.inf, 0.5), CurvePoint(100, 0.4, 0.8))])
def test_a_curve_with_gaps_leaves_a_valid_summary(curve):
    records = [replace(r, curve=curve) if r.trial.phase == "final" else r for r in study(0.8)]
    found, whole = summary_of(records), summary_of(study(0.8))
    json.dumps(found, allow_nan=False)
    assert found["verdict"] and found["paired"] == whole["paired"]
    assert found["steps_to_target"] != whole["steps_to_target"] or curve


def test_a_final_phase_that_no_seed_survived_is_an_error_that_counts_the_losses():
    records = [r for r in study(0.8) if r.trial.phase != "final" or r.trial.arm == "lora"]
    records += [record("final", "loraplus", 1e-3, 16, seed, math.inf, status="diverged") for seed in (1, 2, 3)]
    with pytest.raises(DivergedError, match=r"LoRA\+ diverged on 3 of 3 seeds"):
        summary_of(records)


def test_rates_that_are_equal_up_to_rounding_make_no_edge():
    records = [r for r in study(0.8) if r.trial.phase != "tuning" or r.trial.arm != "lora"]
    records += [record("tuning", "lora", lr, 1, 0, 0.4) for lr in (1e-3, 1e-3 * (1 + 1e-12))]
    assert not summary_of(records)["arms"]["lora"]["best_at_edge"]


def test_a_difference_that_rounds_to_zero_has_no_minus_sign():
    assert signed(-0.0001, 3) == "+0.000"
    assert signed(-0.001, 3) == "-0.001"


def test_an_arm_without_any_finished_tuning_run_is_an_error():
    records = [r for r in study(0.8) if r.trial.phase != "tuning" or r.trial.arm == "lora"]
    records.append(record("tuning", "loraplus", 1e-3, 16, 0, math.inf, status="diverged"))
    with pytest.raises(DivergedError, match=r"LoRA\+ diverged"):
        summary_of(records)


def test_runs_csv_has_one_row_a_run_with_both_rates():
    rows = runs_csv_rows(study(0.8))
    assert len(rows) == 18
    assert rows[4]["lr_b"] == pytest.approx(16e-3)
    assert rows[5]["eval_loss"] is None
    assert rows[0]["test_accuracy"] is None
    assert 0.7 < rows[6]["test_accuracy"] < 0.9


def language_study(difference, *arms):
    """Final and untuned runs of LoRA, and of other arms whose test losses differ from its own by so much."""

    def losses(arm):
        return tuple(1.0 + 0.01 * i + (difference if arm != "lora" else 0) * (1 + i % 3) for i in range(40))

    found = [record("tuning", arm, 1e-3, 1, 0, 2.0) for arm in ("lora", "loraplus")]
    for arm in ("lora", "loraplus", *arms):
        found += [record("final", arm, 1e-3, 1, seed, 2.0) for seed in (1, 2, 3)]
        found += [record("untuned", arm, 3e-4, 1, seed, 2.0) for seed in (1, 2, 3) if arm in ("lora", "loraplus")]
    return [
        replace(
            run, eval_accuracy=None, test_correct=(), curve=(CurvePoint(100, 2.0),),
            test_losses=losses(run.trial.arm),
        )
        for run in found
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        (-0.01, "LoRA+ is better than LoRA in test loss: -0.0198 a token"),
        (0.01, "LoRA+ is worse than LoRA in test loss: +0.0198 a token"),
        (0.0, "no difference found between LoRA+ and LoRA in test loss: +0.0000 a token"),
        (1e-9, "no difference found between LoRA+ and LoRA in test loss: +0.0000 a token"),  # rounding
    ],
)
def test_language_models_are_judged_by_loss_and_perplexity(difference, says):
    records = language_study(difference, "auto")
    summary = summarise(records, config={"task": "sft"}, data_facts={})
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert says in summary["verdict"] and "accuracy" not in json.dumps(summary)
    sign = (difference > 1e-6) - (difference < -1e-6)
    words = {-1: "is better than tuned LoRA", 0: "no difference found to tuned LoRA", 1: "is worse than tuned LoRA"}[
        sign
    ]
    assert f"LoRA+ auto (0 tuning runs){':' if not sign else ''} {words}" in summary["verdict"]
    for arm in ("lora", "loraplus", "auto"):
        test = summary["arms"][arm]["test"]
        assert test["perplexity"]["mean"] == pytest.approx(math.exp(test["loss"]["mean"]))
    rows = runs_csv_rows(records, ("loss", "perplexity"))
    assert rows[2]["test_perplexity"] == pytest.approx(math.exp(rows[2]["test_loss"]))


def by_seed(*points, phase="final", arm="loraplus"):
    """Records of 400 test examples whose accuracy differs from LoRA's by so many points, seed by seed."""
    found = [record("tuning", name, 1e-3, 1, 0, 0.4) for name in ARMS]
    for seed, difference in enumerate(points, 1):
        for name, right in (("lora", 320), (arm, 320 + round(4 * difference))):
            run = record(phase, name, 1e-3, 1, seed, 0.4)
            correct = tuple(i < right for i in range(400))
            found.append(replace(run, test_correct=correct, test_losses=tuple(0.2 if c else 1.0 for c in correct)))
    return found


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ((5, 5), None),
        ((9, 9.25), None),
        ((5, 5.5, 6), True),
        ((-5, -5.5, -6), True),
        ((12, 2, 0.5), False),
        ((6, -1, 5, 4, 7), True),
        ((9, -3, 8, 1, -1), False),
    ],
)
def test_seeds_decide_whatever_the_examples_say(points, found):
    summary = summary_of(by_seed(*points))
    paired = summary["paired"]
    assert paired["over_examples"]["p_value"] < 0.005
    assert paired["found"] is found
    assert ("no difference found" in summary["verdict"]) == (found is False)
    assert ("no verdict" in summary["verdict"]) == (found is None)
    assert any(f"LoRA+ is {word} than" in summary["verdict"] for word in ("better", "worse")) == (found is True)
    assert [seed["accuracy_difference"] for seed in paired["by_seed"]] == pytest.approx([p / 100 for p in points])


def test_the_difference_is_found_exactly_where_its_interval_leaves_zero_out():
    for third in np.arange(0.25, 6, 0.25):
        paired = summary_of(by_seed(5, 4, third))["paired"]
        assert paired["found"] == (paired["accuracy_difference"]["low"] > 0)


def test_one_seed_shows_its_figures_and_no_interval():
    summary = summary_of(by_seed(5))
    paired = summary["paired"]
    assert paired["accuracy_difference"] == {"mean": pytest.approx(0.05), "low": None, "high": None}
    assert paired["p_value"] is None and paired["p_value_holm"] is None and paired["found"] is None
    assert "+5.0 points (seed by seed +5.0), test loss -0.040: no verdict" in summary["verdict"]
    assert "takes 3 seeds or more that both arms finished, and 1 seed cannot tell" in summary["verdict"]
    accuracy = summary["arms"]["lora"]["test"]["accuracy"]
    assert 0.75 < accuracy["low"] < accuracy["mean"] == 0.8 < accuracy["high"] < 0.85  # over the test examples


def test_a_loss_that_differs_is_no_second_chance_where_accuracy_decides():
    records = [
        replace(r, test_losses=tuple(loss - 0.1 for loss in r.test_losses)) if r.trial.arm == "loraplus" else r
        for r in by_seed(1, -1, 0.5, -0.5, 0)
    ]
    summary = summary_of(records)
    assert summary["paired"]["loss_p_value"] < 0.001 and summary["paired"]["found"] is False
    assert "no difference found between LoRA+ and LoRA in test accuracy" in summary["verdict"]
    assert "lower" not in summary["verdict"] and "test loss -0.100" in summary["verdict"]


def test_an_interval_stays_within_what_there_can_be():
    summary = summary_of(by_seed(19, -60))
    assert summary["arms"]["loraplus"]["test"]["accuracy"]["high"] == 1.0
    assert summary["arms"]["loraplus"]["test"]["accuracy"]["low"] == 0.0
    assert summary["arms"]["loraplus"]["test"]["loss"]["low"] == 0.0
    difference = summary["paired"]["accuracy_difference"]
    assert (difference["low"], difference["high"]) == (-1.0, 1.0)


def with_learning(records, p_values, share=0.7):
    """The final and untuned runs as they tell of what was learnt: {(phase, arm): p}."""
    return [
        replace(r, values={"chance_p": p, "macro_f1": 0.4, "majority_share": share})
        if (p := p_values.get((r.trial.phase, r.trial.arm))) is not None
        else r
        for r in records
    ]


EVERY = [(phase, arm) for phase in ("final", "untuned") for arm in ("lora", "loraplus")]


def test_where_nothing_was_learnt_the_verdict_says_so_and_holds_no_statistics():
    summary = summary_of(with_learning(study(0.8), dict.fromkeys(EVERY, 0.9)))
    verdict = summary["verdict"]
    assert verdict.startswith("Nothing was learnt: ") and "70.0%" in verdict and "permutation test" in verdict
    assert "either" in verdict and not [
        word for word in ("interval", "p =", "difference found", "rests on") if word in verdict
    ]
    assert summary["learning"]["nothing"] == ["lora", "loraplus"]


def test_where_the_untuned_runs_alone_learnt_nothing_the_others_are_compared():
    p_values = dict.fromkeys(EVERY[:2], 0.001) | dict.fromkeys(EVERY[2:], 0.9)
    verdict = summary_of(with_learning(study(0.9), p_values))["verdict"]
    assert verdict.startswith("Tuned with equal budgets, LoRA+ is better") and "neither arm learnt anything" in verdict


def test_where_one_arm_learnt_nothing_it_is_named_beside_the_difference():
    verdict = summary_of(with_learning(study(0.9), dict.fromkeys(EVERY, 0.001) | {("final", "lora"): 0.9}))["verdict"]
    assert "LoRA+ is better" in verdict and "was learnt by LoRA on 3 of 3 seeds" in verdict


def test_where_all_learnt_the_verdict_is_what_it_was():
    summary = summary_of(with_learning(study(0.9), dict.fromkeys(EVERY, 0.001)))
    assert summary["verdict"] == summary_of(study(0.9))["verdict"] and "learning" not in summary_of(study(0.9))


def test_a_page_of_arms_that_learnt_nothing_has_no_differences_and_no_steps():
    from loraplus.report import render

    facts = {
        "source": "d.csv", "labels": ["a"], "steps": 100, "text_column": "t", "label_column": "l", "train_examples": 1,
        "validation_examples": 1, "test_examples": 1, "split_seed": 0, "duplicates_removed": 0, "max_length": 8,
        "truncated_train_examples": 0,
    }  # fmt: skip
    shown = {}
    for name, records in {"learnt": study(0.9), "not": with_learning(study(0.9), dict.fromkeys(EVERY, 0.9))}.items():
        page = render(summarise(records, config={"model": "m"}, data_facts=facts), records)
        shown[name] = [text in page for text in ("final loss of", "LoRA+ − LoRA</td>", "permutation test within seeds")]
    assert shown == {"learnt": [True] * 3, "not": [False] * 3}
