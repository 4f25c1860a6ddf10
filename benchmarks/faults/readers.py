"""What reads other people's files: for each reader a folder of good ones, and a call that uses what it read."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import torch
import yaml
from hypothesis import strategies as st

ROWS = [(f"a {'good' if i % 2 else 'bad'} film {i}", "yes" if i % 2 else "no") for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes", "x": {"y": [1]}}]}
    for i in range(4)
]
_BEGUN: dict[str, Any] = {"output": "begun", "max_steps": 4, "eval_steps": 2, "batch_size": 4, "rank": 2}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Args:
        name: for the count.
        seeds: {file in the folder: good content}; one of them is changed.
        read: called with the folder, and with the name of the changed file.
        share: of all inputs.
        texts: generated content, instead of a changed file, every other time.
    """

    name: str
    seeds: dict[str, bytes]
    read: Callable[[Path, str], Any]
    share: int
    texts: st.SearchStrategy[bytes] | None = None


def readers(folder: Path) -> list[Reader]:
    """All readers, with small models made in a folder. Another one is another `Reader` in a list below.

    Args:
        folder: empty, or filled by an earlier call.
    """
    if not (folder / "done").exists():
        _make(folder)
    return [*_tables(folder), *_settings(folder), *_inspected(folder), *_resumed(folder), *_loaded(folder),
            _report(folder)]  # fmt: skip


def _files(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _tables(folder: Path) -> list[Reader]:
    from loraplus.tasks.columns import labelled_texts
    from loraplus.tasks.conversations import read_examples
    from loraplus.tasks.prompts import read_prompts
    from loraplus.tasks.table import read_table

    def labelled(root: Path, name: str) -> Any:
        return labelled_texts(read_table(str(root / name)))

    def chats(root: Path, name: str) -> Any:
        return read_examples(read_table(str(root / name)), "sft"), read_prompts(str(root / name))

    def saved(root: Path, name: str) -> Any:
        return labelled_texts(read_table(str(root)))

    data = folder / "data"
    return [
        Reader("CSV", _files(data, "d.csv"), labelled, 26, mutations.separated_texts),
        Reader("TSV", _files(data, "d.tsv"), labelled, 12, mutations.separated_texts),
        Reader("JSON Lines", _files(data, "d.jsonl"), labelled, 14, mutations.json_texts),
        Reader("JSON array", _files(data, "d.json"), labelled, 4),
        Reader("chats", _files(data, "chats.jsonl"), chats, 12, mutations.json_texts),
        Reader("text", _files(data, "d.txt"), lambda root, name: read_examples(read_table(str(root / name)), "lm"), 2),
        Reader("Parquet", _files(data, "d.parquet", "plain.parquet"), labelled, 8),
        Reader("datasets folder", _all(data / "saved"), saved, 4),
    ]


def _settings(folder: Path) -> list[Reader]:
    from loraplus.cli.options import load_yaml
    from loraplus.files.output import check_output
    from loraplus.files.single import read_json

    same = yaml.safe_load((folder / "run/config.yaml").read_text())

    def configuration(root: Path, name: str) -> Any:
        return load_yaml(str(root / name), set(same))

    def resumed(root: Path, name: str) -> Any:
        return check_output(root, same, overwrite=False, resume=True)

    config = _files(folder / "run", "config.yaml")
    return [
        Reader("configuration", config, configuration, 8, mutations.yaml_texts),
        Reader("earlier output", config, resumed, 2, mutations.yaml_texts),
        Reader("JSON file", _files(folder / "run", "metrics.json"), lambda root, name: read_json(root / name), 2),
    ]


def _inspected(folder: Path) -> list[Reader]:
    from rich.console import Console

    from loraplus.cli.inspect import adapter_parts, model_parts
    from loraplus.files.single import json_text
    from loraplus.inspection import inspect_folder

    console = Console(file=open("/dev/null", "w"), markup=False)  # noqa: SIM115

    def shown(root: Path, name: str) -> Any:
        contents = inspect_folder(str(root))
        json_text(contents)
        for part in model_parts(contents) if contents["kind"] == "model" else adapter_parts(contents):
            console.print(part)

    return [
        Reader("inspect checkpoint", _all(folder / "checkpoint"), shown, 5),
        Reader("inspect old adapter", _all(folder / "bin"), shown, 2),
        Reader("inspect model", _files(folder / "base", "config.json"), shown, 2),
    ]


def _resumed(folder: Path) -> list[Reader]:
    """A run that goes on from its checkpoint: one that its manifest vouches for, and one of an earlier version."""
    from loraplus.files.manifest import MANIFEST_FILE
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.train import train

    files = _all(folder / "begun")
    trained_on: dict[str, Any] = {"model": str(folder / "base"), "data": str(folder / "data/d.csv")}

    def gone_on(root: Path, name: str) -> Any:
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            shutil.copytree(root, "begun")  # which its configuration names
            return train(TrainConfig(**_BEGUN, **trained_on), resume=True)

    def unsealed(files: dict[str, bytes]) -> dict[str, bytes]:
        unlisted = {name: content for name, content in files.items() if not name.endswith(MANIFEST_FILE)}
        rates = next(name for name in unlisted if name.endswith("checkpoint-2/loraplus.json"))
        return {**unlisted, rates: json.dumps({**json.loads(unlisted[rates]), "sealed": False}).encode()}

    return [
        Reader("checkpoint", files, gone_on, 1),
        Reader("checkpoint without a manifest", unsealed(files), gone_on, 1),
    ]


def _loaded(folder: Path) -> list[Reader]:
    from loraplus.tasks.adapter import load_causal
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.generate import generate, prompt_ids
    from loraplus.tasks.model import load_classifier, load_language_model
    from loraplus.tasks.predict import load_adapter, predict
    from loraplus.tasks.pretrained import load_tokenizer

    base, decoder = folder / "base", folder / "decoder"
    chats = load_causal(str(decoder))[1]

    def labels(root: Path, name: str) -> Any:
        return predict(*load_adapter(str(root), str(base)), ["a good film"])

    def answers(root: Path, name: str) -> Any:
        model, tokenizer, _ = load_causal(str(decoder), str(root))
        return generate(model, tokenizer, ["the light"], max_new_tokens=1)

    def classifier(root: Path, name: str) -> Any:
        config = TrainConfig(model=str(root), data="d", output="o", rank=2)
        return load_classifier(config, ["no", "yes"], load_tokenizer(config), 0)

    def language(root: Path, name: str) -> Any:
        config = TrainConfig(model=str(root), data="d", output="o", rank=2, task="lm")
        return load_language_model(config, load_tokenizer(config), 0)

    def continued(root: Path, name: str) -> Any:
        model, tokenizer, _ = load_causal(str(root))
        return generate(model, tokenizer, ["the light"], max_new_tokens=1)

    def chat(root: Path, name: str) -> Any:
        chats.chat_template = (root / name).read_bytes().decode("utf-8", "replace")
        return prompt_ids(chats, [{"role": "user", "content": "hi"}])

    return [
        Reader("classifier's adapter", _all(folder / "classifier"), labels, 2),
        Reader("decoder's adapter", _all(folder / "adapter"), answers, 2),
        Reader("encoder folder", _all(base), classifier, 2),
        Reader("decoder folder", _all(decoder), language, 1),
        Reader("decoder that goes on", _all(decoder), continued, 1),
        Reader("chat template", {"chat_template.jinja": TEMPLATE.encode()}, chat, 2),
    ]


def _report(folder: Path) -> Reader:
    from loraplus.report.training import write_report

    def page(root: Path, name: str) -> Any:
        if mutations.SCRIPT.decode() in write_report(root).read_text(encoding="utf-8"):
            raise RuntimeError("text of a file stands in the page as a script")

    return Reader("report", _all(folder / "run"), page, 1)


def _all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _make(folder: Path) -> None:
    """Small good files of every kind."""
    import datasets
    import pyarrow
    from pyarrow import parquet
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

    from loraplus.files.single import write_csv, write_json, write_yaml
    from loraplus.reproduce.verses import train_tokenizer

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    table = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    rows = [{"text": text, "label": label} for text, label in ROWS]
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        lines = [delimiter.join(table), *(f'"{text}"{delimiter}{label}' for text, label in ROWS)]
        (data / name).write_text("\n".join(lines) + "\n")
    (data / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "d.json").write_text(json.dumps(rows))
    (data / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    (data / "d.txt").write_text("\n".join(table["text"]))
    parquet.write_table(pyarrow.table(table), data / "d.parquet")
    parquet.write_table(pyarrow.table(table), data / "plain.parquet", use_dictionary=False, compression="none")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    numbered = {**table, "label": [["no", "yes"].index(label) for label in table["label"]]}
    datasets.Dataset.from_dict(numbered, features=features).save_to_disk(str(data / "saved"))

    base = folder / "base"
    base.mkdir()
    words = sorted({word for text, _ in ROWS for word in text.split()})
    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizerFast(str(base / "vocab.txt"), model_max_length=32).save_pretrained(base)
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    ))  # fmt: skip
    encoder.base_model.save_pretrained(base)
    decoder = folder / "decoder"
    tokenizer = train_tokenizer(["the light was good", "and it was so"] * 3, 280, 32)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(decoder)  # fmt: skip
    tokenizer.save_pretrained(decoder)
    _make_adapters(folder)
    run = folder / "run"
    run.mkdir()
    write_yaml(run / "config.yaml", {
        "task": "lm", "model": "m", "data": "d", "output": "o", "lr": 3e-4, "lr_ratio": 16.0, "bf16": False,
        "target_modules": None, "max_steps": 20,
    })  # fmt: skip
    facts = {
        "source": "d.txt", "format": "text", "loss_on": "all", "train_examples": 9, "validation_examples": 1,
        "duplicates_removed": 0, "train_tokens": 99, "train_target_tokens": 90, "validation_target_tokens": 10,
        "max_length": 64, "longer_than_context": 2, "long_examples": "cut", "tokens_cut": 7, "examples_dropped": 0,
    }  # fmt: skip
    write_json(run / "metrics.json", {
        "eval_loss": 1.25, "eval_perplexity": 3.49, "steps": 20, "best_step": 15, "lr": 1e-3, "lr_ratio": 16.0,
        "auto": False, "batch_size": 8, "packing": True, "seconds_per_step": 0.1, "data": facts,
    })  # fmt: skip
    write_csv(run / "curves.csv", [{"step": 1, "train_loss": 2.0}, {"step": 2, "eval_loss": 1.25}])
    write_json(run / "samples.json", [dict.fromkeys(("source", "prompt", "reference", "base", "adapted"), "text")])
    (folder / "done").touch()


def _make_adapters(folder: Path) -> None:
    from safetensors.torch import load_file

    from loraplus.cli.console import quiet_libraries
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.train import train

    quiet_libraries()
    short: dict[str, Any] = {"max_steps": 2, "eval_steps": 2, "batch_size": 4, "rank": 2}
    train(TrainConfig(
        model=str(folder / "base"), data=str(folder / "data/d.csv"), output=str(folder / "run-of-classifier"), **short,
    ))  # fmt: skip
    train(TrainConfig(
        model=str(folder / "decoder"), data=str(folder / "data/d.txt"), output=str(folder / "run-of-decoder"),
        task="lm", samples=0, target_modules="q_proj", **short,
    ))  # fmt: skip
    for name, run in (("classifier", "run-of-classifier"), ("adapter", "run-of-decoder")):
        (folder / name).mkdir()
        for path in (folder / run).iterdir():
            if path.is_file() and path.name not in ("README.md", "config.yaml", "curves.csv", "data_facts.json"):
                shutil.copy(path, folder / name)
    shutil.copytree(folder / "run-of-classifier/checkpoint-2", folder / "checkpoint")
    for name in ("README.md", "training_args.bin"):
        (folder / "checkpoint" / name).unlink(missing_ok=True)
    with contextlib.chdir(folder):
        train(TrainConfig(model=str(folder / "base"), data=str(folder / "data/d.csv"), **_BEGUN))
    for path in (folder / "begun").iterdir():  # as if it had been killed after its first checkpoint
        if path.is_file() and path.name not in ("config.yaml", "data_facts.json"):
            path.unlink()
    shutil.rmtree(folder / "begun/checkpoint-4")
    (folder / "bin").mkdir()
    shutil.copy(folder / "adapter/adapter_config.json", folder / "bin")
    torch.save(load_file(folder / "adapter/adapter_model.safetensors"), folder / "bin/adapter_model.bin")
