"""`loraplus train`"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_train, show_next
from loraplus.cli.options import config_command
from loraplus.cli.seen import show
from loraplus.cli.terminal import Console, narrated, print_json
from loraplus.files.commands import SCORES_FILE
from loraplus.rates import AUTO
from loraplus.tasks.config import OF_LABELS, TrainConfig

_SHOWN = (
    "eval_loss",
    "eval_accuracy",
    "eval_micro_f1",
    "eval_macro_f1",
    "eval_mse",
    "eval_mae",
    "eval_r2",
    "eval_pearson",
    "eval_perplexity",
)


def _check_ratio(config: TrainConfig, typed: Collection[str]) -> None:
    """Refuses a ratio that was typed beside automatic rates, be it the one that every saved file has."""
    if config.lr == AUTO and "lr_ratio" in typed:
        from loraplus.tasks.checks import ratio_beside_automatic

        raise ratio_beside_automatic(config.lr_ratio)


@config_command(
    app,
    "train",
    TrainConfig,
    check=_check_ratio,
    examples=examples(
        "loraplus train --model MODEL --data reviews.csv --output runs/reviews",
        "loraplus train --task sft --model MODEL --data chats.jsonl --output runs/chat --lr 2e-4 --lr-ratio 16",
    ),
)
def run(config: TrainConfig, *, overwrite: bool, resume: bool, json: bool, plain: bool) -> None:
    """Train a text classifier or a language model (--task) with LoRA+ and write a PEFT-format adapter."""
    from loraplus.cli.console import TrainingProgress, quiet_libraries

    quiet_libraries()
    from loraplus.report.live_training import LiveTraining
    from loraplus.tasks.data_parallel import is_main_process
    from loraplus.tasks.train import train

    if not is_main_process():
        train(config, overwrite=overwrite, resume=resume)
        return
    console = Console(stderr=json, plain=plain)
    with narrated(console, doubts=not json), TrainingProgress(console, plain=plain) as progress:
        metrics = train(
            config,
            overwrite=overwrite,
            resume=resume,
            callbacks=[progress, LiveTraining(asdict(config))],
            on_seen=None if json else partial(show, console),
        )
    report = None
    if config.task not in OF_LABELS or (Path(config.output) / SCORES_FILE).is_file():  # earlier versions wrote none
        from loraplus.report.training import write_report

        report = write_report(config.output)
    if json:
        print_json(metrics)
    else:
        _print_result(console, config.output, metrics)
        if report:
            console.say(f"report: {report}")
        show_next(console, *after_train(config, metrics))


def _print_result(console: Console, output: str, metrics: dict[str, Any]) -> None:
    from loraplus.tasks.learnt import ADVICE

    measures = [name for name in _SHOWN if name in metrics]
    console.say(
        " · ".join(f"{name} {metrics[name]:.4f}" for name in measures) + " after "
        f"{metrics['steps']} steps (best at {metrics['best_step']}), {metrics['seconds_per_step']:.3g} s a step"
    )
    if "majority_share" in metrics:
        console.say(f"always the most frequent class: accuracy {metrics['majority_share']:.4f}")
    if metrics.get("learnt", {}).get("learnt") is False:
        console.say(
            f"nothing was learnt: the answers fit no better than shuffled ones (permutation test, p = "
            f"{metrics['learnt']['p_value']:.2g}); {ADVICE}"
        )
    console.say(_about_rates(metrics))
    console.say(_about_groups(metrics))
    data = metrics["data"]
    about = (
        _about_tokens(data, metrics["packing"])
        if "packing" in metrics
        else _about_labels(data, "eval_micro_f1" in metrics)
    )
    console.say(
        f"data: {data['train_examples']} training and {data['validation_examples']} validation examples, {about}"
    )
    console.say(f"adapter: {Path(output)}")


def _about_rates(metrics: dict[str, Any]) -> str:
    """The rates, and of automatic ones what held them, and the flags that train near them without."""
    lr, ratio = metrics["lr"], metrics["lr_ratio"] or 0.0
    rates = f"rates: η_A {lr:.3g} · η_B {metrics.get('lr_b', lr * ratio):.3g}"
    rates += f" (λ = {ratio:.3g})" if ratio else ""
    if not metrics["auto"]:
        return rates
    why = f": {metrics['auto_why']}" if "auto_why" in metrics else ""
    flags = f"; near them without: --lr {lr:.3g} --lr-ratio {ratio:.3g}" if lr and ratio else ""
    return f"{rates}, set automatically, as last measured{why}{flags}"


def _about_groups(metrics: dict[str, Any]) -> str:
    """What learnt at which rate, read off the optimizer; rates that were given as numbers have been verified."""
    from loraplus.integrations.proof import rates_in_words

    return f"{'trained' if metrics['auto'] else 'verified'}: {rates_in_words(metrics['groups'])}"


def _about_labels(data: dict[str, Any], several: bool) -> str:
    """What was counted; `several`: a text has any number of labels."""
    what = f"{len(data['labels'])} {'labels' if several else 'classes'}, " if "labels" in data else ""
    return (
        f"{what}{data['duplicates_removed']} duplicates removed, "
        f"max length {data['max_length']} ({data['truncated_train_examples']} texts cut)"
    )


def _about_tokens(data: dict[str, Any], packing: bool) -> str:
    from loraplus.tasks.seen import longer_ones

    long = longer_ones(data)
    left_out = f", {data['examples_dropped']} left without a token to learn" if data["examples_dropped"] else ""
    return (
        f"{data['duplicates_removed']} duplicates removed; {data['train_target_tokens']} of {data['train_tokens']} "
        f"training tokens learnt (loss on {data['loss_on']}); max length {data['max_length']}, {long}{left_out}; "
        f"{'packed' if packing else 'padded'} batches"
    )
