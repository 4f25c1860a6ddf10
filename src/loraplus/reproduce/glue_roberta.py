"""RoBERTa-base on GLUE as published; at --scale cpu MiniLM, a six-layer BERT, on four domains of rated snippets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplus.reproduce import assets
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.glue_arms import GlueArms


@dataclass(frozen=True)
class GlueRoberta(GlueArms):
    """LoRA against LoRA+ with an encoder."""

    domains: tuple[str, ...] = ("tweets", "products", "movies", "editorials")

    name = "glue-roberta"
    title, claims, scales = DESCRIPTIONS[name]
    assets = ("minilm-l6", "rated-snippets")
    published_model = "FacebookAI/roberta-base"
    published_targets = small_targets = "query,value"
    small_steps, small_batch = 300, 16
    first_step = 8

    def small_model(self) -> Path:
        return Path(self.data) / assets.ASSETS["minilm-l6"].target
