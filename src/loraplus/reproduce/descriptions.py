"""What each experiment is, in words; here, so that they can be listed without importing what they run with."""

from __future__ import annotations

from typing import NamedTuple


class Description(NamedTuple):
    """Of an experiment.

    Args:
        title: What it is.
        claims: What of the paper it tests, a sentence each.
        scales: At which it runs: cpu, paper.
    """

    title: str
    claims: tuple[str, ...]
    scales: tuple[str, ...] = ("cpu",)


_OF_GLUE = (
    "The best (η_A, η_B) lies above the diagonal.",
    "LoRA+ is 1–2% better than tuned LoRA.",
    "LoRA+ needs up to two times fewer steps to the same quality.",
)
_OF_LLAMA = ("The best (η_A, η_B) lies above the diagonal.", "LoRA+ is 1–2% better than the best LoRA.")

DESCRIPTIONS = {
    "toy": Description(
        "The toy model: the best η_A and η_B, and how they move with the width",
        (
            "The best (η_A, η_B) lies off the diagonal, on the side of η_B > η_A.",
            "With Adam the best rates go as η_A = Θ(1/n) and η_B = Θ(1), so the best ratio grows with the width n.",
        ),
    ),
    "coordinates": Description(
        "δ1 and δ2 over the width: the condition for efficient feature learning, measured",
        (
            "With one rate for A and B, δ1 and δ2 cannot both stay of order 1 as the width grows.",
            "With η_A = Θ(1/n) and η_B = Θ(1) they do.",
        ),
    ),
    "glue-roberta": Description("RoBERTa-base on GLUE", _OF_GLUE, ("cpu", "paper")),
    "glue-gpt2": Description("GPT-2 on GLUE", _OF_GLUE, ("cpu", "paper")),
    "llama-mnli": Description("Llama-7b on MNLI", _OF_LLAMA, ("paper",)),
    "llama-flan": Description("Llama-7b on Flan-v2, evaluated on MMLU", _OF_LLAMA, ("paper",)),
    "decoder": Description(
        "Small decoders moved to another domain",
        (
            "The best (η_A, η_B) lies above the diagonal, the more so the wider the model.",
            "LoRA+ ends better than tuned LoRA.",
            "LoRA+ needs up to two times fewer steps to the same quality.",
        ),
    ),
    "init": Description(
        "Which factor starts at random, rank and α",
        (
            "B zero and A random allows other rates than the reverse, and ends better (companion question).",
            "Under which rule for α the best rate stays where it is when the rank changes (companion question).",
        ),
    ),
}
