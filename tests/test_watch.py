"""Nothing takes the groups away from their ratios unseen: what is told, by whom it was done, and what says nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch._dynamo.testing
import transformers
from test_groups import adapted as with_head
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

import loraplus
from loraplus.watching.watch import RateWatch, watch_rates

LR, RATIO, STEPS = 1e-3, 16.0, 12


def adapted(**options):
    """A BERT with adapters and nothing else to train: two groups."""
    return with_head(modules_to_save=None, **options)


def made(model=None, cls=torch.optim.AdamW, **options):
    return loraplus.create_optimizer(model or adapted(), cls, lr=LR, lr_ratio=RATIO, **options)


def stepped(optimizer, scheduler=None, steps=STEPS, between=None):
    """Takes steps as a loop does; what loraplus warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if between is not None:
                between(step)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if isinstance(scheduler, schedules.ReduceLROnPlateau):
                scheduler.step(1.0)
            elif scheduler is not None:
                scheduler.step()
    return [str(entry.message) for entry in caught if issubclass(entry.category, loraplus.LoraPlusWarning)]


FLATTEN = {
    "OneCycleLR": (lambda o: schedules.OneCycleLR(o, 1e-3, total_steps=20), 1, "max_lr=[0.001, 0.016]"),
    "CyclicLR": (
        lambda o: schedules.CyclicLR(o, 1e-4, 1e-3, cycle_momentum=False), 1,
        "base_lr=[0.0001, 0.0016], max_lr=[0.001, 0.016]",
    ),
    "SWALR": (lambda o: SWALR(o, 1e-4, anneal_epochs=3), 2, "swa_lr=[0.0001, 0.0016]"),
    "ReduceLROnPlateau": (
        lambda o: schedules.ReduceLROnPlateau(o, patience=0, min_lr=5e-4), 3, "min_lr=[0.0005, 0.008]"
    ),
    "CosineAnnealingLR": (lambda o: schedules.CosineAnnealingLR(o, 10, eta_min=1e-4), 2, "min_lr_rate=0.1"),
    "CosineAnnealingWarmRestarts": (
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 5, eta_min=1e-4), 2, "min_lr_rate=0.1"
    ),
    "LambdaLR": (lambda o: schedules.LambdaLR(o, [lambda e: 1.0, lambda e: 1 / (1 + e)]), 2, "lambdas differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLATTEN)
def test_a_schedule_that_flattens_the_ratio_is_told_once_with_its_step_and_what_to_give_it(name):
    make, step, advice = FLATTEN[name]
    optimizer = made()
    scheduler = make(optimizer)
    (told,) = stepped(optimizer, scheduler)
    assert told.startswith(f"at step {step}, lora_B is at ") and "built with 16" in told
    assert f"{name}" in told and advice in told


def test_the_numbers_of_the_advice_keep_the_ratio():
    for name, arguments in (
        ("OneCycleLR", {"max_lr": [1e-3, 16e-3], "total_steps": 20}),
        ("CyclicLR", {"base_lr": [1e-4, 16e-4], "max_lr": [1e-3, 16e-3], "cycle_momentum": False}),
        ("ReduceLROnPlateau", {"min_lr": [5e-4, 8e-3], "patience": 0}),
    ):
        optimizer = made()
        assert stepped(optimizer, getattr(schedules, name)(optimizer, **arguments)) == [], name
    optimizer = made()
    assert stepped(optimizer, SWALR(optimizer, [1e-4, 16e-4])) == []
    optimizer = made()
    rate = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, STEPS, min_lr_rate=0.1)
    assert stepped(optimizer, rate) == []


KEEP = {
    "warm-up by lambda": lambda o: schedules.LambdaLR(o, lambda e: min(1.0, e / 5)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda e: 0.9),
    "steps": lambda o: schedules.StepLR(o, 3),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.8),
    "cosine to 0": lambda o: schedules.CosineAnnealingLR(o, 5),
    "linear": lambda o: schedules.LinearLR(o, 0.01),
    "polynomial": lambda o: schedules.PolynomialLR(o, 8),
    "warm-up, then cosine": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 8)], [4]
    ),
    "plateau down to its eps": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "transformers, linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 3, STEPS),
    "transformers, cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 3, STEPS),
    "transformers, restarts": lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 3, STEPS, 2),
    "transformers, polynomial": lambda o: transformers.get_polynomial_decay_schedule_with_warmup(
        o, 3, STEPS, lr_end=1e-4
    ),
    "transformers, inverse root": lambda o: transformers.get_inverse_sqrt_schedule(o, 3),
}


@pytest.mark.parametrize("name", KEEP)
def test_a_schedule_that_multiplies_says_nothing(name):
    optimizer = made()
    assert stepped(optimizer, KEEP[name](optimizer)) == []


@pytest.mark.parametrize(
    "schedule", [None, lambda o: schedules.LambdaLR(o, lambda e: 1.0), schedules.ReduceLROnPlateau]
)
def test_a_rate_written_by_hand_is_told_whatever_scheduler_is_there(schedule):
    optimizer = made()

    def write(step):
        if step == 4:
            for group in optimizer.param_groups:
                group["lr"] = 3e-4

    (told,) = stepped(optimizer, schedule and schedule(optimizer), between=write)
    assert "at step 5, lora_B is at 1 times" in told and "no scheduler did it" in told and "[1, 16]" in told


def test_rates_multiplied_by_hand_and_rates_of_zero_say_nothing():
    optimizer = made()

    def write(step):
        for group, factor in zip(optimizer.param_groups, (1, 16), strict=True):
            group["lr"] = factor * LR * min(1.0, step / 4)

    assert stepped(optimizer, between=write) == []


def test_a_scheduler_of_the_users_own_is_named():
    class Flat(schedules.LRScheduler):
        def get_lr(self):
            return [1e-3] * len(self.optimizer.param_groups)

    optimizer = made()
    (told,) = stepped(optimizer, Flat(optimizer))
    assert "Flat did it" in told


def test_one_of_two_schedulers_is_named_that_did_it():
    optimizer = made()
    innocent = schedules.LambdaLR(optimizer, lambda e: 1.0)
    guilty = schedules.CosineAnnealingLR(optimizer, 8, eta_min=1e-4)
    (told,) = stepped(optimizer, schedules.ChainedScheduler([innocent, guilty]))
    assert "CosineAnnealingLR(eta_min=0.0001)" in told


def test_every_group_is_held_to_its_own_relation():
    model = with_head()
    optimizer = made(model, lr_head=4e-3)

    def write(step):
        optimizer.param_groups[2]["lr"] = 1e-3

    (told,) = stepped(optimizer, between=write)
    assert "head is at 1 times the rate of lora_A and was built with 4" in told


def test_a_state_of_another_ratio_is_told_by_an_optimizer_without_a_guard():
    other = loraplus.create_optimizer(adapted(), torch.optim.AdamW, lr=LR, lr_ratio=2)
    optimizer = made()
    optimizer.load_state_dict(other.state_dict())
    (told,) = stepped(optimizer)
    assert "lora_B is at 2 times" in told and "load_state_dict did it" in told


def test_rates_in_tensors_are_read():
    optimizer = made(foreach=False, capturable=False)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    assert stepped(optimizer, schedules.ExponentialLR(optimizer, 0.9)) == []
    optimizer.param_groups[1]["lr"].fill_(1e-3)
    (told,) = stepped(optimizer)
    assert "lora_B is at" in told


def split_model():
    """Adapters on two layers, those of the first frozen; and its frozen factors."""
    model = adapted()
    frozen = [p for name, p in model.named_parameters() if ".layer.0." in name and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return model, frozen


def unfrozen(model, optimizer, groups):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    for group in groups:
        optimizer.add_param_group(group)


def test_b_that_is_added_at_as_rate_is_told_by_name():
    model, frozen = split_model()
    optimizer = made(model)
    assert stepped(optimizer) == []
    unfrozen(model, optimizer, [{"params": frozen, "lr": 1e-4}])
    (told,) = stepped(optimizer)
    assert told.startswith("at step 13") and "layer.0" in told and "lora_B" in told and "lora_A.default" not in told
    assert "came into group 2 at 1 times the rate of its A, 16 times elsewhere" in told


def test_groups_added_in_ratio_say_nothing():
    model, frozen = split_model()
    optimizer = made(model)
    assert stepped(optimizer) == []
    b = [p for p in frozen if p.shape[1] == 4]
    a = [p for p in frozen if p.shape[1] != 4]
    assert a and b
    unfrozen(model, optimizer, [{"params": a, "lr": 1e-4}, {"params": b, "lr": 16e-4}])
    assert stepped(optimizer) == []


def test_a_factor_that_is_unfrozen_and_in_no_group_is_told():
    model, _ = split_model()
    optimizer = made(model)
    unfrozen(model, optimizer, [])
    (told,) = stepped(optimizer)
    assert "is in no group, so it does not learn" in told and "layer.0" in told


def test_a_factor_that_is_moved_to_another_group_is_told():
    model = adapted()
    optimizer = made(model)
    a, b = optimizer.param_groups
    a["params"].append(b["params"].pop())
    (told,) = stepped(optimizer)
    assert "was moved from lora_B to lora_A" in told


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_the_watch_changes_no_weight_and_no_state(cls):
    ends = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = adapted()
        optimizer = made(model, cls)
        if not watched:
            optimizer.loraplus_watch.remove()
        scheduler = schedules.OneCycleLR(optimizer, 1e-3, total_steps=20, cycle_momentum=False)
        stepped(optimizer, scheduler)
        ends.append(([p.detach().clone() for p in model.parameters()], optimizer.state_dict()))
    (weights, state), (others, other) = ends
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert str(state) == str(other)


def test_a_copy_is_an_optimizer_without_a_watch():
    model = adapted()
    optimizer = made(model)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not hasattr(copied, "loraplus_watch")
        copied.step()
    inert = copy.deepcopy(optimizer.loraplus_watch)
    assert isinstance(inert, RateWatch) and not inert.on
    inert.look(optimizer)
    assert optimizer.loraplus_watch.on


def test_it_is_there_once_and_comes_back_after_being_taken_off():
    model = adapted()
    optimizer = made(model)
    watch = optimizer.loraplus_watch
    assert watch_rates(model, optimizer) is watch and len(optimizer._optimizer_load_state_dict_post_hooks) == 1
    watch.remove()
    optimizer.param_groups[1]["lr"] = LR
    assert stepped(optimizer) == [] and not optimizer._optimizer_load_state_dict_post_hooks
    optimizer.param_groups[1]["lr"] = LR * RATIO
    assert watch_rates(model, optimizer).on
    optimizer.param_groups[1]["lr"] = LR
    assert len(stepped(optimizer)) == 1


def test_it_keeps_neither_model_nor_optimizer_alive():
    model = adapted()
    optimizer = made(model)
    stepped(optimizer)
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model
    gc.collect()
    assert gone[0]() is None
    del optimizer
    gc.collect()
    assert gone[1]() is None


def test_a_compiled_step_is_compiled_as_without_it():
    counts = []
    for watched in (True, False):
        optimizer, counter = made(), torch._dynamo.testing.CompileCounter()
        if not watched:
            optimizer.loraplus_watch.remove()
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend=counter)
        for _ in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            step()
        counts.append((counter.frame_count, counter.op_count))
    assert counts[0] == counts[1] and counts[0][0]


@pytest.mark.parametrize("after", [False, True])
def test_automatic_rates_are_no_change_of_the_ratio(after):
    model = adapted()
    optimizer = made(model)
    if after:
        optimizer.loraplus_watch.remove()
    rates = loraplus.AutoRates(model, optimizer)
    watch_rates(model, optimizer)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", loraplus.LoraPlusWarning)
        for _ in range(6):
            model(input_ids=torch.randint(0, 64, (4, 8)), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            optimizer.step()
            scheduler.step()
    assert rates.lr_b > rates.lr_a > 0


def test_a_schedule_that_sets_one_rate_for_all_says_nothing_under_automatic_rates():
    model = with_head()
    optimizer = loraplus.create_optimizer(model, lr=1.0, lr_head=1e-3)
    rates = loraplus.AutoRates(model, optimizer)
    heads = [group["lr"] for group in optimizer.param_groups[2:]]
    scheduler = schedules.OneCycleLR(optimizer, max_lr=[1.0, 1.0, *heads], total_steps=20)
    ids = torch.arange(5, 35).reshape(3, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", loraplus.LoraPlusWarning)
        for _ in range(4):
            model(input_ids=ids, labels=torch.tensor([0, 1, 0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert rates.lr_b > 0


def test_two_optimizers_for_one_model_do_not_miss_each_others_factors():
    model = adapted()
    of_a, of_b = loraplus.param_groups(model, lr=LR)
    optimizers = [torch.optim.AdamW([of_a]), torch.optim.AdamW([of_b])]
    for optimizer in optimizers:
        watch_rates(model, optimizer)
    assert [stepped(optimizer) for optimizer in optimizers] == [[], []]


def test_a_plateau_that_leaves_out_small_changes_is_named_with_its_eps():
    optimizer = loraplus.create_optimizer(adapted(), lr=1e-7, lr_ratio=RATIO)
    (told,) = stepped(optimizer, schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5))
    assert "ReduceLROnPlateau did it" in told and "give it eps=0" in told


def test_an_optimizers_own_state_loaded_into_it_is_not_blamed():
    optimizer = made()
    scheduler = schedules.OneCycleLR(optimizer, 1e-3, total_steps=20)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does in `prepare`
    (told,) = stepped(optimizer, scheduler)
    assert "OneCycleLR did it" in told


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]])
def test_groups_in_another_order_say_nothing_until_one_is_off(order):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=1e-3, lr_ratio=16, lr_overrides={"value": 0.5})
    optimizer.param_groups[:] = [optimizer.param_groups[index] for index in order]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    off = next(group for group in optimizer.param_groups if group["name"] == "lora_B")
    off["lr"] *= 2
    with pytest.warns(loraplus.LoraPlusWarning, match="lora_B is at"):
        optimizer.step()


@pytest.fixture
def readings(monkeypatch):
    """How often a model is read, so far."""
    seen = []
    read = loraplus.roles._read
    monkeypatch.setattr("loraplus.roles._read", lambda model: seen.append(model) or read(model))
    return seen


def test_a_model_is_read_once_to_make_an_optimizer_and_once_to_prove_it(readings):
    model = adapted()
    optimizer = made(model)
    assert len(readings) == 1
    loraplus.verify(model, optimizer, lr_ratio=RATIO)
    assert len(readings) == 2
    loraplus.verify(model, optimizer, lr_ratio=RATIO, groups=[{"params": model.parameters(), "lr": LR}])
    assert len(readings) == 3
    loraplus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
    assert len(readings) == 4


def test_what_was_read_does_not_outlive_the_call():
    model, _ = split_model()
    before = len(loraplus.param_groups(model, lr=LR)[0]["params"])
    made(model)
    unfrozen(model, None, [])
    assert len(loraplus.param_groups(model, lr=LR)[0]["params"]) == 2 * before


def test_the_watch_reads_no_model_that_has_not_changed(readings):
    optimizer = made(adapted())
    stepped(optimizer, steps=210)
    assert len(readings) == 1


def late_adapter(model):
    model.add_adapter("late", model.peft_config["default"])
    model.base_model.set_adapter(["default", "late"])


def late_layer(model):
    linear = next(module for module in model.modules() if type(module) is torch.nn.Linear and module.out_features == 16)
    pair = {"lora_A": torch.nn.Linear(16, 4, bias=False), "lora_B": torch.nn.Linear(4, 16, bias=False)}
    for name, factor in pair.items():
        linear.add_module(name, torch.nn.ModuleDict({"default": factor}))


def late_unfreezing(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("late", [late_adapter, late_layer, late_unfreezing])
def test_factors_that_come_to_train_between_two_looks_are_told_at_the_next(late):
    model, _ = split_model()
    optimizer = made(model)
    told = stepped(optimizer, steps=120, between=lambda step: late(model) if step == 50 else None)
    assert len(told) == 1 and told[0].startswith("at step 101") and "is in no group" in told[0]


def test_factors_that_change_places_are_told_though_the_groups_keep_their_sizes():
    model = adapted()
    optimizer = made(model)

    def swap(step):
        a, b = (group["params"] for group in optimizer.param_groups)
        if step == 50:
            a[0], b[0] = b[0], a[0]

    (told,) = stepped(optimizer, steps=120, between=swap)
    assert told.startswith("at step 101") and "was moved from lora_B to lora_A" in told
