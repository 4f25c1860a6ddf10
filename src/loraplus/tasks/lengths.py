"""How long a run is, and how much of it is evaluation."""

from __future__ import annotations

import math

from loraplus.tasks.config import TaskConfig

MOST_EVALUATIONS, FEWEST_EVALUATIONS = 10, 3
LARGEST_SHARE = 0.2
"""Largest share of a run's time for evaluation, unless the user asks for more."""
COST = 0.5
"""Time to evaluate an example, where training on it takes 1: the backward pass takes about as long as the forward pass,
since frozen weights need no gradient."""
FEWEST_EXAMPLES = 32


def steps_of(config: TaskConfig, train_examples: int) -> int:
    """Optimizer steps of a run: --max-steps, else those of --epochs."""
    if config.max_steps is not None:
        return config.max_steps
    micro_batches = math.ceil(train_examples / (config.batch_size // config.gradient_accumulation_steps))
    return max(1, math.ceil(math.ceil(micro_batches / config.gradient_accumulation_steps) * config.epochs))


def steps_between_evaluations(steps: int, batch_size: int, validation_examples: int) -> int:
    """The default distance of evaluations: ten in a run, or as many as a fifth of its time allows.

    A curve has at least three points, whatever they take. The last is the end of the run.

    Args:
        steps: of the run.
        batch_size: training examples a step.
        validation_examples: that each evaluation reads.

    Example:
        >>> steps_between_evaluations(100, 32, 160), steps_between_evaluations(100, 32, 320)
        (10, 20)
    """
    usual = max(1, steps // MOST_EVALUATIONS)
    most = max(FEWEST_EVALUATIONS, int(_affordable(steps * batch_size) / validation_examples))
    if math.ceil(steps / usual) <= most:
        return usual
    every = math.ceil(steps / most)
    while every > 1 and math.ceil(steps / every) < FEWEST_EVALUATIONS:
        every -= 1
    return every


def most_validation_examples(config: TaskConfig, train_examples: int) -> int | None:
    """How many validation examples to use at most: --max-eval-samples, else what a short run has the time for.

    Validation data of its own (--eval-data) is used whole: somebody chose its size.

    Args:
        config: of the run.
        train_examples: that it has.
    """
    if config.max_eval_samples is not None or config.eval_data is not None:
        return config.max_eval_samples
    trained = steps_of(config, train_examples) * config.batch_size
    return max(FEWEST_EXAMPLES, int(_affordable(trained) / FEWEST_EVALUATIONS))


def _affordable(trained: int) -> float:
    """How many examples can be evaluated in a run that trains on so many."""
    return trained * LARGEST_SHARE / (1 - LARGEST_SHARE) / COST
