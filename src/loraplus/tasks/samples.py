"""What the base model and the adapted one answer to a few validation prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplus.errors import InputError
from loraplus.tasks.conversations import Example
from loraplus.tasks.encoding import Encoder
from loraplus.tasks.generate import continue_ids

_NEW_TOKENS = 64


def answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    examples: Sequence[Example],
    count: int,
) -> list[dict[str, str]]:
    """One row an example, with the most likely answer of each model (greedy decoding).

    Args:
        model: trained; its base is what is left without the adapter.
        tokenizer: of the model.
        encoder: that made the training tokens.
        examples: validation examples; those whose beginning is no prompt to the chat template are passed over.
        count: most rows.

    Returns:
        {"source", "prompt", "asked", "reference", "base", "adapted"}: where the example stands, what the model was
        given, the same for a reader (turns with their roles, no special tokens), what the example says next, and what
        either model says.
    """
    training = model.training
    model.eval()
    try:
        return [
            {"source": example.where, **_answers(model, tokenizer, example, prompt, rest)}
            for example, prompt, rest in itertools.islice(_prompts(encoder, examples), count)
        ]
    finally:
        model.train(training)


def _prompts(encoder: Encoder, examples: Sequence[Example]) -> Iterator[tuple[Example, list[int], list[int]]]:
    for example in examples:
        try:
            prompt, rest = encoder.prompt(example)
        except InputError:
            continue
        yield example, prompt, rest


def _answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, example: Example, prompt: list[int], rest: list[int]
) -> dict[str, str]:
    new = max(1, min(_NEW_TOKENS, tokenizer.model_max_length // 2))
    room = tokenizer.model_max_length - new
    asked = example.asked if len(prompt) <= room else ""
    prompt = prompt[-room:]  # its end, so that prompt and answer fit
    with model.disable_adapter():
        base = _answer(model, tokenizer, prompt, new)
    return {
        "prompt": str(tokenizer.decode(prompt)),
        "asked": asked or str(tokenizer.decode(prompt, skip_special_tokens=True)),
        "reference": str(tokenizer.decode(rest, skip_special_tokens=True)),
        "base": base,
        "adapted": _answer(model, tokenizer, prompt, new),
    }


@torch.inference_mode()
def _answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: int) -> str:
    (text,) = continue_ids(model, tokenizer, [prompt], new)
    return text
