"""The toy model in batches is the toy model, and the grid search finds what is there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, silu

from loraplus.reproduce import toy_model
from loraplus.reproduce.coordinates import DELTAS, Coordinates, measure, rates_tried
from loraplus.reproduce.png import draw
from loraplus.reproduce.report import LinePlot
from loraplus.reproduce.toy import FAMILIES, Toy, _factor, _tied_over_best
from loraplus.reproduce.toy_model import Factors, Frozen
from loraplus.steps.movement import TOKENS, AdaptedLayer, Sample, Size, movement, rms
from loraplus.study.search.blocks import Block, BlockGrid, best, rates
from loraplus.study.statistics import exponent

WIDTH = 12
PAIRS = [(0.03, 0.1), (0.1, 0.03), (0.01, 0.3)]


def double(model: Frozen) -> Frozen:
    return Frozen(**{name: value.double() for name, value in vars(model).items()})


@pytest.fixture
def model() -> Frozen:
    return double(toy_model.frozen(WIDTH, seed=1, readout_power=1.0, train_points=40))


def plain_loss(model: Frozen, a: torch.Tensor, b: torch.Tensor, chosen=slice(None)) -> torch.Tensor:
    """The literal model: one pair, autograd."""
    out = silu(toy_model.SCALING * model.features[chosen] @ a.T @ b.T) @ model.readout
    return mse_loss(out, model.targets[chosen])


def random_factors(model: Frozen, pairs: int) -> Factors:
    generator = torch.Generator().manual_seed(0)
    factors = Factors.at_start(model, pairs)
    factors.a += 0.1 * torch.randn(factors.a.shape, generator=generator, dtype=factors.a.dtype)
    factors.b += torch.randn(factors.b.shape, generator=generator, dtype=factors.b.dtype)
    return factors


@pytest.mark.parametrize("at_start", [True, False])
def test_gradients_of_the_batch_are_those_of_each_pair(model: Frozen, at_start: bool):
    factors = Factors.at_start(model, 3) if at_start else random_factors(model, 3)
    losses, by_a, by_b = toy_model.gradients(model, factors, model.features, model.targets)
    assert by_b.abs().max() > 0, "B leaves zero"
    for place in range(3):
        a, b = factors.a[place].clone().requires_grad_(), factors.b[place].clone().requires_grad_()
        loss = plain_loss(model, a, b)
        loss.backward()
        torch.testing.assert_close(losses[place], loss.detach())
        torch.testing.assert_close(by_a[place], a.grad)
        torch.testing.assert_close(by_b[place], b.grad)


@pytest.mark.parametrize(("optimizer", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_training_in_batches_is_torchs_optimizer_on_each_pair(model: Frozen, optimizer, kind):
    steps, batch = 7, 16
    lr_a, lr_b = (torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True))
    losses = toy_model.train(model, optimizer, lr_a, lr_b, steps=steps, batch=batch, seed=3)
    for place, pair in enumerate(PAIRS):
        a, b = (nn.Parameter(factor[0]) for factor in vars(Factors.at_start(model, 1)).values())
        plain = kind([{"params": [a], "lr": pair[0]}, {"params": [b], "lr": pair[1]}])
        schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: (steps - step) / steps)
        for chosen in toy_model._batches(len(model.targets), batch, steps, seed=3):
            plain.zero_grad()
            plain_loss(model, a, b, chosen).backward()
            plain.step()
            schedule.step()
        torch.testing.assert_close(losses.train[place], plain_loss(model, a, b).detach())


def test_pairs_do_not_depend_on_how_they_are_split(model: Frozen, monkeypatch: pytest.MonkeyPatch):
    lr_a, lr_b = (torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True))
    together = toy_model.train(model, "adam", lr_a, lr_b, steps=5, batch=16, seed=0)
    monkeypatch.setattr(toy_model, "ELEMENTS", 1)
    parts: list[tuple[int, int]] = []
    alone = toy_model.train(
        model, "adam", lr_a, lr_b, steps=5, batch=16, seed=0, on_part=lambda *part: parts.append(part)
    )
    torch.testing.assert_close(alone.test, together.test)
    assert parts == [(1, 3), (2, 3), (3, 3)]


def test_rates_that_are_far_too_high_give_an_infinite_loss(model: Frozen):
    rate = torch.tensor([1e200], dtype=torch.float64)
    assert toy_model.train(model, "sgd", rate, rate, steps=3, batch=16, seed=0).test.tolist() == [math.inf]


def test_the_deltas_sum_to_the_whole_change_and_are_those_of_movement(model: Frozen):
    before = random_factors(model, 2)
    after = Factors(before.a + 0.05 * torch.randn_like(before.a), before.b + 0.2 * torch.randn_like(before.b))
    d1, d2, d3 = toy_model.changes(before, after, model.test_features)

    def output(factors: Factors) -> torch.Tensor:
        return toy_model.SCALING * factors.b @ factors.a @ model.test_features.T

    torch.testing.assert_close(d1 + d2 + d3, output(after) - output(before))

    a, b = nn.Linear(WIDTH, toy_model.RANK, bias=False), nn.Linear(toy_model.RANK, WIDTH, bias=False)
    layer = AdaptedLayer("toy", nn.Identity(), a, b, toy_model.SCALING)
    for weight, value in zip(layer.weights, (before.a[1], before.b[1]), strict=True):
        weight.data = value
    sample = Sample(model.test_features[:TOKENS], Size(torch.tensor(1.0), 1.0))
    moved = movement(layer, sample, after.a[1] - before.a[1], after.b[1] - before.b[1])
    measured = measure(model, before, after)[1]
    assert [measured[delta] for delta in DELTAS] == pytest.approx([moved.delta1, moved.delta2, moved.delta3], rel=1e-3)
    assert measured["delta1"] == pytest.approx(rms(d1[1][:, :TOKENS]), rel=1e-3)


def searched(loss) -> dict[Block, dict]:
    """The losses of all blocks that a search around (0, 0) wants."""
    losses: dict[Block, dict] = {}
    while blocks := BlockGrid((0, 0)).next(losses):
        losses |= {block: {point: loss(point) for point in block.points} for block in blocks}
    return losses


def bowl(at: tuple[float, float]):
    return lambda point: 1 + (point[0] - at[0]) ** 2 + (point[1] - at[1]) ** 2


@pytest.mark.parametrize("at", [(0, 0), (6, -7), (-9, 1), (4, 4)])
def test_the_grid_is_extended_until_the_best_pair_and_the_best_tied_rate_are_inside(at):
    blocks = searched(bowl(at))
    losses = {point: loss for of_block in blocks.values() for point, loss in of_block.items()}
    assert best(losses) == at
    assert all((at[0] + da, at[1] + db) in losses for da in (-1, 0, 1) for db in (-1, 0, 1))
    tied = best(losses, lambda point: point[0] == point[1])
    assert {(tied[0] - 1,) * 2, (tied[0] + 1,) * 2} <= set(losses)
    points = [p for block in blocks if block.shape == "grid" for p in block.points]
    assert len(points) == len(set(points)), "no pair twice"


def test_the_grid_gives_up_where_there_is_no_best_pair():
    assert len(searched(lambda point: float(-point[0] - point[1]))) == 2 + 4 + 4


def test_an_exponent_is_that_of_the_power_law():
    widths = [64, 256, 1024]
    rows = [[math.log10(c * width**-0.5) for width in widths] for c in (1.0, 2.0, 3.0)]
    found = exponent(widths, rows)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))


@pytest.fixture(scope="module")
def small():
    experiment = Toy(seeds=2, widths=(16, 32), map_width=24, steps=30)
    results = {}
    while runs := experiment.next_runs(results):
        results |= {run.key: experiment.run(run, lambda *_, **__: None) for run in runs}
    return experiment, results


def test_the_toy_experiment_from_first_run_to_report(small):
    experiment, results = small
    figures = experiment.figures(results)
    assert set(figures) == {"adam/small", "adam/standard", "sgd/small", "sgd/standard"}
    for family in FAMILIES:
        found = figures[f"{family.optimizer}/{family.readout}"]
        for at in (*found["widths"].values(), found["map"]):
            judged = at["tied_over_best"]
            assert 0 < judged["seeds"] <= 2 and judged["low"] <= judged["mean"] <= judged["high"]
        exponents = found["exponents"]
        difference = exponents["lr_b"]["mean"] - exponents["lr_a"]["mean"]
        assert exponents["lr_ratio"]["mean"] == pytest.approx(difference)
    report = experiment.report(results, figures)
    assert len(report.verdict) == len(FAMILIES)
    assert len(report.figures) == len(FAMILIES) + 2


def test_a_pair_that_diverges_on_the_seed_it_is_judged_on_is_counted():
    pair, tied, other = (0, 2), (1, 1), (0, 0)
    calm = {pair: 1.0, tied: 2.0, other: 3.0}
    found = _tied_over_best([calm, calm, calm | {pair: math.inf}])
    # The first two seeds' choices are made with the third's, where the pair is infinite: the tied rate wins there.
    assert (found["seeds"], found["diverged"]) == (2, {"pair": 1, "tied": 0})
    assert found["mean"] == pytest.approx(1.0)
    assert "2 seeds; the choice diverged for the pair on 1 more" in _factor(found)
    lost = dict.fromkeys(calm, math.inf)
    assert _tied_over_best([lost])["seeds"] == 0 and "diverged on every seed" in _factor(_tied_over_best([lost]))


def test_one_seed_has_no_interval_and_is_drawn(tmp_path):
    experiment = Toy(seeds=1, widths=(16, 32), map_width=24, steps=5)
    results = {}
    while runs := experiment.next_runs(results):
        results |= {run.key: experiment.run(run, lambda *_, **__: None) for run in runs}
    report = experiment.report(results, experiment.figures(results))
    for figure in report.figures:
        (tmp_path / f"{figure.name}.png").write_bytes(draw(figure))
    lines = [
        series
        for figure in report.figures
        for plot in figure.plots
        if isinstance(plot, LinePlot)
        for series in plot.series
    ]
    assert lines and not any(len(series.low) for series in lines)


def test_what_comes_next_does_not_depend_on_the_order_in_which_runs_finish(small):
    experiment, results = small
    planned = set()
    done: dict = {}
    while runs := experiment.next_runs(done):
        planned |= {run.key for run in runs}
        last = runs[-1].key  # one run at a time, the last first: seeds of one block apart
        done[last] = results[last]
    assert planned == set(done) == set(results)
    assert any(run.key.count("grid") and run["a_to"] - run["a_from"] < 8 for run in (r.trial for r in results.values()))


def test_a_run_of_the_toy_depends_on_its_seed_and_nothing_else(small):
    experiment, results = small
    run = next(iter(results.values())).trial
    assert experiment.run(run, lambda *_, **__: None).rows == results[run.key].rows
    assert (
        Toy(seeds=2, widths=(16,), map_width=24, steps=30).run(run, lambda *_, **__: None).rows == results[run.key].rows
    )


def test_a_step_of_the_batch_starts_with_no_movement_of_a(model: Frozen):
    """B = 0: the first step moves B alone."""
    factors = Factors.at_start(model, 1)
    _, by_a, by_b = toy_model.gradients(model, factors, model.features, model.targets)
    assert by_a.abs().max() == 0 < by_b.abs().max()


def test_the_coordinates_from_first_run_to_report():
    experiment = Coordinates(seeds=2, widths=(32, 128, 512), steps=50)
    results = {run.key: experiment.run(run, lambda *_, **__: None) for run in experiment.next_runs({})}
    assert experiment.next_runs(results) == []
    figures = experiment.figures(results)
    first = {name: found["exponents"]["2"] for name, found in figures.items()}
    # The exponents that follow from counting, at the first step in which A moves: δ1 = n·η_A·η_B, δ2 = η_B.
    assert first["tied-by-n"]["delta1"]["mean"] == pytest.approx(-1, abs=0.3)
    assert first["tied"]["delta1"]["mean"] == pytest.approx(1, abs=0.3)
    assert first["loraplus"]["delta1"]["mean"] == pytest.approx(0, abs=0.3)
    assert not figures["tied"]["met"] and not figures["tied-by-n"]["met"]
    assert len(experiment.report(results, figures).verdict) == 4


def test_rates_by_name_meet_at_width_64():
    found = rates_tried(64)
    assert found["tied"] == found["tied-by-n"]
    assert found["loraplus"][0] == found["tied"][0]
    assert Block("diagonal", -1, 1, -1, 1).points == [(-1, -1), (0, 0), (1, 1)]
    assert rates((-2, 1)) == pytest.approx((0.1, 10**0.5))
