"""Models and data made on the spot: random weights of a real model's shape, texts of given lengths.

Speed does not depend on the values of weights or on the words, so nothing has to be fetched. A text of n tokens
is n words of a made-up vocabulary; what matters is how long the texts are, and which of their tokens are learnt.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from loraplus.tasks.config import CLASSIFICATION

EXAMPLES, LONGEST = 1600, 512
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>")
# Tokens of 10,566 rated sentences of movie reviews (`python examples/making/demo_data.py`) in MiniLM's
# tokenizer: (share of the sentences, tokens that these have at most).
_REVIEWS = ((0, 4), (0.1, 13), (0.25, 19), (0.5, 26), (0.75, 34), (0.9, 42), (0.95, 46), (0.99, 55), (1, 79))
_MEDIAN, _SIGMA = 48, 0.7


@dataclass(frozen=True)
class Shape:
    """A built-in model with its data.

    Args:
        title: What it is.
        task: As of --task.
        unit: What is counted a second, "examples" or "tokens".
        length: Tokens of the text at a share of the texts, short ones first.
        learnt: The share of a text's tokens that a decoder learns.
        words: Of the vocabulary.
        batch_size: Texts a step.
        batches: In a turn.
        memory: Whether its memory is measured.
    """

    title: str
    task: str
    unit: str
    length: Callable[[float], int]
    learnt: float = 1.0
    words: int = 30522
    batch_size: int = 32
    batches: int = 8
    memory: bool = True


def review_length(share: float) -> int:
    """Between the shares that were measured, linearly.

    Example:
        >>> review_length(0.5)
        26
    """
    for (low, fewer), (high, more) in itertools.pairwise(_REVIEWS):
        if share <= high:
            return round(fewer + (more - fewer) * (share - low) / (high - low))
    return _REVIEWS[-1][1]


def log_normal_length(share: float) -> int:
    """exp(μ + σ z) with a median of 48 tokens and σ = 0.7.

    Example:
        >>> log_normal_length(0.5)
        48
    """
    return max(4, min(LONGEST, round(math.exp(NormalDist(math.log(_MEDIAN), _SIGMA).inv_cdf(share)))))


SHAPES = {
    "reviews": Shape("MiniLM shape, lengths of movie reviews", CLASSIFICATION, "examples", review_length, memory=False),
    "encoder": Shape("MiniLM shape, log-normal lengths", CLASSIFICATION, "tokens", log_normal_length, batches=6),
    "decoder": Shape(
        "small Llama, 8k words, log-normal lengths", "lm", "tokens", log_normal_length, words=8000, batches=4
    ),
    "masked": Shape(
        "small Llama, 32k words, 75% of labels masked", "sft", "tokens", log_normal_length, learnt=0.25, words=32000,
        batch_size=8, memory=False,
    ),
}  # fmt: skip


def make(shape: Shape, folder: Path, seed: int) -> dict[str, Any]:
    """Writes a shape's model, tokenizer and data.

    Args:
        shape: One of `SHAPES`.
        folder: Empty.
        seed: Of weights and words.

    Returns:
        The settings of a run that name them.
    """
    model = folder / "model"
    _save_tokenizer(model, shape.words, classifier=shape.task == CLASSIFICATION)
    _save_model(model, shape.words, seed, classifier=shape.task == CLASSIFICATION)
    draw = random.Random(seed)
    for name, count in (("data", EXAMPLES), ("eval", 8)):
        lengths = [shape.length((i + 0.5) / count) for i in range(count)]
        draw.shuffle(lengths)
        lines = [json.dumps(_example(shape, length, i, draw)) for i, length in enumerate(lengths)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "model": str(model),
        "data": str(folder / "data.jsonl"),
        "eval_data": str(folder / "eval.jsonl"),
        "task": shape.task,
        "batch_size": shape.batch_size,
        "max_length": LONGEST,
        "target_modules": "all-linear",
    }


def _example(shape: Shape, length: int, number: int, draw: random.Random) -> dict[str, str]:
    """Special tokens count: two around a classifier's text, one behind a decoder's."""
    if shape.task == CLASSIFICATION:
        return {"text": _text(length - 2, shape.words, draw), "label": "yes" if number % 2 else "no"}
    if shape.learnt == 1:
        return {"text": _text(length - 1, shape.words, draw)}
    learnt = max(2, round(shape.learnt * length))
    return {
        "prompt": _text(max(1, length - learnt), shape.words, draw),
        "completion": " " + _text(learnt - 1, shape.words, draw),
    }


def _text(count: int, words: int, draw: random.Random) -> str:
    return " ".join(f"w{draw.randrange(words - len(_SPECIAL))}" for _ in range(max(1, count)))


def _save_tokenizer(folder: Path, words: int, *, classifier: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*_SPECIAL, *(f"w{i}" for i in range(words - len(_SPECIAL)))]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if classifier:
        around = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=LONGEST,
    ).save_pretrained(folder)  # fmt: skip


def _save_model(folder: Path, words: int, seed: int, *, classifier: bool) -> None:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    width: dict[str, Any] = {"vocab_size": words, "hidden_size": 384, "num_hidden_layers": 6, "pad_token_id": 0}
    if classifier:  # dropout stays as BERT has it
        BertForSequenceClassification(
            BertConfig(**width, num_attention_heads=12, intermediate_size=1536)
        ).save_pretrained(folder)
        return
    LlamaForCausalLM(
        LlamaConfig(
            **width, num_attention_heads=6, num_key_value_heads=2, intermediate_size=1024, eos_token_id=4,
            bos_token_id=None, max_position_embeddings=1024,
        )
    ).save_pretrained(folder)  # fmt: skip
