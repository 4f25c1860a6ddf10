"""Which arms a comparison has, what is run for them, and what is concluded about those beside LoRA and LoRA+."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from html import unescape

import pytest

from loraplus.errors import DivergedError, InputError
from loraplus.report import render
from loraplus.report.plots import curves, rates
from loraplus.study import statistics
from loraplus.study.arms import ALL, chosen
from loraplus.study.plan import Plan, same_training
from loraplus.study.records import Record, Trial
from loraplus.study.summary import runs_csv_rows, summarise
from study.test_runner import distance_from, without_processes
from study.test_summary import by_seed, record, study
from study.test_summary import summary_of as summarised

EVERY = ",".join(ALL)
SIX = ("lora", "loraplus", "auto", "mua", "prodigy", "schedulefree")  # of every kind


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 999)


def test_arms_come_in_one_order_whatever_order_they_are_given_in():
    assert chosen("prodigy, loraplus,lora") == ("lora", "loraplus", "prodigy")
    assert chosen(EVERY) == tuple(ALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora,prodgy", "no arm 'prodgy'; the nearest is 'prodigy'"),
        ("lora,", "no arm ''"),
        ("lora,auto,auto", "auto is given twice"),
        ("loraplus,auto", "must hold lora"),
        ("lora", "nothing to compare"),
    ],
)
def test_arms_that_make_no_comparison_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        chosen(text)


@pytest.mark.parametrize("arm", ["prodigy", "schedulefree"])
def test_an_arm_whose_package_is_missing_says_what_to_install(monkeypatch, arm):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == ALL[arm].package else find(name))
    with pytest.raises(InputError, match=rf"{arm} needs the package {ALL[arm].package}.*loraplus\[peers\]"):
        chosen(EVERY)
    assert chosen("lora,loraplus,auto") == ("lora", "loraplus", "auto")


def plan_of(*arms):
    return Plan(tuning_runs=3, seeds=2, seed=5, lr_ratio=16.0, untuned_lr=3e-4, arms=arms)


def test_arms_that_set_their_own_rates_are_run_once_a_fresh_seed_and_never_tuned():
    plan = plan_of(*SIX)
    order, _ = without_processes(plan, distance_from(3e-3))
    assert len(order) == plan.total == 25
    runs = Counter((trial.phase, trial.arm) for trial in order)
    for arm in ("auto", "mua", "prodigy"):
        assert (runs["tuning", arm], runs["final", arm], runs["untuned", arm]) == (0, 2, 0)
    for arm in SIX:
        assert [trial.seed for trial in order if trial.arm == arm and trial.phase == "final"] == [6, 7]


def test_schedule_free_is_tuned_with_the_same_budget_at_one_ratio():
    order, _ = without_processes(plan_of(*SIX), distance_from(3e-3))
    tuning = [trial for trial in order if trial.phase == "tuning"]
    assert Counter(trial.arm for trial in tuning) == {"lora": 3, "loraplus": 3, "schedulefree": 3}
    assert {trial.lr_ratio for trial in order if trial.arm == "schedulefree"} == {16.0}
    lora, free = ([t.geometric_mean_lr for t in tuning if t.arm == arm] for arm in ("lora", "schedulefree"))
    assert lora == pytest.approx(free, rel=0.01)  # rates have three digits


def test_more_arms_leave_the_runs_of_lora_and_loraplus_as_they_were():
    two, _ = without_processes(plan_of("lora", "loraplus"), distance_from(1e-3))
    every, _ = without_processes(plan_of(*SIX), distance_from(1e-3))
    assert two == [trial for trial in every if trial.arm in ("lora", "loraplus")]


def test_without_loraplus_there_is_no_untuned_picture():
    order, _ = without_processes(plan_of("lora", "mua"), distance_from(1e-3))
    assert Counter((trial.phase, trial.arm) for trial in order) == {
        ("tuning", "lora"): 3, ("final", "lora"): 2, ("final", "mua"): 2,
    }  # fmt: skip


def test_methods_are_never_taken_for_one_another():
    trials = [Trial("final", arm, 1.0, 1.0, 1) for arm in ALL]
    assert len({same_training(trial) for trial in trials}) == len(ALL) - 1
    assert same_training(trials[0]) == same_training(trials[1])  # LoRA+ at λ = 1 is LoRA


def arm_runs(arm, accuracy, loss, rates=None, seeds=(1, 2, 3), status="done"):
    runs = [record("final", arm, 1.0, 1.0, seed, loss, accuracy, status=status) for seed in seeds]
    return [replace(run, rates_reached=rates) for run in runs]


FREE = [record("tuning", "schedulefree", lr, 16, 0, loss) for lr, loss in ((1e-3, 0.5), (3e-3, 0.43), (1e-2, 0.6))]
FREE += [record("final", "schedulefree", 3e-3, 16, seed, 0.43, 0.8) for seed in (1, 2, 3)]
OTHERS = [
    *arm_runs("auto", 0.9, 0.39, (2e-4, 8e-4)), *arm_runs("mua", 0.6, 0.8, (1e-3, 1e-3)),
    *arm_runs("prodigy", 0.8, 0.42, None), *FREE,
]  # fmt: skip


def test_a_comparison_without_further_arms_says_nothing_of_them():
    summary = summarised(study(0.8))
    assert "paired_with_lora" not in summary and set(summary["arms"]) == {"lora", "loraplus"}


def test_further_arms_leave_what_is_said_of_lora_and_loraplus_as_it_was():
    two, every = summarised(study(0.8)), summarised(study(0.8, extra=OTHERS))
    for key in set(two) - {"arms", "verdict", "decision"}:
        assert two[key] == every[key]
    for arm in two["arms"]:
        assert two["arms"][arm] == every["arms"][arm]


def test_each_further_arm_is_compared_with_lora():
    summary = summarised(study(0.8, seeds=6, extra=OTHERS))
    arms, pairs = summary["arms"], summary["paired_with_lora"]
    assert list(arms) == list(SIX) and list(pairs) == ["auto", "mua", "prodigy", "schedulefree"]
    assert [arms[arm]["tuning_runs"] for arm in pairs] == [0, 0, 0, 3]
    assert arms["auto"]["best"] == {"lr": pytest.approx(2e-4), "lr_ratio": pytest.approx(4)}
    assert arms["prodigy"]["best"] == {"lr": None, "lr_ratio": None}
    assert set(arms["auto"]) == set(arms["lora"])
    assert set(summary["paired"]) < set(pairs["auto"])
    assert pairs["auto"]["accuracy_difference"]["mean"] > 0.05 > pairs["auto"]["p_value"]
    assert pairs["auto"]["steps_to_target"]["auto_to_reach_lora"] == 93
    assert pairs["mua"]["steps_to_target"]["mua_to_reach_lora"] is None
    assert pairs["mua"]["steps_to_target"]["lora_to_reach_mua"] == 50
    assert pairs["auto"]["seconds_per_step_ratio"] == 1.0
    verdict = summary["verdict"]
    assert "LoRA+ auto (0 tuning runs) is better than tuned LoRA in test accuracy" in verdict
    assert "μA (0 tuning runs) is worse than tuned LoRA in test accuracy" in verdict
    assert "Prodigy (0 tuning runs): no difference found to tuned LoRA" in verdict
    assert "schedule-free (3 tuning runs): no difference found to tuned LoRA" in verdict


def test_all_arms_are_one_family_and_each_shows_the_p_that_decides():
    """Each arm alone would be found; of four arms at once, that is no longer rare enough."""
    alone = by_seed(5, 2, 3, 1)
    assert summarised(alone)["paired"]["found"] and 0.0125 < summarised(alone)["paired"]["p_value"] < 0.05
    others = [r for arm in ("auto", "mua", "prodigy") for r in by_seed(5, 2, 3, 1, arm=arm) if r.trial.arm == arm]
    others = [r for r in others if r.trial.phase == "final"]
    summary = summarised([*alone, *others])
    pairs = {"loraplus": summary["paired"], **summary["paired_with_lora"]}
    assert summary["decision"]["family"] == list(pairs)
    for pair in pairs.values():
        assert pair["p_value_holm"] == pytest.approx(4 * pair["p_value"]) and pair["found"] is False
    words = f"p = {pairs['auto']['p_value_holm']:.3f} corrected for 4 arms"
    assert summary["verdict"].count(words) == 4 and summary["verdict"].count("no difference found") == 4
    html = page([*alone, *others])
    assert html.count(f'<span class="p">p = {pairs["auto"]["p_value_holm"]:.3f}</span>') == 4
    assert "corrected by Holm for 4 comparisons with LoRA" in html


def test_an_arm_without_seeds_for_a_verdict_is_no_part_of_the_family():
    auto = [r for r in by_seed(5, 2, arm="auto") if (r.trial.arm, r.trial.phase) == ("auto", "final")]
    summary = summarised([*by_seed(5, 2, 3, 1), *auto])
    assert summary["decision"]["family"] == ["loraplus"] and summary["paired"]["found"]
    assert summary["paired"]["p_value_holm"] == summary["paired"]["p_value"]
    assert summary["paired_with_lora"]["auto"]["found"] is None
    assert "LoRA+ auto (0 tuning runs) − tuned LoRA in test accuracy is +3.5 points" in summary["verdict"]


def test_an_arm_that_diverged_everywhere_does_not_spoil_the_others():
    diverged = arm_runs("prodigy", 0.8, math.inf, status="diverged")
    summary = summarised(study(0.8, extra=diverged))
    assert summary["paired"]["diverged_seeds"] == 0
    assert summary["arms"]["lora"]["seeds"] == [1, 2, 3] and summary["arms"]["prodigy"]["seeds"] == []
    assert summary["arms"]["prodigy"]["test"] is None
    assert summary["paired_with_lora"]["prodigy"]["p_value"] is None
    assert summary["paired_with_lora"]["prodigy"]["diverged_seeds"] == 3
    assert (
        "Prodigy (0 tuning runs) leaves no seed to compare with LoRA: Prodigy diverged on 3 of 3 seeds"
        in (summary["verdict"])
    )
    assert page(study(0.8, extra=diverged)).count("no seed left to compare") == 1


def without_loraplus(*extra):
    return [r for r in study(0.8) if r.trial.arm == "lora" and r.trial.phase != "untuned"] + list(extra)


def test_without_loraplus_its_fields_are_null():
    summary = summarised(without_loraplus(*OTHERS))
    assert summary["paired"]["p_value"] is None and summary["paired"]["accuracy_difference"] is None
    assert summary["steps_to_target"]["lora_to_reach_loraplus"] is None
    assert summary["cost"]["seconds_per_step_ratio"] is None and summary["untuned"]["loraplus"]["test"] is None
    assert summary["verdict"].startswith("LoRA+ auto (0 tuning runs) is better")
    assert "loraplus" not in summary["arms"]
    html = page(without_loraplus(*OTHERS))
    assert "LoRA+ − LoRA" not in html and "LoRA+ auto − LoRA" in html


def test_without_loraplus_nothing_left_to_compare_is_an_error():
    with pytest.raises(DivergedError, match="Prodigy diverged on 3 of 3 seeds"):
        summarised(without_loraplus(*arm_runs("prodigy", 0.8, math.inf, status="diverged")))


def page(records):
    data = {
        "source": "reviews.csv", "text_column": "text", "label_column": "label", "labels": ["bad", "good"],
        "train_examples": 10, "validation_examples": 5, "test_examples": 5, "duplicates_removed": 3, "max_length": 16,
        "truncated_train_examples": 0, "split_seed": 0, "steps": 100,
    }  # fmt: skip
    return render(summarise(records, config={"model": "m"}, data_facts=data), records)


def test_the_report_shows_every_arm_and_the_rates_it_arrived_at():
    html = page(study(0.8, extra=OTHERS))
    for arm in SIX:
        assert f"<tr><td>{ALL[arm].title}</td>" in html
    for arm in ("auto", "mua", "prodigy", "schedulefree"):
        assert f"{ALL[arm].title} − LoRA" in html and ALL[arm].about in unescape(html)
    assert html.count("(0 tuning runs)") >= 3
    names = {one.name for one in curves(study(0.8, extra=OTHERS)).series}
    assert names == {ALL[arm].title for arm in SIX} | {"LoRA, untuned", "LoRA+, untuned"}
    best = {arm: {"lr": 1e-3, "lr_ratio": 4.0} for arm in SIX if ALL[arm].tuned}
    points = {one.name: one for one in rates(study(0.8, extra=OTHERS), best).series}
    assert list(points) == [
        "λ = 1", "LoRA", "best LoRA", "LoRA+", "best LoRA+", "LoRA+ auto", "μA", "schedule-free",
        "best schedule-free", "diverged",
    ]  # fmt: skip
    assert (points["LoRA+ auto"].x, points["LoRA+ auto"].y) == ([2e-4] * 3, [8e-4] * 3)


def test_runs_csv_holds_the_rates_that_were_arrived_at_or_nothing():
    auto, prodigy = runs_csv_rows([OTHERS[0], OTHERS[6]])
    assert (auto["lr"], auto["lr_b"], auto["lr_ratio"]) == (2e-4, 8e-4, 4)
    assert (prodigy["lr"], prodigy["lr_b"], prodigy["lr_ratio"]) == (None, None, None)


def test_the_rates_that_were_arrived_at_are_stored_with_the_run():
    stored = json.loads(json.dumps(OTHERS[0].to_dict()))
    assert Record.from_dict(stored) == OTHERS[0]
    del stored["found"]  # of an earlier version
    assert Record.from_dict(stored).rates_reached is None
