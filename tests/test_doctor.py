"""`loraplus.doctor` from Python: on PEFT with Trainer, TRL, Accelerate and loops; what it finds and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from torch import nn
from torch.optim import lr_scheduler
from transformers import Trainer, TrainingArguments

import loraplus
from loraplus.cli.main import main
from loraplus.diagnosis.diagnosis import Diagnosis

DATA = [{"input_ids": list(range(8)), "labels": index % 2} for index in range(8)]


def adapted(**options):
    return get_peft_model(tiny_bert(), LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options}))


def trainer(folder, model=None, cls=Trainer, args=TrainingArguments, **options):
    arguments = args(
        str(folder), max_steps=2, learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True, save_steps=2,
        per_device_train_batch_size=2, weight_decay=0.1,
    )  # fmt: skip
    return cls(model=model or adapted(), args=arguments, train_dataset=DATA, **options)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer):
    model(input_ids=torch.arange(16).reshape(2, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_right_run_is_right_and_the_table_says_what_every_step_has():
    model = adapted(modules_to_save=["classifier"])
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16, weight_decay=0.1)
    found = loraplus.doctor(optimizer, model, lr_ratio=16)
    assert found.ok and found.problems == () and found.lr_ratio == 16
    assert found.verdict == "right: B learns 16 times as fast as A in all 4 pairs"
    rates = {entry.role: (entry.lr, entry.step_lr, entry.weight_decay) for entry in found.entries}
    assert rates["lora_A"] == (1e-3, 1e-3, 0.1) and rates["lora_B"] == (16e-3, 16e-3, 0.1)
    assert all(entry.measured for entry in found.entries) and len(found.entries) == 10
    lines = str(found).splitlines()
    assert lines[2].split("  ")[0] == "group" and lines[-1] == found.verdict
    assert Diagnosis.from_dict(found.to_dict()) == found


def test_asking_leaves_optimizer_model_and_random_state_alone():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    step(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    loraplus.doctor(optimizer, model)
    after = (model.state_dict(), optimizer.state_dict()), torch.get_rng_state()
    assert str(before[0]) == str(after[0]) and torch.equal(before[1], after[1])


def test_plain_lora_is_said_and_off_only_where_a_ratio_is_expected():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    plain, asked = loraplus.doctor(optimizer, model), loraplus.doctor(optimizer, model, lr_ratio=16)
    assert plain.ok and plain.verdict == "plain LoRA: B learns at A's rate in all 4 pairs"
    assert not asked.ok and "A and B are in one group of AdamW (group 0)" in asked.problems[0]


class OneRate(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=self.defaults["lr"])


def by_factor(model, cls=torch.optim.SGD, **options):
    a, b = ([p for name, p in model.named_parameters() if part in name] for part in ("lora_A", "lora_B"))
    return cls([{"params": a, "lr": 1e-3}, {"params": b, "lr": 16e-3}], lr=1e-3, **options)


def flattened_by_hand(model):
    optimizer = by_factor(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # notes the rates that the groups were built with
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    return optimizer, scheduler


def one_memory(model):
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.lora_B.default.weight = nn.Parameter(layer.lora_A.default.weight.detach().view(-1)[:64].view(16, 4))
    return by_factor(model)


def in_two_groups(model):
    optimizer = by_factor(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": optimizer.param_groups[1]["params"][:1]})
    return optimizer


OFF = {
    "an optimizer that ignores its groups": (lambda m: by_factor(m, OneRate), "OneRate does not follow the rates"),
    "flattened by hand": (flattened_by_hand, "λ is 1 and should be 16, as it was built, in 4 of 4 pairs"),
    "a scheduler that will": (
        lambda m: (o := by_factor(m), lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-4)),
        "CosineAnnealingLR(eta_min=0.0001) changes λ as it goes",
    ),
    "a parameter that no optimizer holds": (
        lambda m: torch.optim.SGD(trained(m)[1:], lr=1e-3),
        "1 of 8 trainable parameters are in no optimizer",
    ),
    "A and B swapped": (
        lambda m: torch.optim.SGD([{"params": [p], "lr": 0.1 if "lora_A" in n else 0.01}
                                   for n, p in m.named_parameters() if p.requires_grad]),
        "B learns slower than A in 4 pairs",
    ),
    "one pair of four left at A's rate": (
        lambda m: torch.optim.SGD([{"params": [p], "lr": 0.16 if "lora_B" in n and "1" not in n else 0.01}
                                   for n, p in m.named_parameters() if p.requires_grad]),
        "in 2 of 4 pairs A and B share a rate",
    ),
    "parameters on one memory": (one_memory, "parameters on one memory learn at several rates"),
    "a parameter in two groups": (in_two_groups, "1 parameter in more than one group, so a step moves it as often"),
    "a rate of 0": (lambda m: torch.optim.SGD([{"params": trained(m), "lr": 0.0}]), "trainable parameters is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
@pytest.mark.filterwarnings("ignore")
def test_what_is_off_is_found(name):
    build, told = OFF[name]
    model = adapted()
    made = build(model)
    optimizer = made[0] if isinstance(made, tuple) else made
    found = loraplus.doctor(optimizer, model)
    assert not found.ok and told in " ".join(found.problems), found.problems


def test_what_pefts_rule_does_to_magnitudes_decay_and_embeddings_is_found():
    model = adapted(use_dora=True)
    found = loraplus.doctor(
        peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.1), model
    )
    assert "4 tensors of another kind (DoRA magnitude) learn at B's rate, 0.016" in found.problems[0]
    assert "weight decay 0.1 was given to AdamW and is left out of 8 of 8 factors" in found.problems[1]
    assert "2 of 4 groups of AdamW are empty" in found.notes[0]
    model = adapted(target_modules=["query", "word_embeddings"])
    found = loraplus.doctor(peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16), model)
    assert "2 tensors of embeddings learn at 1e-06" in found.problems[0]


def test_pefts_optimizer_on_linear_layers_is_right():
    model = adapted()
    found = loraplus.doctor(peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16))  # finds the model
    assert found.ok and found.lr_ratio == 16


def test_frozen_factors_are_told_from_ones_that_train():
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    found = loraplus.doctor(torch.optim.SGD(trained(model), lr=0.1), model)
    assert found.ok and "A is frozen in 4 of 4 pairs" in found.verdict
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    found = loraplus.doctor(torch.optim.SGD(trained(model), lr=0.1), model)
    assert found.verdict.startswith("wrong: no factor trains: 8 factors of the adapter are frozen")


def test_a_model_without_an_adapter_and_what_is_no_optimizer_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(loraplus.NoLoraFactorsError):
        loraplus.doctor(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(loraplus.TrainerSetupError, match="doctor takes a trainer or an optimizer, got int"):
        loraplus.doctor(1, model)


def test_a_trainer_before_and_after_training(tmp_path):
    attached = loraplus.attach(trainer(tmp_path), lr_ratio=8)
    before = loraplus.doctor(attached)
    assert attached.optimizer is None and attached.lr_scheduler is None
    attached.train()
    after = loraplus.doctor(attached)
    for found in (before, after):
        assert found.ok and found.lr_ratio == 8
        assert {entry.weight_decay for entry in found.entries} == {0.1}
    again = loraplus.attach(trainer(tmp_path), lr_ratio=8)
    again.train()  # without having been asked
    for one, other in zip(attached.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_trainer_whose_ratio_is_overridden_by_its_own_create_optimizer(tmp_path):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(trained(self.model), lr=self.args.learning_rate)
            return self.optimizer

    own = trainer(tmp_path, cls=Own)
    own.args.loraplus_lr_ratio = 16.0
    found = loraplus.doctor(own)
    assert "should be 16, as the trainer says (loraplus_lr_ratio = 16)" in found.problems[0]
    assert "left out" not in " ".join(found.problems)  # AdamW's own decay is another number, and decays


def test_a_hook_of_a_trainer_that_nothing_calls_is_named(tmp_path):
    class Own(Trainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            self.optimizer = by_factor(self.model)

    class Calls(Own):
        def create_optimizer(self, model=None):
            self.create_optimizer_and_scheduler(2)
            return self.optimizer

    own, calls = (loraplus.doctor(trainer(tmp_path, cls=cls)) for cls in (Own, Calls))
    assert own.lr_ratio == 1 and "Own.create_optimizer_and_scheduler is never called" in own.problems[0]
    assert calls.lr_ratio == 16 and "never called" not in " ".join(calls.problems)


def test_a_ratio_in_optim_args_is_what_a_trainer_should_have(tmp_path):
    plain = trainer(tmp_path)
    plain.args.optim_args = "ratio=16"
    assert "should be 16, as the trainer says" in loraplus.doctor(plain).problems[0]
    assert loraplus.doctor(loraplus.attach(plain)).ok


def test_the_decay_of_a_heads_own_optimizer_is_not_asked_of_the_factors():
    model = adapted(modules_to_save=["classifier"])
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    heads = torch.optim.SGD(head, lr=0.1, weight_decay=0.1)
    assert loraplus.doctor([by_factor(model), heads], model).problems == ()


def test_trls_trainer(tmp_path, decoder_folder):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = trl.SFTConfig(
        str(tmp_path), learning_rate=1e-3, max_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
    )
    data = datasets.Dataset.from_list([{"text": "grass is green"}] * 4)
    sft = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(decoder_folder), args, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(decoder_folder), peft_config=LoraConfig(r=2),
    )  # fmt: skip
    assert loraplus.doctor(sft).lr_ratio == 1
    loraplus.attach(sft, lr_ratio=16)
    assert loraplus.doctor(sft).lr_ratio == 16


def test_accelerates_wrapper_and_automatic_rates():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=4)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    assert loraplus.doctor(optimizer, model).lr_ratio == 4


@pytest.mark.parametrize("kind", ["plain", "attached", "peft"])
def test_a_checkpoint(kind, tmp_path):
    model = adapted()
    options = {}
    if kind == "peft":
        options["optimizers"] = peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16), None
    run = trainer(tmp_path, model, **options)
    (loraplus.attach(run, lr_ratio=16) if kind == "attached" else run).train()

    from loraplus.diagnosis.checkpoint import diagnose_checkpoint

    folder = str(tmp_path / "checkpoint-2")
    found = diagnose_checkpoint(folder)
    assert found.ok and found.lr_ratio == (1 if kind == "plain" else 16)
    assert {entry.step_lr for entry in found.entries} == {1e-3, 1e-3 * found.lr_ratio}
    assert not any(entry.measured for entry in found.entries)
    if kind == "plain":
        asked = diagnose_checkpoint(folder, lr_ratio=16)
        assert "should be 16, as was asked for, in 4 of 4 pairs" in asked.problems[0]
        assert "A and B are in one group (group 0)" in asked.problems[0]
        for arguments, code in (["doctor", folder], 0), (["doctor", folder, "--lr-ratio", "16"], 1):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == code
        (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
        with pytest.raises(loraplus.InputError, match="no optimizer in it"):
            diagnose_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({"use_dora": True}, "4 tensors of another kind (DoRA magnitude) learn at B's rate, 0.016"),
        (
            {"target_modules": ["query", "word_embeddings"], "rank_pattern": {"word_embeddings": 2}},
            "2 tensors of embeddings learn at 1e-06",
        ),
    ],
)
def test_what_pefts_rule_did_to_what_is_no_factor_is_off_in_a_checkpoint_as_in_a_run(options, off, tmp_path):
    from loraplus.diagnosis.checkpoint import diagnose_checkpoint

    for kind in ("peft", "attached"):
        model = adapted(**options)
        own = peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
        run = trainer(tmp_path / kind, model, **({"optimizers": (own, None)} if kind == "peft" else {}))
        (loraplus.attach(run, lr_ratio=16) if kind == "attached" else run).train()
        found = diagnose_checkpoint(str(tmp_path / kind / "checkpoint-2"))
        assert found.lr_ratio == 16 and found.ok == (kind == "attached")
        assert off in " ".join(found.problems) or kind == "attached"


def test_a_checkpoint_whose_shapes_do_not_tell_a_from_b_is_neither_right_nor_wrong(tmp_path):
    from loraplus.diagnosis.checkpoint import diagnose_checkpoint

    model = adapted(target_modules=["query", "word_embeddings"])  # an embedding's B has the shape of a layer's
    own = peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    trainer(tmp_path, model, optimizers=(own, None)).train()
    folder = str(tmp_path / "checkpoint-2")
    assert diagnose_checkpoint(folder).verdict == "λ is not known in 2 pairs"
    with pytest.raises(loraplus.InputError, match="do not tell A from B, so λ is not known; run the script itself"):
        diagnose_checkpoint(folder, lr_ratio=16)
