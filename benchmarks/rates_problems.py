"""What a setting trains: a model with a fresh adapter, the loss of some examples, and the loss that is judged.

Tasks of text: movies, products, editorials, tweets (is the rating above 0?), book (which book is a verse from?),
passages (the same of eight verses), rating and rating-DOMAIN (the rating itself), lm-DOMAIN, completion-DOMAIN (the
last two thirds of a text, given the first). The others have a function of their own below. A seed fixes the start.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rates_settings import FIRST, Setting
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from transformers.utils import logging

from loraplus.reproduce import small_decoders
from loraplus.reproduce.small_tasks import BOOK, HELD_OUT, Rows, SmallTask, book_rows, domain_rows
from loraplus.reproduce.small_training import evaluate, loss_of

logging.set_verbosity_error()
logging.disable_progress_bar()
getLogger("bitsandbytes").setLevel(ERROR)  # it tells of every product

DATA = Path(__file__).resolve().parent.parent / "data"
MINILM = "minilm"
PASSAGE = 8  # verses
PAIRS = 1500
HELD_LATER = 400
BETA = 0.1  # of preference training
IGNORED = -100

Tensor = torch.Tensor


@dataclass(frozen=True)
class Problem:
    """One run's model and data.

    Args:
        model: with an adapter.
        examples: how many there are to train on.
        loss: mean loss of the examples with these numbers.
        evaluate: (loss, accuracy or 0) on held-out examples.
        has_head: whether a new head is trained, too.
    """

    model: Any
    examples: int
    loss: Callable[[Sequence[int]], Tensor]
    evaluate: Callable[[], tuple[float, float]]
    has_head: bool = True


def problem(setting: Setting, seed: int) -> Problem:
    """Builds a setting's problem; what is pre-trained here is made on first use and kept under data/small-models."""
    kind = setting.task.partition("-")[0]
    build = {
        "completion": completion,
        "restore": restore,
        "digits": digits,
        "capitals": capitals,
        "preference": preference,
        "sine": sine,
        "deep": deep,
    }.get(kind, text)
    return build(setting, seed)


def adapted(model: Any, setting: Setting, kind: TaskType | None, narrow: Sequence[str]) -> Any:
    """The model with the setting's adapter on the layers `narrow`, or on all linear ones."""
    lora = LoraConfig(
        task_type=kind, r=setting.rank, lora_alpha=setting.alpha,  # type: ignore[arg-type]
        lora_dropout=setting.dropout, use_rslora=setting.rslora, use_dora=setting.dora,
        target_modules="all-linear" if setting.targets == "all-linear" else list(narrow),
    )  # fmt: skip
    return get_peft_model(model, lora)


# Text


def text(setting: Setting, seed: int) -> Problem:
    """Classes, ratings, and language modelling."""
    held = HELD_OUT if setting.part in FIRST else HELD_LATER if setting.length <= 32 else HELD_LATER // 4
    task = load_task(setting.task, setting.model, setting.length, held)
    set_seed(seed)
    if task.kind == "lm":
        model = adapted(decoder(setting), setting, TaskType.CAUSAL_LM, narrow(setting))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder_of(setting), num_labels=task.classes)
        model = adapted(model, setting, TaskType.SEQ_CLS, narrow(setting))
    return Problem(
        model, len(task.train.ids), lambda chosen: loss_of(model, task, task.train.chosen(chosen))[0],
        lambda: evaluate(model, task, task.validation), has_head=task.kind != "lm",
    )  # fmt: skip


def narrow(setting: Setting) -> list[str]:
    """The query and value projections."""
    return ["query", "value"] if setting.model == MINILM else ["q_proj", "v_proj"]


def folder_of(setting: Setting) -> Path:
    """Where the pre-trained encoder or decoder is."""
    minilm = setting.model == MINILM
    return DATA / "minilm-l6" if minilm else small_decoders.obtain(DATA, width_of(setting.model))


def width_of(model: str) -> int:
    """Of decoder-WIDTH."""
    return int(model.rpartition("-")[2])


def decoder(setting: Setting) -> Any:
    """The frozen decoder, in 8 bits if so wanted."""
    options: dict[str, Any] = {}
    if setting.bits == 8:
        options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder_of(setting), dtype=torch.float32, **options)


def encoded(texts: Sequence[str], model: str, length: int) -> list[list[int]]:
    """Token ids for a model."""
    if model == MINILM:
        encode: Any = AutoTokenizer.from_pretrained(DATA / "minilm-l6")
        ids: list[list[int]] = encode(list(texts), truncation=True, max_length=length)["input_ids"]
        return ids
    return small_decoders.token_ids(small_decoders.tokenizer(DATA, width_of(model)), list(texts), length)


@functools.lru_cache(maxsize=4)
def load_task(task: str, model: str, length: int, most: int) -> SmallTask:
    """Reads, splits and tokenises a task for a model; at most so many examples judge it, and nothing is tested on."""
    kind, rows = labelled(task)
    ids = encoded([text for text, _, _ in rows], model, length)
    parts = {False: Rows([], []), True: Rows([], [])}
    for (_, target, held_out), row in zip(rows, ids, strict=True):
        parts[held_out].ids.append(row)
        parts[held_out].targets.append(target)
    held = parts[True]
    chosen = torch.randperm(len(held.ids), generator=torch.Generator().manual_seed(1)).tolist()[:most]
    held = held.chosen(sorted(chosen, key=lambda i: len(held.ids[i])))
    classes = int(max(target for _, target, _ in rows)) + 1 if kind == "classes" else 1
    return SmallTask(kind, classes, parts[False], held, Rows([], []))


def labelled(task: str) -> tuple[str, list[tuple[str, float, bool]]]:
    """(kind, [(text, target, held out)])."""
    if task == BOOK:
        return "classes", [(row["text"], book, int(row["chapter"]) % 8 == 0) for row, book in book_rows(DATA)]
    if task == "passages":
        return "classes", passages()
    form, _, domain = task.rpartition("-")
    if task == "rating":
        form, domain = "rating", "movies"
    kind = form or "classes"
    reviews = []
    for row, held_out in domain_split(domain):
        rating = float(row["rating"])
        if kind != "classes" or rating != 0:
            reviews.append((row["text"], rating / 2 if kind == "rating" else float(rating > 0), held_out))
    return kind, reviews


def passages() -> list[tuple[str, float, bool]]:
    """Eight verses of one chapter in a row, and their book."""
    pieces, gathered = [], []
    rows = book_rows(DATA)
    for (row, book), (after, _) in zip(rows, [*rows[1:], rows[0]], strict=True):
        gathered.append(row["text"])
        if len(gathered) == PASSAGE or after["chapter"] != row["chapter"]:
            pieces.append((" ".join(gathered), float(book), int(row["chapter"]) % 8 == 0))
            gathered = []
    return pieces


def domain_split(domain: str) -> list[tuple[dict[str, str], bool]]:
    """The snippets of a domain, each with whether it is held out."""
    rows = domain_rows(DATA, domain)
    aside = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:HELD_OUT])
    return [(row, i in aside) for i, row in enumerate(rows)]


# Completions


@functools.lru_cache(maxsize=4)
def completions(domain: str, model: str, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids to train on and to judge by."""
    split = domain_split(domain)
    ids = encoded([row["text"] for row, _ in split], model, length)
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for row, (_, held_out) in zip(ids, split, strict=True):
        if len(row) >= 6:
            parts[held_out].append(row)
    return parts[0], sorted(parts[1][:HELD_LATER], key=len)


def completion(setting: Setting, seed: int) -> Problem:
    """The last two thirds of a text, given the first."""
    train, held = completions(setting.task.partition("-")[2], setting.model, setting.length)
    set_seed(seed)
    model = adapted(decoder(setting), setting, TaskType.CAUSAL_LM, narrow(setting))

    def loss(rows: Sequence[list[int]]) -> tuple[Tensor, int]:
        ids, mask = small_decoders.padded(list(rows), 0)
        labels = ids.masked_fill(mask == 0, IGNORED)
        for i, row in enumerate(rows):
            labels[i, : len(row) // 3] = IGNORED
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss, int((labels != IGNORED).sum())

    def judge() -> tuple[float, float]:
        return mean_loss(model, held, loss), 0.0

    return Problem(model, len(train), lambda chosen: loss([train[i] for i in chosen])[0], judge, has_head=False)


def mean_loss(model: Any, rows: Sequence[Any], loss: Callable[[Sequence[Any]], tuple[Tensor, int]]) -> float:
    """The loss over all rows, weighted by what `loss` counts."""
    model.eval()
    total = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 100):
            value, count = loss(rows[start : start + 100])
            total, weight = total + float(value) * count, weight + count
    model.train()
    return total / weight


# Preferences


@functools.lru_cache(maxsize=4)
def pairs(domain: str, model: str, length: int) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """[liked, disliked] in token ids, to train on and to judge by: snippets rated well above 0 and well below."""
    sides: dict[tuple[bool, bool], list[str]] = {(h, liked): [] for h in (False, True) for liked in (False, True)}
    for row, held_out in domain_split(domain):
        rating = float(row["rating"])
        if abs(rating) >= 1:
            sides[held_out, rating > 0].append(row["text"])
    parts = []
    for held_out in (False, True):
        liked, disliked = sides[held_out, True], sides[held_out, False]
        count = min(PAIRS if not held_out else 300, max(len(liked), len(disliked)))
        texts = [side[i % len(side)] for i in range(count) for side in (liked, disliked)]
        ids = encoded(texts, model, length)
        parts.append([ids[i : i + 2] for i in range(0, len(ids), 2)])
    return parts[0], parts[1]


def preference(setting: Setting, seed: int) -> Problem:
    """DPO (Rafailov et al., arXiv 2305.18290): the reference is the model without its adapter."""
    train, held = pairs(setting.task.partition("-")[2], setting.model, setting.length)
    set_seed(seed)
    model = adapted(decoder(setting), setting, TaskType.CAUSAL_LM, narrow(setting))

    def margins(rows: Sequence[list[list[int]]]) -> Tensor:
        ids, mask = small_decoders.padded([text for pair in rows for text in pair], 0)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        tokens = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums = (tokens * mask[:, 1:]).sum(1)
        return sums[0::2] - sums[1::2]

    with torch.no_grad(), model.disable_adapter():
        model.eval()
        reference = {id(pair): float(margins([pair])) for pair in (*train, *held)}
        model.train()

    def loss(rows: Sequence[list[list[int]]]) -> tuple[Tensor, int]:
        apart = margins(rows) - torch.tensor([reference[id(pair)] for pair in rows])
        return -torch.nn.functional.logsigmoid(BETA * apart).mean(), len(rows)

    def judge() -> tuple[float, float]:
        return mean_loss(model, held, loss), 0.0

    return Problem(model, len(train), lambda chosen: loss([train[i] for i in chosen])[0], judge, has_head=False)


# Labels of tokens


@functools.lru_cache(maxsize=1)
def capitalised() -> tuple[list[tuple[list[int], list[int]]], list[tuple[list[int], list[int]]]]:
    """(token ids, whether the word was written with a capital) of verses, to train on and to judge by.

    The tokenizer lowers all letters, so the capital can only be inferred. First words, and pieces of words other than
    the first, have no label.
    """
    encode: Any = AutoTokenizer.from_pretrained(DATA / "minilm-l6")
    parts: tuple[list[tuple[list[int], list[int]]], list[tuple[list[int], list[int]]]] = ([], [])
    rows = book_rows(DATA)[::8]
    for i, (row, _) in enumerate(rows):
        words = row["text"].split()
        tokens = encode(words, is_split_into_words=True, truncation=True, max_length=32)
        labels, before = [], None
        for word in tokens.word_ids():
            first = word is not None and word != before and word > 0
            labels.append(int(words[word][0].isupper()) if first else IGNORED)
            before = word
        parts[i % 6 == 0].append((tokens["input_ids"], labels))
    return parts[0], sorted(parts[1][:HELD_LATER], key=lambda row: len(row[0]))


def capitals(setting: Setting, seed: int) -> Problem:
    """Which words of a verse are written with a capital."""
    train, held = capitalised()
    set_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(folder_of(setting), num_labels=2)
    model = adapted(model, setting, TaskType.TOKEN_CLS, narrow(setting))

    def loss(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, int]:
        ids, mask = small_decoders.padded([row[0] for row in rows], 0)
        labels = small_decoders.padded([row[1] for row in rows], IGNORED)[0]
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss, int((labels != IGNORED).sum())

    def judge() -> tuple[float, float]:
        return mean_loss(model, held, loss), 0.0

    return Problem(model, len(train), lambda chosen: loss([train[i] for i in chosen])[0], judge)


# Encoder and decoder


def restore(setting: Setting, seed: int) -> Problem:
    """A text, given the same text without a third of its words."""
    from rates_pretrained import t5, with_gaps

    folder, tok = t5(DATA)
    domain = setting.task.partition("-")[2]
    parts: tuple[list[Any], list[Any]] = ([], [])
    for number, (row, held_out) in enumerate(domain_split(domain)):
        parts[held_out].append(with_gaps(tok, row["text"], number))
    train, held = parts[0], sorted(parts[1][:HELD_LATER], key=lambda row: len(row[1]))
    set_seed(seed)
    from transformers import T5ForConditionalGeneration

    model = adapted(T5ForConditionalGeneration.from_pretrained(folder), setting, TaskType.SEQ_2_SEQ_LM, ["q", "v"])

    def loss(rows: Sequence[Any]) -> tuple[Tensor, int]:
        ids, mask = small_decoders.padded([row[0] for row in rows], 0)
        labels = small_decoders.padded([row[1] for row in rows], IGNORED)[0]
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss, int((labels != IGNORED).sum())

    def judge() -> tuple[float, float]:
        return mean_loss(model, held, loss), 0.0

    return Problem(model, len(train), lambda chosen: loss([train[i] for i in chosen])[0], judge, has_head=False)


# Pictures


def digits(setting: Setting, seed: int) -> Problem:
    """Which of the digits 5 to 9 a noisy picture shows; the transformer was trained on 0 to 4."""
    from rates_pretrained import digit_rows, vit
    from transformers import ViTForImageClassification

    folder = vit(DATA)
    pictures, labels = digit_rows(first=5)
    held = torch.arange(len(labels)) % 4 == 0
    set_seed(seed)
    model: Any = ViTForImageClassification.from_pretrained(folder)
    model.classifier = torch.nn.Linear(model.config.hidden_size, 5)
    lora = LoraConfig(
        r=setting.rank, lora_alpha=setting.alpha, modules_to_save=["classifier"],  # type: ignore[arg-type]
        target_modules=r".*(q_proj|k_proj|v_proj|o_proj|query|key|value|dense|fc1|fc2)",
    )  # fmt: skip
    model = get_peft_model(model, lora)
    train_x, train_y, held_x, held_y = pictures[~held], labels[~held], pictures[held], labels[held]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y)

    def judge() -> tuple[float, float]:
        model.eval()
        with torch.no_grad():
            value = float(loss(held_x, held_y))
        model.train()
        return value, 0.0

    return Problem(model, len(train_y), lambda chosen: loss(train_x[list(chosen)], train_y[list(chosen)]), judge)


# The paper's toy model


class Toy(torch.nn.Module):
    """f(x) = w·φ(W φ(V x)), φ = SiLU; V (n, 5), W (n, n) and w (n) are random and frozen, W is adapted."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Linear(5, width, bias=False)
        self.hidden = torch.nn.Linear(width, width, bias=False)
        self.last = torch.nn.Linear(width, 1, bias=False)
        for layer in (self.first, self.hidden, self.last):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        silu = torch.nn.functional.silu
        return self.last(silu(self.hidden(silu(self.first(x))))).squeeze(-1)


def sine(setting: Setting, seed: int) -> Problem:
    """A sine along the diagonal of five inputs, with noise."""
    torch.manual_seed(seed)
    model = adapted(Toy(width_of(setting.model), seed), setting, None, ["hidden"])
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(1200, 5, generator=generator)
    y = torch.sin(x.sum(-1) / math.sqrt(5)) + 0.05 * torch.randn(1200, generator=generator)

    def loss(chosen: Sequence[int] | slice) -> Tensor:
        return torch.nn.functional.mse_loss(model(x[chosen]), y[chosen])

    def judge() -> tuple[float, float]:
        with torch.no_grad():
            return float(loss(slice(1000, None))), 0.0

    return Problem(model, 1000, lambda chosen: loss(list(chosen)), judge, has_head=False)


# What costs are measured on


def deep(setting: Setting, seed: int) -> Problem:
    """Random tokens for a Llama of 32 random layers, so that there are 224 adapted ones."""
    set_seed(seed)
    width = width_of(setting.model)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=8 * width // 3 // 32 * 32, num_hidden_layers=32,
        num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    model = adapted(LlamaForCausalLM(config), setting, TaskType.CAUSAL_LM, narrow(setting))
    rows = torch.randint(1000, (256, setting.length))

    def loss(chosen: Sequence[int]) -> Tensor:
        ids = rows[list(chosen)]
        return model(input_ids=ids, labels=ids).loss

    return Problem(model, len(rows), loss, lambda: (0.0, 0.0), has_head=False)
