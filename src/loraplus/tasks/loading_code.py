"""Python that loads an adapter with transformers and PEFT alone, for its model card."""

from __future__ import annotations

from loraplus.tasks.config import MULTI_LABEL, OF_LABELS, REGRESSION, TaskConfig

_CLASSIFIER = """\
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

adapter = {adapter}
base_model = {base}
config = AutoConfig.from_pretrained(adapter{remote})
# This tells of a classifier that is new; the adapter brings the trained one.
base = AutoModelForSequenceClassification.from_pretrained(base_model, config=config{remote})
model = PeftModel.from_pretrained(base, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter{remote})

batch = tokenizer(["a text", "and another"], truncation=True, padding=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits
{answers}
"""
_CLASSES = "print([config.id2label[index] for index in logits.argmax(-1).tolist()])"
_SETS = "print([[config.id2label[i] for i, logit in enumerate(row) if logit > 0] for row in logits.tolist()])"
_NUMBERS = "print((logits.squeeze(-1) * config.target_deviation + config.target_mean).tolist())"
_DECODER = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = {adapter}
base_model = {base}
tokenizer = AutoTokenizer.from_pretrained(adapter{remote})
base = AutoModelForCausalLM.from_pretrained(base_model{remote})
model = PeftModel.from_pretrained(base, adapter).eval()

{prompt}
with torch.inference_mode():
    answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CHAT = """\
chat = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_TEXT = 'inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)'


def loading_code(config: TaskConfig, adapter: str, base: str, *, is_chat: bool) -> str:
    """Code that runs where the two folders are, and prints what the adapter says.

    Args:
        config: of the run.
        adapter: its folder.
        base: folder or hub name of the base model.
        is_chat: whether prompts are turns of a chat.
    """
    names = {
        "adapter": repr(adapter),
        "base": repr(base),
        "remote": ", trust_remote_code=True" if config.trust_remote_code else "",
    }
    if config.task in OF_LABELS:
        answers = {REGRESSION: _NUMBERS, MULTI_LABEL: _SETS}.get(config.task, _CLASSES)
        return _CLASSIFIER.format(**names, answers=answers)
    return _DECODER.format(**names, prompt=_CHAT if is_chat else _TEXT)
