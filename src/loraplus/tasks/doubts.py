"""Settings that a run can have and that are probably not what was meant. Each doubt says what to do."""

from __future__ import annotations

from loraplus.tasks.config import CompareConfig, TaskConfig, TrainConfig

_HIGHEST_LR, _HIGHEST_LR_B, _LOWEST_LR = 0.05, 0.5, 1e-6
_MOST_PASSES, _FEWEST_STEPS = 50, 10


def doubts_of_settings(config: TaskConfig, steps: int, train_examples: int) -> list[str]:
    """What is doubtful about a run's settings.

    Args:
        config: of the run.
        steps: that it has.
        train_examples: likewise.

    Example:
        >>> doubts_of_settings(TrainConfig(lr=10.0), 100, 1000)[0]
        '--lr 10 is far above what adapters train with (1e-5 to 1e-2); it will likely diverge: leave it out'
    """
    return [*_of_rates(config), *_of_length(config, steps, train_examples), *_of_shares(config)]


def _of_rates(config: TaskConfig) -> list[str]:
    doubts = []
    name, lr = ("--untuned-lr", config.untuned_lr) if isinstance(config, CompareConfig) else ("--lr", None)
    ratio = getattr(config, "lr_ratio", 1.0)
    if isinstance(config, TrainConfig) and not isinstance(config.lr, str):
        lr = config.lr
    if lr is not None and lr > _HIGHEST_LR:
        doubts.append(
            f"{name} {lr:g} is far above what adapters train with (1e-5 to 1e-2); it will likely diverge: leave it out"
        )
    elif lr is not None and lr * ratio > _HIGHEST_LR_B:
        doubts.append(
            f"B learns at {lr * ratio:g} ({name} {lr:g} times --lr-ratio {ratio:g}), where a loss often diverges; take "
            f"a smaller {name} or --lr-ratio"
        )
    elif lr is not None and lr < _LOWEST_LR:
        doubts.append(f"{name} {lr:g} is so small that little will be learnt: leave it out")
    if config.head_rate is not None and config.head_rate > _HIGHEST_LR:
        doubts.append(f"--lr-head {config.head_rate:g} is far above usual rates (1e-4 to 1e-2); leave it out")
    return doubts


def _of_length(config: TaskConfig, steps: int, train_examples: int) -> list[str]:
    doubts = []
    passes = steps * config.batch_size / train_examples
    if passes > _MOST_PASSES:
        doubts.append(
            f"{steps} steps pass {passes:.0f} times over {train_examples} training examples, which are then known by "
            "heart; take fewer --max-steps or --epochs"
        )
    if steps < _FEWEST_STEPS:
        doubts.append(
            f"{steps} step{'' if steps == 1 else 's'} of {config.batch_size} examples are few to learn from; take more "
            "--max-steps or --epochs, or a smaller --batch-size"
        )
    if config.batch_size > train_examples:
        doubts.append(f"--batch-size {config.batch_size} is more than the {train_examples} training examples")
    return doubts


def _of_shares(config: TaskConfig) -> list[str]:
    doubts = []
    for name, value, most in (
        ("--lora-dropout", config.lora_dropout, 0.5),
        ("--warmup-ratio", config.warmup_ratio, 0.5),
        ("--weight-decay", config.weight_decay, 1.0),
        ("--eval-fraction", config.eval_fraction if config.eval_data is None else 0.0, 0.5),
        ("--alpha over --rank", config.alpha / config.rank, 32.0),
    ):
        if value > most:
            doubts.append(f"{name} {value:g} is above {most:g}, which is more than runs usually have")
    return doubts
