"""Arms train on the same examples, and differ in what they say they differ in."""

from __future__ import annotations

import pytest
import torch

from loraplus.bench.arms import DEFAULTS, TRL, ablation_of, arms_of, trainer_of
from loraplus.bench.gradients import gradient_errors
from loraplus.roles import Role
from loraplus.speed import LEVERS
from loraplus.tasks.config import TaskConfig

CLASSIFY, LANGUAGE = arms_of("classification"), arms_of("lm")


def read(trainer):
    """Tokens of every example of a pass, whatever row they are packed into."""
    found = []
    for batch in trainer.get_train_dataloader():
        found += batch["input_ids"].flatten().tolist()
    return sorted(token for token in found if token != trainer.processing_class_pad)


def tokens_of(trainer, pad):
    trainer.processing_class_pad = pad
    return read(trainer)


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_every_arm_reads_the_tokens_of_the_same_examples(kind, request, asked, tmp_path):
    prepared = request.getfixturevalue(kind)
    pad = prepared.tokenizer.pad_token_id
    wanted = sorted(token for row in prepared.rows(grouped=True) for token in row["input_ids"] if token != pad)
    for arm in CLASSIFY if kind == "classifier" else LANGUAGE:
        assert tokens_of(trainer_of(arm, prepared, str(tmp_path)), pad) == wanted, arm.name


def test_grouped_arms_have_the_batches_of_length_grouping(classifier, tmp_path):
    trainer = trainer_of(CLASSIFY[1], classifier, str(tmp_path))
    sizes = [batch["attention_mask"].sum(1) for batch in trainer.get_train_dataloader()]
    assert torch.cat(sizes).tolist() == classifier.lengths
    assert sum(int(s.max()) * len(s) for s in sizes) < 1.2 * classifier.tokens


def test_the_defaults_drop_out_and_the_best_configuration_does_not(folder_of, reviews_csv, tmp_path):
    from conftest import tiny_config
    from transformers import BertForSequenceClassification

    from loraplus.bench.prepared import prepare

    config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    folder = folder_of(BertForSequenceClassification(config))
    prepared = prepare(TaskConfig(model=str(folder), data=str(reviews_csv), batch_size=16, rank=2), batches=2)
    for arm, differs in ((CLASSIFY[0], True), (CLASSIFY[1], False)):
        trainer = trainer_of(arm, prepared, str(tmp_path))
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        first, second = (trainer.model(**batch).loss.item() for _ in range(2))
        assert (first != second) is differs
        dropouts = {m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in n}
        assert dropouts == ({0.05} if arm.side == DEFAULTS else set())


def test_ours_has_the_rates_of_train_and_the_levers_that_were_asked_for(classifier, asked, tmp_path):
    trainer = trainer_of(CLASSIFY[2], classifier, str(tmp_path))
    trainer.create_optimizer()
    rates = {role: group["lr"] for group in trainer.optimizer.param_groups for role in [group["name"]]}
    assert rates[Role.B.value] == pytest.approx(16 * rates[Role.A.value])
    assert asked.levers == [LEVERS]
    for arm in ablation_of(("adapters", "loss")):
        trainer_of(arm, classifier, str(tmp_path))
    assert asked.levers[1:] == [(), ("adapters",), ("loss",), ("loss",), ("adapters",), LEVERS]


def test_gradients_are_held_against_float64(classifier, asked, tmp_path):
    arms = [CLASSIFY[1], CLASSIFY[2]]
    errors = gradient_errors(classifier, arms[0], arms, str(tmp_path))
    assert all(1e-9 < error < 1e-5 for error in errors.values())

    def off(model):
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.register_hook(lambda gradient: gradient * 1.001)

    asked.does = off
    wrong = gradient_errors(classifier, arms[0], arms, str(tmp_path))
    assert wrong[arms[0].name] == errors[arms[0].name] and wrong[arms[1].name] > 1e-5


def test_trl_without_padding_has_the_texts_a_step_of_the_others(decoder, tmp_path):
    packed = next(arm for arm in LANGUAGE if arm.packed)
    assert packed.stack == TRL
    trainer = trainer_of(packed, decoder, str(tmp_path))
    batches = list(trainer.get_train_dataloader())
    assert all(batch["input_ids"].shape[0] == 1 for batch in batches)
    assert abs(len(batches) - decoder.steps) <= 1
