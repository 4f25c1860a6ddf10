"""The Python of every page runs, block after block, as one script a page; JSON and YAML can be read."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from language import save_decoder
from stacks.models import language_model, tokenizer
from stacks.trainers import TRL_OPTIONS, rows_for

from loraplus.adapters import layouts
from pages.blocks import PAGES, ROOT, blocks, name_of
from pages.script import Make, Script, in_a_group, kohya, on_decoder, trl_trainer

NOT_RUN = "# Not run by the tests: "
LANGUAGES = {"python", "sh", "text", "json", "yaml", "{toctree}", "{include}"}
# What a script that reads its own flags is started with.
FLAGS = "--output_dir out --max_steps 2 --bf16 false --use_cpu true --report_to none --loraplus_lr_ratio 16"
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def both(script: Script) -> torch.nn.Module:
    return torch.nn.ModuleDict({"unet": script["unet"], "text_encoder": script["text_encoder"]})


def trainable(name: str) -> Make:
    return lambda script: [parameter for parameter in script[name].parameters() if parameter.requires_grad]


# What a page's reader has that readers of other pages have not.
OWN: dict[str, dict[str, Make]] = {
    "README.md": {
        "peft_model": on_decoder,
        "args": lambda script: trl_trainer("SFT")(script).args,
        "data": lambda script: rows_for("SFT"),
    },
    "docs/layouts.md": {
        "network": lambda script: kohya(),
        "model": both,
        "unet_parameters": trainable("unet"),
        "text_encoder_parameters": trainable("text_encoder"),
    },
    "docs/migrate/deepspeed-fsdp.md": {"model": in_a_group},
    "docs/stacks/ddp.md": {"model": in_a_group},
    "docs/stacks/fsdp1.md": {"model": in_a_group},
    "docs/stacks/fsdp1-flat.md": {"model": in_a_group},
    "docs/stacks/fsdp2.md": {"model": in_a_group},
    **{f"docs/stacks/trl-{kind.lower()}.md": {"trainer": trl_trainer(kind)} for kind in TRL_OPTIONS},
    "docs/stacks/trl-sft-factory.md": {
        "model": on_decoder,
        "args": lambda script: trl_trainer("SFT")(script).args,
        "data": lambda script: rows_for("SFT"),
    },
    "docs/migrate/trl.md": {
        "trainer": trl_trainer("DPO"),
        "model": lambda script: language_model("none"),
        "data": lambda script: rows_for("DPO"),
        "tokenizer": lambda script: tokenizer(),
    },
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, model_folder):
    """A folder as a reader's clone is after some commands: examples, an adapter for chats, and one for reviews."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("pages")
    (folder / "examples").symlink_to(ROOT / "examples")
    base = save_decoder(folder / "decoder")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    for name in ("runs/chats", "runs/chat"):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / name)
    (folder / "MODEL").symlink_to(model_folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(model_folder)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2))
    model.peft_config["default"].base_model_name_or_path = "MODEL"
    for part in (model, classifier.config, AutoTokenizer.from_pretrained(model_folder)):
        part.save_pretrained(folder / "runs/reviews")
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs(page, workplace, monkeypatch, tmp_path):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["script.py", *FLAGS.split()])
    monkeypatch.setattr(layouts, "_registered", {})  # what a page registers ends with it
    script = Script(tmp_path, OWN.get(name_of(page), {}))
    try:
        for block in blocks(page):
            if block.language != "python":
                continue
            if block.code.startswith(NOT_RUN):
                compile(block.code, str(block), "exec")
            else:
                script.run(block.code, str(block))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.language.split()[0] in LANGUAGES, f"{block}: indented, or of the language {block.language!r}"
        if block.language == "json":
            json.loads(block.code)
        if block.language == "yaml":
            yaml.safe_load(block.code)
