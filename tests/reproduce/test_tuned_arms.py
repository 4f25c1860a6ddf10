"""LoRA against LoRA+ on cases: what runs next, and what the runs come to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from loraplus.reproduce.report import HeatMap, LinePlot, Report
from loraplus.reproduce.tuned_arms import TunedArms, verdicts
from loraplus.study.records import CurvePoint, Record, Run
from loraplus.study.statistics import finite_t_interval, t_interval


@dataclass(frozen=True)
class Bowl(TunedArms):
    """Losses from a formula: λ = 4 is best, by `gain` below λ = 1; on seed 9 everything diverges."""

    gain: float = 0.1

    name, title, claims = "bowl", "A bowl", ()
    baseline_scales = ("cpu",)

    def cases(self):
        return [{"domain": "one"}, {"domain": "two"}]

    def settings(self):
        return {}

    def baseline(self, case):
        return {"eval_loss": 0.9, "eval_accuracy": 0.5, "test_loss": 0.9, "test_accuracy": 0.5}

    def train(self, job, on_step):
        if job.seed == 9:
            return Record(Run({}), "diverged")
        off = abs(math.log10(job.lr * math.sqrt(job.lr_ratio) / 3e-3)) + abs(math.log(job.lr_ratio / 4)) / 10
        loss = 0.5 + off + job.seed / 1000 + (self.gain if job.lr_ratio == 1 else 0.0)
        curve = tuple(CurvePoint(step, loss + 1 - step / 10) for step in range(1, 11)) if job.evaluations > 1 else ()
        values = {"eval_loss": loss, "eval_accuracy": 1 - loss}
        if job.evaluations > 1:
            values |= {"test_loss": loss, "test_accuracy": 1 - loss}
        return Record(Run({}), "done", curve=curve, values=values)

    def report(self, results, figures):
        parts = [self.table_of_arms(figures), self.table_of_differences(figures)]
        return Report([], [*parts, *self.maps(results), *self.curves(results, figures)])


def finished(experiment, keep=lambda run: True):
    results = {}
    while runs := [run for run in experiment.next_runs(results) if keep(run)]:
        for run in runs:
            assert run.key not in results
            results[run.key] = experiment.run(run, lambda *_: None)
    return results


def test_final_runs_use_seeds_that_nothing_was_tuned_on():
    results = finished(Bowl(seeds=3))
    seeds = {
        phase: {r.trial["seed"] for r in results.values() if r.trial["phase"] == phase} for phase in ("tuning", "final")
    }
    assert seeds == {"tuning": {0}, "final": {1, 2, 3}}


def test_the_next_runs_do_not_hang_on_the_order_of_the_results():
    results = finished(Bowl(), keep=lambda run: run["phase"] != "final")
    backwards = dict(reversed(results.items()))
    assert Bowl().next_runs(results) == Bowl().next_runs(backwards) != []


def test_figures_tell_arms_difference_and_steps():
    experiment = Bowl()
    figures = experiment.figures(finished(experiment))
    own = figures["cases"]["one"]
    assert own["arms"]["loraplus"]["lr_ratio"] == 4 and own["arms"]["lora"]["lr_ratio"] == 1
    assert own["arms"]["lora"]["tuning_runs"] == own["arms"]["loraplus"]["tuning_runs"]
    gap = own["difference"]["eval_loss"]["mean"]
    assert gap < -0.1
    speed = own["steps_to_target"]
    assert speed["reached"] == 3 and speed["speed_up"] == pytest.approx(10 / (10 + gap * 10), rel=1e-6)


def test_a_loss_that_no_seed_reaches_has_no_number_of_steps():
    experiment = Bowl(gain=-0.2)
    figures = experiment.figures(finished(experiment))
    speed = figures["cases"]["one"]["steps_to_target"]
    assert (speed["reached"], speed["speed_up"], speed["by_seed"]) == (0, None, [None] * 3)
    assert experiment.table_of_differences(figures).rows[0][-2:] == ["0 of 3", "not reached"]


def test_a_case_with_runs_missing_is_named_and_the_others_are_told():
    experiment = Bowl()
    results = finished(experiment, keep=lambda run: run["domain"] == "one")
    figures = experiment.figures(results)
    assert figures["unfinished"] == ["two"] and list(figures["cases"]) == ["one"]
    report = experiment.report(results, figures)
    maps = [plot for figure in report.figures for plot in figure.plots if isinstance(plot, HeatMap)]
    lines = [plot for figure in report.figures for plot in figure.plots if isinstance(plot, LinePlot)]
    assert len(maps) == len(lines) == 1
    assert len(maps[0].z) == len(maps[0].y) and len(maps[0].z[0]) == len(maps[0].x)
    assert [series.name for series in lines[0].series] == ["LoRA", "LoRA+", "TF-IDF"]


def test_a_final_run_that_diverges_leaves_no_figure():
    experiment = Bowl(seeds=9)
    figures = experiment.figures(finished(experiment))
    assert figures["cases"]["one"]["difference"]["test_loss"] is None
    assert "diverged" in verdicts(figures, "test_loss", "nats", lower_is_better=True)[0]


@pytest.mark.parametrize("gain, words", [(0.1, "better"), (-1.0, "worse")])
def test_the_verdict_says_which_arm_is_better(gain, words):
    experiment = Bowl(gain=gain)
    figures = experiment.figures(finished(experiment))
    assert words in verdicts(figures, "test_loss", "nats", lower_is_better=True)[0]


def test_an_interval_t_interval_is_students():
    estimate = t_interval([1.0, 2.0, 3.0])
    assert estimate.mean == 2 and estimate.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert t_interval([1.0]).high == math.inf
    assert finite_t_interval([1.0, math.inf]) is None and finite_t_interval([]) is None
