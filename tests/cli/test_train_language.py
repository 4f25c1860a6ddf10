"""`loraplus train --task sft|lm` from the outside: what is written, what resumes, what is refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal

import pytest
import torch
import yaml
from language import chat_rows, text_rows, write_lines
from markupsafe import escape
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from loraplus.cli import main
from loraplus.errors import InterruptedRun, visible
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.train import train


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows(200))


def flags(model, data, output, *more):
    return [
        "train", "--task", "sft", "--model", model, "--data", data, "--output", output, "--max-steps", 40,
        "--batch-size", 16, "--lr", "5e-3", "--rank", 4, "--eval-steps", 10, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, decoder_folder, chats):
    output = tmp_path_factory.mktemp("run") / "adapter"
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(printed):
        main([str(argument) for argument in flags(decoder_folder, chats, output, "--json")])
    assert stop.value.code == 0
    return output, json.loads(printed.getvalue())


def test_train_on_chats_writes_an_adapter_with_its_loss_and_perplexity(trained):
    output, metrics = trained
    assert json.loads((output / "metrics.json").read_text()) == metrics
    rows = list(csv.DictReader((output / "curves.csv").open()))
    losses = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
    assert len(losses) == 4 and metrics["eval_loss"] == pytest.approx(min(losses)) and min(losses) < losses[0]
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-4)
    assert (
        metrics["packing"] is torch.accelerator.is_available()
        and metrics["data"]["train_examples"] == 180
        and metrics["data"]["loss_on"] == "all"
    )


def test_the_report_shows_answers_of_the_base_and_of_the_adapter(trained, decoder_folder):
    output, _ = trained
    samples = json.loads((output / "samples.json").read_text())
    assert len(samples) == 3 and all(sample["reference"].endswith(".") for sample in samples)
    assert all(sample["base"] != sample["adapted"] for sample in samples)
    tokenizer = AutoTokenizer.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(decoder_folder)
    ids = tokenizer(samples[0]["prompt"], return_tensors="pt")
    answer = base.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == samples[0]["base"]
    page, adapted = (output / "report.html").read_text(), samples[0]["adapted"].strip()
    assert "Answers before and after" in page and (escape(visible(adapted)) or "nothing</span>") in page


def test_the_adapter_loads_with_peft_alone(trained):
    output, _ = trained
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    chat = [{"role": "user", "content": "what colour is snow number 7?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert any(value.abs().max() > 0 for name, value in model.named_parameters() if "lora_B" in name)


class Interrupt(TrainerCallback):
    """As if the user pressed Ctrl-C in that step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 12:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_goes_on_to_the_same_adapter(trained, tmp_path, decoder_folder, chats, loraplus_command):
    output, _ = trained
    config = TrainConfig(**{**yaml.safe_load((output / "config.yaml").read_text()), "output": str(tmp_path / "out")})
    with pytest.raises(InterruptedRun, match="step 13 of 40"):
        train(config, callbacks=[Interrupt()])
    assert loraplus_command(*flags(decoder_folder, chats, tmp_path / "out", "--resume")).code == 0
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (output, tmp_path / "out")]
    assert adapters[0] == adapters[1]


def test_texts_with_automatic_rates(loraplus_command, tmp_path, decoder_folder):
    data = write_lines(tmp_path / "texts.jsonl", text_rows(60))
    outcome = loraplus_command(
        "train", "--task", "lm", "--model", decoder_folder, "--data", data, "--output", tmp_path / "out",
        "--lr", "auto", "--max-steps", 20, "--batch-size", 8, "--max-length", 24, "--no-packing", "--samples", 0,
        "--plain",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["auto"] and metrics["lr"] > 0 and not metrics["packing"]
    assert not (tmp_path / "out" / "samples.json").exists()
    longer = metrics["data"]["longer_than_context"]
    assert longer > 0 and f"{longer} longer ones split into parts, nothing lost; padded batches" in outcome.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--task", "stf"], "there is no task 'stf'; the nearest is 'sft'"),
        (["--task", "classification", "--packing"], "--packing is for --task sft and lm"),
        (["--loss-on", "completion"], "--loss-on completion needs columns prompt and completion"),
        (["--max-length", 200], "--max-length must lie between 2 and the 128 tokens"),
    ],
)
def test_a_mistake_is_one_line(refused, tmp_path, decoder_folder, chats, more, says):
    assert says in refused(*flags(decoder_folder, chats, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_chat_without_an_assistant_is_one_line(refused, tmp_path, decoder_folder):
    rows = [*chat_rows(3), {"messages": [{"role": "user", "content": "hi"}]}]
    data = write_lines(tmp_path / "chats.jsonl", rows)
    assert f"{data}, line 4: the conversation has no assistant turn" in refused(
        *flags(decoder_folder, data, tmp_path / "o")
    )


def test_without_trl_it_is_named(refused, tmp_path, decoder_folder, chats, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'loraplus[trl]'" in refused(*flags(decoder_folder, chats, tmp_path / "out"))
