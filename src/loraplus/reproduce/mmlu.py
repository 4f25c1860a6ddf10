"""MMLU: accuracy by the likelihood of the answer's letter as the next token; from the hub or a folder of its format."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loraplus.errors import InputError
from loraplus.files.paths import user_path
from loraplus.reproduce.glue import read_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_NAME = "cais/mmlu"
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question with four choices and the place of the right one."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int

    def asked(self, with_answer: bool) -> str:
        """The question as the model reads it."""
        lines = [self.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))]
        return "\n".join([*lines, f"Answer: {LETTERS[self.answer]}" if with_answer else "Answer:"])


def questions(source: str, split: str) -> list[Question]:
    """A split: columns subject, question, choices (four) and answer (0 to 3).

    Raises:
        InputError: it cannot be had, or is not of this form.
    """
    columns = read_split(source, "all", split, folder=user_path(source))
    names = ("subject", "question", "choices", "answer")
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"{source}: MMLU's {split} has no column {missing[0]!r}; it has {', '.join(columns)}")
    read = []
    for place, (subject, text, choices, answer) in enumerate(zip(*(columns[name] for name in names), strict=True), 1):
        if not isinstance(choices, (list, tuple)) or len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
            raise InputError(f"{source}: row {place} of MMLU's {split} needs four choices and an answer from 0 to 3")
        read.append(Question(str(subject), str(text), tuple(map(str, choices)), int(answer)))
    return read


def prompt(question: Question, examples: list[Question]) -> str:
    """The usual prompt: a line on the subject, solved examples, the question.

    Example:
        >>> print(prompt(Question("law", "Who?", ("a", "b", "c", "d"), 0), []))
        The following are multiple choice questions (with answers) about law.
        <BLANKLINE>
        Who?
        A. a
        B. b
        C. c
        D. d
        Answer:
    """
    about = question.subject.replace("_", " ")
    parts = [f"The following are multiple choice questions (with answers) about {about}."]
    return "\n\n".join([*parts, *(example.asked(True) for example in examples), question.asked(False)])


def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Question], solved: list[Question], shots: int
) -> float:
    """The part of the questions whose right letter is the likeliest of the four as the next token.

    Args:
        model, tokenizer: a causal language model.
        asked: the questions.
        solved: those that examples are taken from, by subject.
        shots: examples in a prompt; as many as there are at most.
    """
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for question in solved:
        by_subject[question.subject].append(question)
    letters = [_letter_id(tokenizer, letter) for letter in LETTERS]
    right = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for question in asked:
            text = prompt(question, by_subject[question.subject][:shots])
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
            scores = model(input_ids=ids).logits[0, -1, letters]
            right += int(scores.argmax()) == question.answer
    model.train(was_training)
    return right / len(asked)


def _letter_id(tokenizer: PreTrainedTokenizerBase, letter: str) -> int:
    """The token of a letter that follows "Answer:" and a space."""
    ids = tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"]
    return int(ids[-1])
