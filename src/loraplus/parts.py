"""The parts that trainable parameters play. It needs no torch, so that rates can be checked before it is imported."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """The part a trainable parameter plays; the value names its optimizer group and its log entry."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    EMBEDDING = "embedding"  # whole embedding tables and trainable token rows
    MAGNITUDE = "magnitude"  # DoRA's magnitude vector
    HEAD = "head"  # modules trained in full beside the adapter (`modules_to_save`)
    NORM_BIAS = "norm_bias"
    OTHER = "other"


FACTORS = frozenset({Role.A, Role.B, Role.EMBEDDING_A, Role.EMBEDDING_B})
EMBEDDINGS = frozenset({Role.EMBEDDING, Role.EMBEDDING_A, Role.EMBEDDING_B})
