"""Base models that are not whole, or not what they say, are refused; a tokenizer knows how long a text may be."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import transformers as t
from conftest import tiny_bert, tiny_config
from peft import LoraConfig, get_peft_model

from loraplus.errors import InputError
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.model import load_classifier
from loraplus.tasks.predict import load_adapter
from loraplus.tasks.pretrained import load_base, load_tokenizer
from tasks.test_model import MODELS, SIZE


def broken_copy(folder, target, how):
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    if how == "garbage":
        weights.write_bytes(b"xxxx")
    elif how == "truncated":
        os.truncate(weights, 3000)
    elif how == "another model's":
        alien = MODELS["GPT-2"][0]()
        weights.unlink()
        t.modeling_utils.safe_save_file(alien.transformer.state_dict(), weights, metadata={"format": "pt"})
    elif how == "config":
        (target / "config.json").write_text("{bad")
    return target


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("garbage", "cannot load the model in"),
        ("truncated", "cannot load the model in"),
        ("config", "cannot load the model in"),
        ("another model's", r"lacks weights: bert\.embeddings.* and \d+ more; these are not the weights of a bert"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path, model_folder, how, expected):
    with pytest.raises(InputError, match=expected) as caught:
        load_base(str(broken_copy(model_folder, tmp_path / "model", how)))
    assert "\n" not in str(caught.value)


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="knows special tokens only"):
        load_tokenizer(TrainConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("base", "tokens"),
    [
        (lambda: tiny_bert(), 32),
        (lambda: t.RobertaModel(t.RobertaConfig(**SIZE, max_position_embeddings=40, pad_token_id=1)), 38),
        (MODELS["MPNet"][0], 38),
        (MODELS["GPT-2"][0], 40),
        (MODELS["XLNet"][0], None),
        (MODELS["T5"][0], None),
    ],
)
def test_a_text_may_be_as_long_as_the_positions_reach(folder_of, base, tokens):
    folder = folder_of(base())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = TrainConfig(model=str(folder), target_modules="all-linear")
    tokenizer = load_tokenizer(config)
    assert tokenizer.model_max_length == tokens or (tokens is None and tokenizer.model_max_length > 10**9)
    ids = tokenizer("good film " * 60, truncation=True, max_length=min(tokenizer.model_max_length, 100))["input_ids"]
    model = load_classifier(config, ["bad", "good"], tokenizer, seed=0)
    assert model(**tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")).logits.shape == (1, 2)


@pytest.fixture
def adapter(tmp_path, model_folder):
    """An adapter on `model_folder`, as `loraplus train` leaves it."""
    folder = tmp_path / "adapter"
    model = get_peft_model(
        t.AutoModelForSequenceClassification.from_pretrained(model_folder),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"]),
    )
    model.save_pretrained(folder)
    model.config.save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (lambda: t.BertForMaskedLM(tiny_config()), r"lacks weights of bert\.pooler.*--model"),
        (lambda: t.BertModel(tiny_config(vocab_size=70)), r"another size .*word_embeddings.*--model"),
        (lambda: t.BertModel(tiny_config(num_hidden_layers=1)), r"lacks weights.*layer\.1\..*--model"),
        (MODELS["GPT-2"][0], r"lacks weights.*--model"),
    ],
)
def test_an_adapter_is_not_put_on_another_base_model(adapter, folder_of, model_folder, base, expected):
    load_adapter(str(adapter), str(model_folder))
    with pytest.raises(InputError, match=expected):
        load_adapter(str(adapter), str(folder_of(base())))


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("adapter_config.json", b"{", "is not valid JSON"),
        ("adapter_config.json", b"[]", "does not name a base model"),
        ("adapter_config.json", b'{"base_model_name_or_path": null}', "does not name a base model"),
        ("adapter_model.safetensors", b"xxxx", "cannot put"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
        ("config.json", b"{", "cannot load"),
        ("config.json", None, "no config.json; for a language model's adapter there is `loraplus generate`"),
    ],
)
def test_a_damaged_adapter_is_one_line(adapter, file, content, expected):
    if content is None:
        (adapter / file).unlink()
    else:
        (adapter / file).write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        load_adapter(str(adapter))
    assert "\n" not in str(caught.value)
