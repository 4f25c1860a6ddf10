"""The published settings end to end: tiny models of the right architecture, small files in the data's own format."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import NEGATIVE, NEUTRAL, POSITIVE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from loraplus.errors import InputError
from loraplus.reproduce import mmlu
from loraplus.reproduce.command import Options, dry_run, reproduce
from loraplus.reproduce.glue import TASKS, load_glue
from loraplus.reproduce.glue_gpt2 import GlueGpt2
from loraplus.reproduce.glue_roberta import GlueRoberta
from loraplus.reproduce.llama_flan import LlamaFlan
from loraplus.reproduce.llama_mnli import LlamaMnli
from loraplus.reproduce.registry import EXPERIMENTS, experiment_class
from loraplus.reproduce.tuned_arms import Job

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *POSITIVE, *NEGATIVE, *NEUTRAL, "Answer", ":", ".", *"ABCD"]


def save_model(model, folder: Path) -> None:
    model.save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(WORDS))}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def rows_of(task, count, labelled=True):
    rng = random.Random(0)
    rows = []
    for index in range(count):
        label = rng.randrange(len(task.labels))
        text = " ".join([rng.choice(NEUTRAL), rng.choice((POSITIVE, NEGATIVE, NEUTRAL)[label]), rng.choice(NEUTRAL)])
        row = {task.text: text, "label": label if labelled else -1, "idx": index}
        rows.append(row | ({task.pair: rng.choice(NEUTRAL)} if task.pair else {}))
    return rows


def write_rows(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as on a machine that has the weights: glue, mmlu, flan-v2 and three models."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("mnli", "sst2"):
        task = TASKS[name]
        write_rows(folder / "glue" / name / "train-00000-of-00001.parquet", rows_of(task, 60))
        write_rows(folder / "glue" / name / f"{task.validation}-00000-of-00001.parquet", rows_of(task, 16))
    choices = [
        {"subject": "film_music", "question": "the film", "choices": POSITIVE[:4], "answer": i % 4} for i in range(6)
    ]
    write_rows(folder / "mmlu" / "test.jsonl", choices)
    write_rows(folder / "mmlu" / "dev.jsonl", choices)
    flan = [
        {"inputs": f"the film was {word} Answer :", "targets": "ABCD"[i % 4]} for i, word in enumerate(POSITIVE * 8)
    ]
    write_rows(folder / "flan-v2" / "train.jsonl", flan)
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, **size}
    save_model(RobertaForMaskedLM(RobertaConfig(max_position_embeddings=68, **bert)), folder / "roberta-base")
    save_model(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **size)), folder / "gpt2")
    save_model(LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **bert)), folder / "llama-7b")
    return folder


def trained_names(experiment, case=None):
    """The adapted layers, as a run of the experiment would have them."""
    from loraplus.reproduce.glue import encoded
    from loraplus.roles import Role, trainable_parameters
    from loraplus.tasks.model import load_classifier

    recipe = experiment.recipe(case) if case else experiment.recipe
    tokenizer, task = encoded(case["task"] if case else "mnli", experiment.data, recipe.config.model)
    model = load_classifier(recipe.config, task.label_names, tokenizer, 0)
    names = [entry.name for entry in trainable_parameters(model) if entry.role == Role.A]
    return {name.partition(".lora_A")[0].rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    "kind, task, layers",
    [
        (GlueRoberta, "mnli", {"query", "value"}),
        (GlueRoberta, "sst2", {"query", "value"}),
        (GlueGpt2, "mnli", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_glue_runs_as_published_on_files_of_its_format(data, kind, task, layers):
    experiment = kind(scale="paper", data=str(data), glue=(task,), max_steps=4)
    found = experiment.train(Job({"task": task}, 1e-3, 4.0, 1, 2), lambda *_: None)
    assert found.status == "done" and [point.step for point in found.curve] == [2, 4]
    assert {"eval_loss", "eval_accuracy", "test_loss", "test_accuracy"} == set(found.values)
    assert trained_names(experiment, {"task": task}) == layers


def test_a_run_with_a_rate_far_too_large_is_a_diverged_result(data):
    experiment = GlueGpt2(scale="paper", data=str(data), glue=("sst2",), max_steps=20)
    assert experiment.train(Job({"task": "sst2"}, 1e30, 1.0, 1, 2), lambda *_: None).status == "diverged"


def test_the_published_lengths_and_schedules():
    recipe = GlueRoberta(scale="paper").recipe({"task": "mnli"})
    assert (recipe.config.epochs, recipe.config.rank, recipe.config.alpha) == (3, 8, 8)
    assert GlueRoberta(scale="paper").recipe({"task": "qnli"}).config.epochs == 10
    assert (recipe.beta2, recipe.half, recipe.dropout, recipe.config.max_length) == (0.99, True, True, 128)
    assert not GlueRoberta().recipe({"domain": "movies"}).dropout
    llama = LlamaMnli(scale="paper").recipe
    assert (llama.config.batch_size, llama.config.gradient_accumulation_steps, llama.beta2) == (32, 4, 0.999)
    assert llama.config.lr_scheduler_type == "constant" and llama.config.target_modules == "all-linear"


def test_training_and_validation_share_no_row_and_glues_validation_is_the_test(data):
    train, validation, test = load_glue(TASKS["mnli"], str(data / "glue"))
    assert (len(train.labels), len(validation.labels), len(test.labels)) == (54, 6, 16)
    assert train.pairs is not None and len(train.pairs) == 54


def test_a_copy_of_the_hubs_repository_loads_as_from_the_hub(data, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(data / "glue", tmp_path / "glue")
    files = "".join(
        f"  - split: {split}\n    path: mnli/{split}-*\n" for split in ("train", "validation_matched")
    )  # as in the repository's own header
    (tmp_path / "glue" / "README.md").write_text(f"---\nconfigs:\n- config_name: mnli\n  data_files:\n{files}---\n")
    from_hub, from_files = (load_glue(TASKS["mnli"], str(folder / "glue")) for folder in (tmp_path, data))
    assert from_hub == from_files


def test_defects_of_the_data_are_named(data, tmp_path):
    with pytest.raises(InputError, match=r"no file train\*"):
        load_glue(TASKS["qqp"], str(data / "glue"))
    write_rows(tmp_path / "sst2" / "train.jsonl", [{"sentence": "a", "label": 7}])
    with pytest.raises(InputError, match="label '7'; expected 0 to 1"):
        load_glue(TASKS["sst2"], str(tmp_path))
    write_rows(tmp_path / "sst2" / "train.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(InputError, match="no column 'sentence'"):
        load_glue(TASKS["sst2"], str(tmp_path))
    assert "flan-v2 has no file" in (LlamaFlan(scale="paper", data=str(tmp_path)).problem() or "")


def test_llama_mnli_runs_its_whole_grid(data):
    experiment = LlamaMnli(scale="paper", seeds=2, data=str(data), lr_a=(1e-4,), lr_b=(1e-4, 4e-4), max_steps=1)
    results = {run.key: experiment.run(run, lambda *_: None) for run in experiment.next_runs({})}
    assert len(results) == 4 and experiment.next_runs(results) == []
    figures = experiment.figures(results)
    assert figures["best_tied"]["lr_a"] == figures["best_tied"]["lr_b"] == 1e-4
    report = experiment.report(results, figures)
    assert report.figures[0].plots[0].z[0][0] == pytest.approx(figures["pairs"][0]["accuracy"])
    assert trained_names(experiment) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_llama_flan_trains_on_answers_and_is_evaluated_on_mmlu(data):
    experiment = LlamaFlan(scale="paper", seeds=1, data=str(data), shots=1, max_steps=2)
    assert experiment.problem() is None
    found = experiment.train(1e-3, 4.0, 0, lambda *_: None)
    assert found.status == "done" and found.values["test_accuracy"] in {i / 6 for i in range(7)}


def test_a_flan_run_with_a_rate_far_too_large_is_a_diverged_result(data):
    experiment = LlamaFlan(scale="paper", data=str(data), max_steps=10, max_length=64)  # it logs every tenth step
    assert experiment.train(1e30, 1.0, 0, lambda *_: None).status == "diverged"


def test_mmlu_takes_the_likeliest_letter():
    class Fixed:
        training, device = False, "cpu"

        def eval(self): ...

        def train(self, mode): ...

        def __call__(self, input_ids):
            scores = torch.zeros(1, input_ids.shape[1], 300)
            scores[0, -1, ord("C")] = 1.0
            return type("Output", (), {"logits": scores})

    def letters(text, **_):
        return {
            "input_ids": torch.tensor([[ord(c) % 300 for c in text]]) if "return_tensors" in _ else [*map(ord, text)]
        }

    asked = [mmlu.Question("s", "q", ("w", "x", "y", "z"), answer) for answer in (2, 2, 0)]
    assert mmlu.accuracy(Fixed(), letters, asked, asked, 1) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name, runs", [("llama-mnli", 70), ("llama-flan", 70), ("glue-roberta", 4), ("glue-gpt2", 4)])
def test_a_dry_run_tells_the_plan_without_weights(tmp_path, name, runs):
    plan = dry_run(Options(name=name, output=str(tmp_path / "out"), scale="paper", seeds=2, data=str(tmp_path)))
    assert plan["runs_known"] == runs and any("from the hub" in need for need in plan["needs"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama-mnli", "llama-flan", "glue-roberta", "glue-gpt2"])
def test_what_cannot_be_had_is_said_before_anything_is_written(tmp_path, name):
    with pytest.raises(InputError, match=name):
        reproduce(Options(name=name, output=str(tmp_path / "out"), scale="paper", data=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("experiment", [LlamaMnli, LlamaFlan, GlueRoberta, GlueGpt2])
def test_what_is_there_is_no_problem(data, experiment):
    options = {"glue": ("mnli", "sst2")} if experiment in (GlueRoberta, GlueGpt2) else {}
    assert experiment(scale="paper", data=str(data), **options).problem() is None


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "cpu" in experiment_class(name).scales])
def test_a_dry_run_of_what_runs_here_makes_no_model_and_obtains_no_data(tmp_path, name):
    plan = dry_run(Options(name=name, output=str(tmp_path / "out"), data=str(tmp_path / "data")))
    assert plan["runs_known"] > 0 and plan["settings"]["scale"] == "cpu"
    assert not list(tmp_path.iterdir())
