"""Nothing that comes with a model is run unless asked for, and every damage is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from loraplus.errors import InputError
from loraplus.tasks.adapter import load_causal, put_adapter
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.loading import first_line, from_pretrained, loading
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import load_base, load_decoder, load_tokenizer
from tasks.causal import adapter_on, save_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return adapter_on(base, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"])


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({there!r}).touch()\n"


@pytest.fixture
def evil(model_folder, tmp_path):
    """A model folder with code of its own, and the file that this code would make."""
    folder = shutil.copytree(model_folder, tmp_path / "evil")
    there = tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(there=str(there)) + "class Evil: pass\n")
    return folder, there


def rewritten(folder, name, **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


MAPS = {
    "config.json": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
}


@pytest.mark.parametrize("name", MAPS)
def test_code_of_a_model_folder_is_not_run_and_nobody_is_asked(evil, monkeypatch, name):
    folder, there = evil
    rewritten(folder, name, **MAPS[name])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    loader = AutoTokenizer if name.startswith("tokenizer") else AutoConfig
    try:
        from_pretrained(loader, str(folder))
    except InputError as error:
        assert "brings code of its own, which is not run" in str(error) or name.startswith("tokenizer")
    assert not there.exists() and not (folder / "ran").exists()


def test_code_of_a_model_folder_is_run_where_it_is_trusted(evil):
    folder, there = evil
    rewritten(folder, "config.json", **MAPS["config.json"])
    with pytest.raises(InputError):  # an Evil is no configuration
        from_pretrained(AutoConfig, str(folder), trust_remote_code=True)
    assert there.exists()


COMMANDS = {
    "inspect": lambda model, adapter: ("inspect", model),
    "predict": lambda model, adapter: ("predict", "--adapter", model, "--data", "d.csv", "--output", "p.csv"),
    "generate": lambda model, adapter: ("generate", "--model", model, "--prompt", "x"),
    "merge": lambda model, adapter: ("merge", "--adapter", adapter, "--model", model, "--output", "m"),
    "train": lambda model, adapter: ("train", "--model", model, "--data", "d.csv", "--output", "o"),
    "compare": lambda model, adapter: ("compare", "--model", model, "--data", "d.csv", "--output", "o"),
    "tune": lambda model, adapter: ("tune", "--model", model, "--data", "d.csv", "--output", "o"),
}


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_no_command_runs_it_whatever_is_answered(evil, decoder_folder, tmp_path, command):
    folder, there = evil
    rewritten(folder, "config.json", **MAPS["config.json"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "task_type": "SEQ_CLS", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    (tmp_path / "d.csv").write_text("text,label\na,1\nb,2\n")
    ended = subprocess.run(
        [sys.executable, "-m", "loraplus", *COMMANDS[command](str(folder), str(adapter))],
        input="y\n" * 100, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "") and not there.exists(), ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "brings code of its own, which is not run" in line


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched(model_folder, tmp_path, key):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    rewritten(folder, "config.json", **{key: "someone/kernel"})
    with pytest.raises(InputError, match="brings code of its own"):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["../m/model.safetensors", "/etc/passwd", 5])
def test_an_index_names_no_file_outside_of_the_folder(decoder_folder, tmp_path, name):
    folder = shutil.copytree(decoder_folder, tmp_path / "d")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="in which file of this folder"):
        load_decoder(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 10**6, "describes .* weights, and its files hold"),
        ("vocab_size", 10**9, "describes .* weights, and its files hold"),
        ("intermediate_size", 10**12, "describes .* weights, and its files hold"),
        ("num_hidden_layers", 10**400, "says num_hidden_layers 1000"),
        ("num_hidden_layers", 10**9, "says num_hidden_layers 1000000000"),
    ],
)
def test_a_configuration_of_a_far_larger_model_is_refused_before_it_is_built(
    model_folder, tmp_path, key, value, expected
):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    rewritten(folder, "config.json", **{key: value})
    with pytest.raises(InputError, match=expected):
        load_base(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_model_of_broken_weights_is_named_as_such(model_folder, tmp_path, value):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[7]
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"1 of {weights[name].numel()} numbers in .*{name} are NaN or infinite"):
        load_base(str(folder))


def test_weights_whose_sum_is_beyond_a_float_are_fine(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[7]
    weights[name].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_base(str(folder))


CONTENTS = [b"", b"null", b"[]", b"[1]", b'"x"', b"{", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: str(content[:10]))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_model_is_one_line(model_folder, tmp_path, name, content):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / name).write_bytes(content)
    config = TrainConfig(model=str(folder), data="d", output="o")
    try:
        load_classifier(config, ["a", "b"], load_tokenizer(config), 0)
    except InputError as error:
        assert len(str(error)) <= 500
    else:  # transformers does without it
        assert name == "tokenizer_config.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9}, {"r": 10**30}, {"r": "8"}, {"rank_pattern": "x"}, {"rank_pattern": {"q_proj": 10**8}},
        {"alpha_pattern": 3}, {"modules_to_save": 3}, {"target_modules": "(.*)*query"}, {"peft_type": {}},
        {"layer_replication": [[0, 2]] * 10**5}, {"init_lora_weights": "pissa_niter_1000000000"}, {"lora_dropout": "x"},
        {"alora_invocation_tokens": [10**30]}, {"layers_to_transform": "x"}, {"exclude_modules": "(.+)+q_proj.x"},
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_settings_of_an_adapter_that_make_no_sense_are_one_line(base, adapter, tmp_path, changes):
    folder = shutil.copytree(adapter, tmp_path / "a")
    rewritten(folder, "adapter_config.json", **changes)
    with pytest.raises(InputError):
        load_causal(str(base), str(folder))


def test_an_adapter_that_is_whole_is_put_on_its_base(base, adapter):
    model = put_adapter(load_decoder(str(base)), str(adapter), "base")
    assert not model.training


def test_labels_and_tokens_that_do_not_belong_together_are_found(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    words = (folder / "vocab.txt").read_text().split()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"][words[-1]] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"{words[-1]} {i},{i % 2}\n" for i in range(20)))
    from loraplus.tasks.train import train

    with pytest.raises(InputError, match="makes token 5000 and the model knows 64"):
        train(TrainConfig(model=str(folder), data=str(tmp_path / "d.csv"), output=str(tmp_path / "o"), max_steps=1))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("y"), ZeroDivisionError(), RecursionError("a\nb")])
def test_whatever_a_library_raises_is_one_line(error):
    with pytest.raises(InputError, match="^cannot load it: ") as caught, loading("cannot load it"):
        raise error
    assert first_line(error) in str(caught.value) and type(error).__name__ in str(caught.value)


@pytest.mark.parametrize("length", ["x", None, [], {}, -1, True])
def test_a_tokenizer_of_no_length_is_one_line_wherever_it_is(base, adapter, model_folder, tmp_path, length):
    folder, model = shutil.copytree(adapter, tmp_path / "a"), shutil.copytree(model_folder, tmp_path / "m")
    for place in (folder, model):
        rewritten(place, "tokenizer_config.json", model_max_length=length)
    for load in (
        lambda: load_causal(str(base), str(folder)),
        lambda: load_tokenizer(TrainConfig(model=str(model), data="d", output="o")),
    ):
        try:
            load()
        except InputError as error:
            assert "it is damaged" in str(error) or "cannot load" in str(error)
        else:  # None is no limit
            assert length is None


def test_a_panic_of_a_library_is_one_line_and_an_interrupt_is_none():
    class PanicException(BaseException):
        """As pyo3 calls those of Rust."""

    with pytest.raises(InputError, match="PanicException: gone"), loading("cannot load it"):
        raise PanicException("gone")
    with pytest.raises(KeyboardInterrupt), loading("cannot load it"):
        raise KeyboardInterrupt


def test_a_trusted_model_loads_as_before(model_folder):
    plain = AutoModelForSequenceClassification.from_pretrained(model_folder)
    ours, _ = load_base(str(model_folder), trust_remote_code=True)
    assert ours.bert.embeddings.word_embeddings.weight.equal(plain.bert.embeddings.word_embeddings.weight)
