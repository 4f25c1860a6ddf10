"""What the further arms of a comparison train with: one tied rate, Prodigy by role, schedule-free AdamW."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from prodigyopt import Prodigy

from loraplus.steps.movement import adapted_layers
from loraplus.study.arms import ALL
from loraplus.study.trial import _trainer
from loraplus.tasks import methods
from loraplus.tasks.classification import load_classification
from loraplus.tasks.config import CompareConfig
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import load_tokenizer
from loraplus.tasks.prodigy import SplitProdigy
from loraplus.variants.maximal_update import tied_rate


def adapted(rank=2, alpha=4.0, width=16, rslora=False, targets=("query", "value")):
    model = tiny_bert() if width == 16 else torch.nn.Sequential(torch.nn.Linear(width, width))
    targets = list(targets) if width == 16 else ["0"]
    return get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=rslora),  # type: ignore[arg-type]
    )


def test_the_tied_rate_is_the_usual_one_at_the_reference_point():
    assert tied_rate(adapted(rank=8, alpha=16, width=768)) == pytest.approx(3e-4)


def test_the_tied_rate_does_not_hang_on_the_rank_at_constant_alpha():
    assert tied_rate(adapted(2, 16)) == pytest.approx(tied_rate(adapted(8, 16)))


def test_the_tied_rate_falls_as_the_root_of_the_rank_at_alpha_equal_to_it():
    assert tied_rate(adapted(2, 2)) == pytest.approx(2 * tied_rate(adapted(8, 8)))


def test_the_tied_rate_knows_rslora_and_falls_as_the_root_of_the_width():
    usual, rslora = tied_rate(adapted(4, 16)), tied_rate(adapted(4, 16, rslora=True))
    assert usual == pytest.approx(rslora * 4**0.25)
    assert tied_rate(adapted(4, 16, width=64)) == pytest.approx(usual / 2)


def test_layers_of_different_widths_count_by_the_geometric_mean():
    narrow, both = adapted(2, 4), adapted(2, 4, targets=("intermediate.dense", "output.dense"))
    widths = [layer.weights[0].shape[1] for layer in adapted_layers(both)]
    mean = torch.tensor(widths, dtype=torch.float64).log().mean().exp().item()
    assert tied_rate(both) == pytest.approx(tied_rate(narrow) * (16 / mean) ** 0.5)


def factors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(3, 8, generator=g)), torch.nn.Parameter(torch.zeros(8, 3)),
        torch.nn.Parameter(torch.randn(8, 2, generator=g)), torch.nn.Parameter(torch.zeros(2)),
    ]  # fmt: skip


NAMES = ("lora_A", "lora_B", "head", "head_no_decay")


def train(parameters, optimizers, steps=60):
    g = torch.Generator().manual_seed(1)
    a, b, head, bias = parameters
    for _ in range(steps):
        x = torch.randn(16, 8, generator=g)
        loss = torch.nn.functional.cross_entropy((x + x @ a.T @ b.T) @ head + bias, (x[:, 0] > 0).long())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def groups_of(parameters):
    return [{"params": [p], "name": name} for p, name in zip(parameters, NAMES, strict=True)]


def test_a_and_b_get_estimates_of_their_own_and_the_parts_of_the_head_share_one():
    parameters = factors()
    optimizer = SplitProdigy(groups_of(parameters), lr=1.0)
    train(parameters, [optimizer])
    d = {group["name"]: group["d"] for group in optimizer.param_groups}
    assert len({d["lora_A"], d["lora_B"], d["head"]}) == 3
    assert d["head"] == d["head_no_decay"]
    assert min(d.values()) > 1e-6  # all have left their start
    together = Prodigy([{**group, "params": [p]} for group, p in zip(groups_of(factors()), factors(), strict=True)])
    assert len({group["d"] for group in together.param_groups}) == 1


def test_it_is_one_prodigy_for_each_role_bit_for_bit():
    split, apart = factors(), factors()
    train(split, [SplitProdigy(groups_of(split), safeguard_warmup=True)])
    a, b, *head = apart
    train(apart, [Prodigy(part, safeguard_warmup=True) for part in ([a], [b], head)])
    assert all(torch.equal(one, other) for one, other in zip(split, apart, strict=True))


def test_its_estimates_are_part_of_its_state():
    parameters = factors()
    optimizer = SplitProdigy(groups_of(parameters))
    train(parameters, [optimizer], steps=30)
    again = SplitProdigy(groups_of([torch.nn.Parameter(p.detach().clone()) for p in parameters]))
    again.load_state_dict(optimizer.state_dict())
    assert [group["d"] for group in again.param_groups] == [group["d"] for group in optimizer.param_groups]
    assert methods.rates_arrived_at(again) == tuple(group["d"] for group in optimizer.param_groups[:2])


@pytest.fixture
def trainer_of(tmp_path, model_folder, reviews_csv):
    def build(arm, lr=1e-3, lr_ratio=4.0, **settings):
        config = CompareConfig(
            model=str(model_folder), data=str(reviews_csv), output=str(tmp_path), max_steps=20, eval_steps=5,
            batch_size=16, rank=2, **settings,
        )  # fmt: skip
        tokenizer = load_tokenizer(config)
        data = load_classification(config, tokenizer)
        model = load_classifier(config, data.label_names, tokenizer, 0)
        method = ALL[arm].method(config, lr, lr_ratio, model, 20)
        return _trainer(config, method, data, model, tokenizer, seed=0, output=str(tmp_path))

    return build


def averaged(optimizer):
    return {group["train_mode"] for group in optimizer.param_groups} == {False}


def test_schedule_free_is_evaluated_at_the_average_and_trained_elsewhere(trainer_of):
    trainer = trainer_of("schedulefree")
    in_evaluation, in_training = [], []
    evaluate, train_step = trainer.evaluation_loop, trainer.training_step

    def evaluation_loop(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        in_evaluation.append(averaged(trainer.optimizer))
        return output

    def training_step(*args, **kwargs):
        loss = train_step(*args, **kwargs)
        in_training.append(averaged(trainer.optimizer))
        return loss

    trainer.evaluation_loop, trainer.training_step = evaluation_loop, training_step
    trainer.train()
    assert (in_evaluation, in_training) == ([True] * 4, [False] * 20)
    tested = trainer.predict(trainer.eval_dataset).metrics["test_loss"]
    assert tested == pytest.approx(trainer.state.log_history[-2]["eval_loss"])
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    average = [p.detach().clone() for p in parameters]
    trainer.optimizer.train()
    assert not all(torch.equal(p, x) for p, x in zip(parameters, average, strict=True))


def test_schedule_free_keeps_its_rate_and_warms_up_by_itself(trainer_of):
    trainer = trainer_of("schedulefree", warmup_ratio=0.2, lr_scheduler_type="cosine")
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert (groups["lora_A"]["lr"], groups["lora_B"]["lr"], groups["head"]["lr"]) == (1e-3, 4e-3, 2e-3)
    assert groups["lora_A"]["warmup_steps"] == 4
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert {row["lr/lora_B"] for row in rows} == {4e-3}


def test_prodigy_in_a_run_moves_its_estimates_with_the_schedule_of_all_arms(trainer_of):
    trainer = trainer_of("prodigy")
    trainer.train()
    lr_a, lr_b = methods.rates_arrived_at(trainer.optimizer)
    assert lr_b > 1e-6 and lr_a != lr_b
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1.0}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # at the end of the decay


def test_the_rates_that_a_run_came_to_are_read_off_without_the_schedule(trainer_of):
    trainer = trainer_of("auto")
    trainer.train()
    assert methods.rates_arrived_at(trainer.optimizer) == (trainer.loraplus_auto.lr_a, trainer.loraplus_auto.lr_b)
    trainer = trainer_of("mua")
    trainer.create_optimizer()
    rate = tied_rate(trainer.model)
    assert methods.rates_arrived_at(trainer.optimizer) == (rate, rate)
    assert methods.rates_arrived_at(torch.optim.SGD([{"params": factors(), "name": "other"}], 0.1)) is None


def start_and_order(trainer):
    start = [p.detach().clone() for p in trainer.model.parameters()]
    seen, train_step = [], trainer.training_step

    def training_step(model, inputs, *args):
        seen.append(inputs["input_ids"])
        return train_step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    return start, seen


def test_every_arm_starts_from_the_same_weights_and_sees_the_same_batches(trainer_of):
    start, seen = start_and_order(trainer_of("lora", lr_ratio=1.0))
    for arm in list(ALL)[1:]:
        other_start, other_seen = start_and_order(trainer_of(arm))
        assert all(torch.equal(p, q) for p, q in zip(start, other_start, strict=True)), arm
        assert all(torch.equal(x, y) for x, y in zip(seen, other_seen, strict=True)), arm
