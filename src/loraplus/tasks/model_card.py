"""The adapter's README.md: a model card in the form that the Hugging Face hub reads, filled from what the run knows."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import loraplus
from loraplus.errors import visible
from loraplus.files.paths import is_folder, resolve_model, user_path
from loraplus.rates import DEFAULT_LR, DEFAULT_LR_RATIO
from loraplus.tasks.command_line import command_line
from loraplus.tasks.config import CLASSIFICATION, MULTI_LABEL, OF_LABELS, REGRESSION, TrainConfig
from loraplus.tasks.loading_code import loading_code
from loraplus.tasks.scores import FIGURES

_WHAT = {
    CLASSIFICATION: "gives a text one of {count} classes",
    MULTI_LABEL: "gives a text any of {count} labels",
    REGRESSION: "gives a text a number",
    "sft": "answers chats and prompts",
    "lm": "goes on from a text",
}
_TITLES = {f"eval_{name}": title for name, title in FIGURES.items()} | {"eval_perplexity": "perplexity"}
_HUB_METRICS = {
    "eval_accuracy": "accuracy", "eval_micro_f1": "f1", "eval_macro_f1": "f1", "eval_mse": "mse", "eval_mae": "mae",
    "eval_r2": "r_squared", "eval_pearson": "pearsonr", "eval_perplexity": "perplexity", "eval_loss": "loss",
}  # fmt: skip
_MOST_CLASSES = 50
_LIBRARIES = ("torch", "transformers", "peft", "trl")
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def model_card(config: TrainConfig, metrics: Mapping[str, Any], scores: Mapping[str, Any], *, is_chat: bool) -> str:
    """The card as Markdown. Text from data and paths stands there as it is and is read as nothing else.

    Args:
        config: of the run.
        metrics: content of metrics.json.
        scores: content of scores.json; empty of language models.
        is_chat: whether prompts are turns of a chat.
    """
    name, data = Path(config.output).resolve().name, metrics["data"]
    labels = data.get("labels") or []
    adapter = str(Path(config.output).resolve())
    base = resolve_model(config.model)
    what = _WHAT[config.task].format(count=len(labels))
    parts = [
        f"# {plain(name)}",
        f"A LoRA adapter on {plain(config.model)} that {what}. It was trained with "
        f"[LoRA+](https://arxiv.org/abs/2402.12354) by loraplus {loraplus.__version__} on {plain(config.data)}.",
        *_scores_part(metrics, scores),
        "## How to load it",
        "The adapter is this folder. Where it or the base model is moved, change the names in the first lines.",
        fenced("python", loading_code(config, adapter, base, is_chat=is_chat)),
        "Or on the command line:",
        fenced("", _command(config, adapter)),
        *_data_part(config, data, labels),
        *_training_part(config, metrics),
        "## Versions",
        table(("library", "version"), _versions()),
        "## Settings",
        fenced("yaml", yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)),
    ]
    return f"---\n{_front_matter(config, metrics, name)}\n---\n\n" + "\n\n".join(parts) + "\n"


def is_unfilled(card: str) -> bool:
    """Whether a card is PEFT's own, which nobody has filled in."""
    return ModelCard.from_template(ModelCardData()).text.strip() in card


def plain(text: object) -> str:
    r"""Text for a sentence or a cell of Markdown, on one line, of which nothing is read as Markdown or HTML.

    Example:
        >>> plain("a|b <img> *c*")
        'a\\|b &lt;img&gt; \\*c\\*'
    """
    line = " ".join(visible(str(text), kept="").split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def fenced(language: str, code: str) -> str:
    """A code block that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    lines = [titles, ["---"] * len(titles), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _front_matter(config: TrainConfig, metrics: Mapping[str, Any], name: str) -> str:
    """What the hub reads; of a base model on this machine alone it could not find anything."""
    on_hub = not is_folder(user_path(config.model))
    is_labelled = config.task in OF_LABELS
    hub_task = "text-classification" if is_labelled else "text-generation"
    data = re.sub(r"[^\w.-]+", "-", Path(config.data).name, flags=re.ASCII).strip(".-") or "data"
    measured = [measure for measure in _HUB_METRICS if isinstance(metrics.get(measure), float)]
    results = [
        EvalResult(
            task_type=hub_task,
            dataset_type=data,
            dataset_name=visible(Path(config.data).name, kept=""),
            dataset_split="validation",
            metric_type=_HUB_METRICS[measure],
            metric_name=_TITLES[measure],
            metric_value=metrics[measure],
        )
        for measure in measured
    ]
    kept = ModelCardData(
        base_model=config.model if on_hub else None,
        library_name="peft",
        pipeline_tag=hub_task,
        tags=["lora", "loraplus", *([f"base_model:adapter:{config.model}"] if on_hub else [])],
        metrics=list(dict.fromkeys(_HUB_METRICS[measure] for measure in measured)),
        model_name=visible(name, kept="") or "adapter",
        eval_results=results,
    )
    return kept.to_yaml().strip()


def _scores_part(metrics: Mapping[str, Any], scores: Mapping[str, Any]) -> list[str]:
    base = metrics.get("base", {})
    count = scores.get("examples", metrics["data"]["validation_examples"])
    parts = ["## Scores"]
    if metrics.get("learnt", {}).get("learnt") is False:
        parts.append(
            "**Nothing was learnt:** the answers fit no better than shuffled ones (permutation test, "
            f"p = {metrics['learnt']['p_value']:.2g})."
        )
    frequent = ""
    if "majority_share" in metrics:
        frequent = f" Always the most frequent class would have an accuracy of {metrics['majority_share']:.4f}."
    parts.append(
        f"On {count} validation examples, by which the best checkpoint (step {metrics['best_step']} of "
        f"{metrics['steps']}) was chosen.{frequent}"
    )
    rows = [
        (title, _figure(base.get(measure)), _figure(metrics[measure]))
        for measure, title in _TITLES.items()
        if measure in metrics
    ]
    parts.append(table(("measure", "base model", "with the adapter"), rows))
    each = scores.get("per_class") or scores.get("per_label") or []
    if each:
        shown = [
            (row["label"], *(f"{row[part]:.3f}" for part in ("precision", "recall", "f1")), row["support"])
            for row in each[:_MOST_CLASSES]
        ]
        parts.append(table(("label", "precision", "recall", "F1", "support"), shown))
    if len(each) > _MOST_CLASSES:
        parts.append(f"And {len(each) - _MOST_CLASSES} more, in scores.json.")
    return parts


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _command(config: TrainConfig, adapter: str) -> str:
    if config.task in OF_LABELS:
        return command_line("predict", adapter=adapter, data="new.csv", output="labelled.csv")
    return command_line("generate", adapter=adapter, prompt="Hello")


def _data_part(config: TrainConfig, data: Mapping[str, Any], labels: Sequence[Any]) -> list[str]:
    rows: list[tuple[str, object]] = [("source", config.data)]
    if config.eval_data:
        rows.append(("validation data", config.eval_data))
    for title, key in (
        ("text column", "text_column"), ("label column", "label_column"), ("format", "format"),
        ("loss on", "loss_on"), ("training examples", "train_examples"),
        ("validation examples", "validation_examples"), ("duplicates removed", "duplicates_removed"),
        ("training tokens", "train_tokens"), ("of these learnt", "train_target_tokens"),
        ("longest example, in tokens", "max_length"), ("SHA-256 of texts and labels", "sha256"),
    ):  # fmt: skip
        if key in data:
            rows.append((title, data[key]))
    if "target_range" in data:
        low, high = data["target_range"]
        rows.append(("numbers", f"{low:g} to {high:g}, mean {data['target_mean']:.4g}"))
    parts = ["## Data", table(("what", "value"), rows)]
    counts = data.get("train_class_counts") or {}
    if counts and labels:
        shown = [(label, counts.get(label, 0)) for label in labels[:_MOST_CLASSES]]
        parts.append(table(("label", "training examples"), shown))
    return parts


def _training_part(config: TrainConfig, metrics: Mapping[str, Any]) -> list[str]:
    lr, ratio = metrics["lr"], metrics["lr_ratio"] or 0.0
    rates = f"η_A = {lr:.3g} and η_B = {metrics.get('lr_b', lr * ratio):.3g} (λ = {ratio:.3g})"
    if metrics["auto"]:
        why = f": {metrics['auto_why']}" if metrics.get("auto_why") else ""
        chosen = f"set automatically while training, from how far each step moves the layers; as last measured{why}"
    else:
        flags = {"--lr": lr == DEFAULT_LR, "--lr-ratio": ratio == DEFAULT_LR_RATIO}
        how = (f"{flag} {'at its default' if is_default else 'given'}" for flag, is_default in flags.items())
        chosen = f"{', '.join(how)}; this run searched for no better ones"
    rows: list[tuple[str, object]] = [
        ("rates", rates),
        ("how they were chosen", chosen),
        ("schedule", f"{config.lr_scheduler_type}, warm-up over {config.warmup_ratio:.0%} of the steps"),
        ("steps", f"{metrics['steps']} of {metrics['batch_size']} examples, in {metrics['train_seconds']:.0f} s"),
        ("adapter", f"rank {config.rank}, alpha {config.alpha:g}, dropout {config.lora_dropout:g}"),
        ("seed", config.seed),
    ]
    if config.head_rate is not None:
        rows.insert(
            2, ("rate of the head", f"{config.head_rate:.3g}; it is trained in full and saved with the adapter")
        )
    groups = [
        (row["name"], row["role"], "–" if row["base_lr"] is None else f"{row['base_lr']:.4g}", f"{row['parameters']:,}")
        for row in metrics["groups"]
    ]
    return [
        "## Training",
        table(("what", "value"), rows),
        "The rate of every group of parameters, before the schedule:",
        table(("group", "role", "rate", "parameters"), groups),
    ]


def _versions() -> list[tuple[str, str]]:
    versions = [("Python", platform.python_version()), ("loraplus", loraplus.__version__)]
    for library in _LIBRARIES:
        try:
            versions.append((library, importlib.metadata.version(library)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
