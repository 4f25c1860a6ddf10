"""Language models: the tokens that are learnt, what packing changes (the time only), and what a loss is the mean of."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from language import TEMPLATE, chat_rows, pair_rows, text_rows, tiny_llama, tiny_tokenizer, write_lines
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.tasks.checks import rates_of
from loraplus.tasks.config import CompareConfig, TrainConfig
from loraplus.tasks.language import LanguageModelling
from loraplus.tasks.packing import keeps_apart
from loraplus.tasks.training import build_trainer
from tasks.causal import save_llama

ROWS = {"messages": chat_rows(40), "pairs": pair_rows(40), "texts": text_rows(40)}


@pytest.fixture
def config(tmp_path, decoder_folder):
    data = write_lines(tmp_path / "data.jsonl", ROWS["messages"])
    return TrainConfig(
        task="sft", model=str(decoder_folder), data=str(data), output=str(tmp_path / "out"), max_steps=3, eval_steps=3,
        batch_size=8, rank=4, lr=1e-2,
    )  # fmt: skip


def with_rows(config, path, rows, **changes):
    return dataclasses.replace(config, data=str(write_lines(path / "rows.jsonl", rows)), **changes)


def data_of(config):
    task = LanguageModelling()
    return task.load_data(config, task.load_tokenizer(config))


def trainer_of(config):
    task = LanguageModelling()
    tokenizer = task.load_tokenizer(config)
    data = task.load_data(config, tokenizer)
    model = task.load_model(config, data, tokenizer, config.seed)
    rates = rates_of(config, config.lr, config.lr_ratio)
    return build_trainer(config, rates, data, model, tokenizer, seed=0, output=config.output, checkpoints=False), data


@pytest.mark.parametrize(
    ("kind", "on", "trl_options"),
    [
        ("messages", None, {}), ("messages", "assistant", {"assistant_only_loss": True}),
        ("pairs", None, {}), ("pairs", "all", {"completion_only_loss": False}), ("texts", None, {}),
    ],
)  # fmt: skip
def test_tokens_and_targets_are_those_of_sfttrainer(config, tmp_path, kind, on, trl_options):
    rows = ROWS[kind]
    config = with_rows(config, tmp_path, rows, loss_on=on)
    ours = data_of(config)
    args = SFTConfig(str(tmp_path / "trl"), max_length=128, bf16=False, use_cpu=True, report_to=[], **trl_options)
    tokenizer = LanguageModelling().load_tokenizer(config)
    theirs = SFTTrainer(
        tiny_llama(len(tokenizer)), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    wanted = {tuple(row["input_ids"]): row["labels"][1:] for row in theirs.train_dataset}
    found = {tuple(row["input_ids"]): row["labels"][1:] for split in (ours.train, ours.validation) for row in split}
    assert found == wanted
    targets = sum(label != -100 for labels in found.values() for label in labels)
    assert targets == ours.facts["train_target_tokens"] + ours.facts["validation_target_tokens"]


def test_a_tokenizer_that_ends_every_text_ends_it_once_and_no_prompt(config, tmp_path, decoder_folder):
    bare = {kind: data_of(with_rows(config, tmp_path, ROWS[kind])) for kind in ("pairs", "texts")}
    folder = shutil.copytree(decoder_folder, tmp_path / "ending")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    for kind, wanted in bare.items():
        data = data_of(with_rows(config, tmp_path, ROWS[kind], model=str(folder)))
        assert data.train[:] == wanted.train[:]
        assert data.encoder.prompt(data.held_out[0]) == wanted.encoder.prompt(wanted.held_out[0])


def test_samples_take_the_likeliest_token_whatever_the_model_would_do(config):
    trainer, data = trainer_of(config)
    task = LanguageModelling()
    tokenizer = task.load_tokenizer(config)
    plain = task.samples(2, trainer.model, data, tokenizer)
    trainer.model.generation_config.update(repetition_penalty=5.0)
    assert task.samples(2, trainer.model, data, tokenizer) == plain


def steps_of(config):
    trainer, _ = trainer_of(config)
    trainer.train()
    history = trainer.state.log_history
    return trainer, [(row["loss"], row["grad_norm"]) for row in history if "loss" in row], history[-2]["eval_loss"]


@pytest.mark.parametrize("kind", ["messages", "pairs"])
def test_packing_and_parts_change_no_loss_and_no_gradient(config, tmp_path, kind):
    config = with_rows(config, tmp_path, ROWS[kind], eval_steps=1, max_length=100, packing=True)
    packed, rows, loss = steps_of(config)
    assert packed.packing is not None
    batch = next(iter(packed.get_train_dataloader()))
    assert len(batch["input_ids"]) < config.batch_size and "attention_mask" not in batch
    for changes in (
        {"packing": False},
        {"gradient_accumulation_steps": 4},
        {"packing": False, "gradient_accumulation_steps": 2},
    ):
        other, other_rows, other_loss = steps_of(dataclasses.replace(config, **changes))
        torch.testing.assert_close(torch.tensor(other_rows), torch.tensor(rows), rtol=1e-3, atol=1e-4)
        assert other_loss == pytest.approx(loss, rel=1e-4)
    assert other.packing is None


class Leaky(LlamaForCausalLM):
    """Attends over the whole row whatever the positions say."""

    def forward(self, input_ids=None, position_ids=None, **options):
        return super().forward(input_ids, **options)


def test_a_model_that_looks_at_the_whole_row_is_not_packed():
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert keeps_apart(get_peft_model(tiny_llama(), lora))
    assert not keeps_apart(get_peft_model(Leaky(tiny_llama().config), lora))


def test_evaluation_is_the_mean_over_target_tokens(config):
    trainer, data = trainer_of(dataclasses.replace(config, loss_on="assistant", eval_batch_size=3))
    metrics = trainer.evaluate()
    total = count = 0.0
    with torch.no_grad():
        for row in data.validation:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            chosen = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total -= float(chosen[labels != -100, labels[labels != -100]].sum())
            count += int((labels != -100).sum())
    assert count == data.facts["validation_target_tokens"]
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)


def test_losses_of_test_examples_have_the_loss_a_token_as_mean(config):
    names = {f.name for f in dataclasses.fields(TestSettings)} - {"lr"}
    trainer, data = trainer_of(TestSettings(**{name: value for name, value in vars(config).items() if name in names}))
    losses, correct, _ = LanguageModelling().test(trainer, data)
    assert correct == () and len(losses) == data.facts["test_examples"] > 0
    assert np.mean(losses) == pytest.approx(trainer.predict(data.test).metrics["test_loss"], rel=1e-5)


@dataclasses.dataclass(kw_only=True)
class TestSettings(CompareConfig):
    """A comparison's, with the one rate of a single run."""

    __test__ = False
    lr: float = 1e-2


@pytest.mark.parametrize("how", ["cut", "drop", "split"])
def test_examples_longer_than_the_context_are_counted(config, tmp_path, how):
    rows = text_rows(60)
    longest = data_of(with_rows(config, tmp_path, rows, task="lm")).facts
    assert longest["longer_than_context"] == longest["tokens_cut"] == longest["examples_dropped"] == 0
    facts = data_of(with_rows(config, tmp_path, rows, task="lm", max_length=24, long_examples=how)).facts
    assert facts["longer_than_context"] > 5
    whole = sum(longest[f"{name}_target_tokens"] for name in ("train", "validation"))
    kept = sum(facts[f"{name}_target_tokens"] for name in ("train", "validation"))
    if how == "split":
        assert kept == whole and facts["tokens_cut"] == 0 and facts["train_rows"] > facts["train_examples"]
    if how == "cut":
        assert kept == whole - facts["tokens_cut"]
    if how == "drop":
        assert facts["examples_dropped"] == facts["longer_than_context"] and kept < whole


def test_an_example_whose_targets_lie_beyond_the_length_is_left_out(config, tmp_path):
    rows = [*pair_rows(30), *({"prompt": "very " * 60 + str(i), "completion": "long"} for i in range(5))]
    facts = data_of(with_rows(config, tmp_path, rows, max_length=60)).facts
    assert facts["longer_than_context"] == facts["examples_dropped"] == 5


def test_examples_of_the_held_out_data_are_not_trained_on(config, tmp_path):
    held_out = write_lines(tmp_path / "held_out.jsonl", chat_rows(4))
    data = data_of(dataclasses.replace(config, eval_data=str(held_out)))
    assert data.facts["duplicates_removed"] == 4 and len(data.validation) == 4 and len(data.train) == 36


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss_on": "user"}, "--loss-on must be one of"),
        ({"loss_on": "completion"}, "--loss-on completion needs columns prompt and completion"),
        ({"long_examples": "split"}, "--long-examples split is for texts"),
        ({"long_examples": "keep"}, "--long-examples must be one of"),
        ({"max_length": 129}, "--max-length must lie between 2 and the 128 tokens"),
        ({"label_column": "label"}, "--label-column is for --task classification"),
        ({"lr_head": 1e-2}, "--lr-head is for --task classification"),
        ({"chat_template": "none.jinja"}, "--chat-template: cannot read none.jinja"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_refused(config, changes, says):
    with pytest.raises(InputError, match=says):
        data_of(dataclasses.replace(config, **changes))


def test_one_example_cannot_be_split(config, tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl: one example is too few to keep any aside"):
        data_of(with_rows(config, tmp_path, ROWS["texts"][:1]))


def template(config, tmp_path, text):
    (tmp_path / "chat.jinja").write_text(text)
    return dataclasses.replace(config, chat_template=str(tmp_path / "chat.jinja"))


def test_a_template_that_refuses_a_conversation_names_its_line(config, tmp_path):
    rows = [
        *chat_rows(12),
        {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]},
    ]
    with pytest.raises(InputError, match="line 13: the chat template refuses this conversation: roles must alternate"):
        data_of(with_rows(config, tmp_path, rows))


def test_a_template_without_marks_cannot_tell_the_assistant(config, tmp_path):
    bare = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    config = template(config, tmp_path, bare)
    assert data_of(config).facts["loss_on"] == "all"
    with pytest.raises(InputError, match="does not mark assistant turns"):
        data_of(dataclasses.replace(config, loss_on="assistant"))


def test_a_template_that_does_not_end_the_marked_turn_is_warned_of(config, tmp_path):
    open_ended = TEMPLATE.replace("+ eos_token }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}")
    with pytest.warns(LoraPlusWarning, match="does not learn to stop"):
        data_of(dataclasses.replace(template(config, tmp_path, open_ended), loss_on="assistant"))


def test_a_template_that_is_not_jinja_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="the chat template, line 1: not valid Jinja"):
        data_of(template(config, tmp_path, "{% for message in %}"))


def test_a_tokenizer_without_a_template_is_refused(config, tmp_path):
    task = LanguageModelling()
    tokenizer = task.load_tokenizer(config)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template; name a Jinja file with --chat-template"):
        task.load_data(config, tokenizer)


def test_the_output_layer_cannot_be_adapted(config):
    with pytest.raises(InputError, match="the output layer cannot be adapted"):
        trainer_of(dataclasses.replace(config, target_modules="q_proj,lm_head"))


def test_four_bits_need_their_package(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'loraplus\[bitsandbytes\]'"):
        trainer_of(dataclasses.replace(config, load_in_4bit=True))


def test_four_bits_learn_after_an_evaluation(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = save_llama(tmp_path / "wide", hidden=128, intermediate_size=256, context=128)
    trainer, _ = trainer_of(dataclasses.replace(config, model=str(wide), load_in_4bit=True))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    learnt = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert learnt and all(value.abs().max() > 0 for value in learnt)
    assert trainer.evaluate()["eval_loss"] < before


def test_a_model_that_lacks_weights_is_refused(config, decoder_folder, tmp_path):
    settings = json.loads((decoder_folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    for path in decoder_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"lacks weights: model\.layers\.2\."):
        trainer_of(dataclasses.replace(config, model=str(tmp_path)))
