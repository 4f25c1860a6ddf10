"""GPT-2 on GLUE as published; at --scale cpu the decoder of width 128 that is pre-trained here, all layers adapted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplus.reproduce import small_decoders
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.glue_arms import GlueArms
from loraplus.reproduce.small_tasks import BOOK

_WIDTH = 128


@dataclass(frozen=True)
class GlueGpt2(GlueArms):
    """LoRA against LoRA+ with a decoder."""

    domains: tuple[str, ...] = ("tweets", "movies", BOOK, "products", "editorials")

    name = "glue-gpt2"
    title, claims, scales = DESCRIPTIONS[name]
    assets = ("rated-snippets", "verses")
    published_model = "openai-community/gpt2"
    published_targets = "c_attn,c_proj,c_fc"
    small_targets = "all-linear"
    small_steps, small_batch = 300, 32
    first_step = 0  # with every layer adapted, runs at 3e-3 and more fall back to the majority class

    def small_model(self) -> Path:
        return small_decoders.folder_of(Path(self.data), _WIDTH)

    def obtain_small_model(self) -> None:
        small_decoders.obtain(Path(self.data), _WIDTH)
