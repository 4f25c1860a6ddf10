"""What is merged is what base model and adapter say, for every kind of adapter, and loads without PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplus.errors import InputError, MergeMismatchError
from loraplus.tasks import merge as merging
from loraplus.tasks.adapter import load_causal
from loraplus.tasks.merge import merge

from .causal import adapter_on, save_llama, tiny_gpt2, tiny_llama, tiny_tokenizer

ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True, "r": 4},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "factors on the tied embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "factors on the tied head": {"target_modules": ["lm_head", "q_proj"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return adapter_on(base, tmp_path_factory.mktemp("adapter"), **ADAPTERS["plain"])


@torch.inference_mode()
def logits(model):
    return model.eval()(input_ids=torch.arange(1, 41).view(2, 20)).logits.float()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # tied layers: seen to
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_is_base_and_adapter(base, tmp_path, kind):
    folder = adapter_on(base, tmp_path / "adapter", **ADAPTERS[kind])
    record = merge(str(folder), tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(base)), atol=0.1)
    assert record["relative_difference"] <= record["tolerance"] == 1e-4
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()).items() <= record.items()


def test_layers_that_keep_their_weights_the_other_way_round(tmp_path):
    base = tmp_path / "base"
    tiny_gpt2(vocabulary=len(tiny_tokenizer())).save_pretrained(base)
    folder = adapter_on(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert merge(str(folder), tmp_path / "merged")["relative_difference"] < 1e-4


def test_the_folder_is_that_of_a_plain_model(base, adapter, tmp_path):
    merge(str(adapter), tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded.chat_template == tiny_tokenizer().chat_template
    assert loaded("the light")["input_ids"] == tiny_tokenizer()("the light")["input_ids"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_data_type_is_written_and_held_to_its_own_tolerance(adapter, tmp_path, dtype):
    record = merge(str(adapter), tmp_path / "merged", dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)
    assert 1e-5 < record["relative_difference"] <= record["tolerance"] == merging.TOLERANCES[dtype]


def test_a_base_in_half_precision_is_merged_in_single_and_stays_half(tmp_path):
    base = save_llama(tmp_path / "base", dtype="bfloat16")
    tiny_llama().bfloat16().save_pretrained(base)
    folder = adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert merge(str(folder), tmp_path / "merged")["dtype"] == "bfloat16"
    exact = merge(str(folder), tmp_path / "exact", dtype="float32")
    assert exact["relative_difference"] < 1e-5


def test_a_tokenizer_with_new_tokens_makes_the_base_grow(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<other>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(adapted), atol=1e-3)


def test_adapters_load_with_peft_alone(adapter, base):
    ours, tokenizer, name = load_causal(None, str(adapter))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), logits(ours))
    assert (tokenizer.chat_template, name) == (tiny_tokenizer().chat_template, str(base))


def test_what_is_off_by_more_than_the_tolerance_is_not_left_there(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(merging.TOLERANCES, "bfloat16", 1e-9)
    with pytest.raises(MergeMismatchError, match=r"off by 0\.0\d+ of the largest, more than 1e-09 for bfloat16"):
        merge(str(adapter), tmp_path / "merged", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_infinite_weights_are_not_within_the_tolerance(base, tmp_path):
    folder = adapter_on(base, tmp_path / "adapter", target_modules=["down_proj"], scale=1e5)
    with pytest.raises(MergeMismatchError, match="a wider --dtype"):
        merge(str(folder), tmp_path / "merged", dtype="float16")


def test_only_the_files_of_an_earlier_merge_are_replaced(adapter, tmp_path):
    target = tmp_path / "merged"
    merge(str(adapter), target)
    with pytest.raises(InputError, match="is not empty: --overwrite"):
        merge(str(adapter), target)
    (target / "notes").mkdir()
    (target / "notes" / "mine.txt").write_text("kept")
    record = json.loads((target / "merge.json").read_text())
    (target / "model-00001-of-00002.safetensors").write_text("a part that the next merge does not write")
    record["files"].append("model-00001-of-00002.safetensors")
    (target / "merge.json").write_text(json.dumps(record))
    merge(str(adapter), target, overwrite=True, dtype="float16")
    assert (target / "notes" / "mine.txt").read_text() == "kept"
    assert not (target / "model-00001-of-00002.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]

    record = json.loads((target / "merge.json").read_text())
    assert set(record["files"]) == {path.name for path in target.iterdir()} - {"notes"}
    record["files"].remove("config.json")
    (target / "merge.json").write_text(json.dumps(record))
    (target / "config.json").write_text("mine")
    with pytest.raises(InputError, match="config.json is of no earlier merge and would be replaced"):
        merge(str(adapter), target, overwrite=True)
    assert (target / "config.json").read_text() == "mine" and (target / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    (target / "merge.json").unlink()
    with pytest.raises(InputError, match="no merge.json of an earlier merge"):
        merge(str(adapter), target, overwrite=True)


def test_a_link_stays_a_link(adapter, tmp_path):
    merge(str(adapter), tmp_path / "merged")
    (tmp_path / "link").symlink_to("merged")
    merge(str(adapter), tmp_path / "link", overwrite=True, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "merged"] and (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["dtype"] == "float16"


def test_the_folder_it_runs_in_is_not_replaced(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is or holds the folder that this runs in"):
        merge(str(adapter), ".")


def test_neither_base_nor_adapter_is_written_over(base, adapter):
    for target, what in ((base, "the base model"), (adapter, "the adapter"), (adapter.parent, "the adapter")):
        with pytest.raises(InputError, match=f"is or holds {what}"):
            merge(str(adapter), target, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 24, "intermediate_size": 24}, "size mismatch for .*lora_A.*"),
        ({"num_hidden_layers": 1}, "no place for its weights: .*layers.1.*and 3 more"),
        ({"num_hidden_layers": 3}, "lacks weights: .*layers.2.*and 3 more"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_the_adapter_of_another_model_is_refused(adapter, tmp_path, options, message):
    other = save_llama(tmp_path / "other", **options)
    with pytest.raises(InputError, match=f"cannot put .*{message}; name the base model"):
        merge(str(adapter), tmp_path / "merged", model=str(other))
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused(base, adapter, tmp_path):
    prompts = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(InputError, match="PROMPT_TUNING adapter, which has no weights to merge"):
        merge(str(tmp_path / "prompts"), tmp_path / "merged")
    quantized = save_llama(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantized, and merging would round"):
        merge(str(adapter), tmp_path / "merged", model=str(quantized))
    with pytest.raises(InputError, match="--dtype must be one of float32"):
        merge(str(adapter), tmp_path / "merged", dtype="int8")
