"""What a training run and a comparison are configured by; every field is a flag and a YAML key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from loraplus.errors import InvalidRateError
from loraplus.rate_keywords import rate_fields
from loraplus.rates import AUTO, DEFAULT_LR, DEFAULT_LR_HEAD, DEFAULT_LR_RATIO

DEFAULT_TUNING_RUNS = 4
# What a study keeps is wider, so that a search that begins within these has room to move.
LOWEST_LR, HIGHEST_LR, HIGHEST_LR_RATIO = 1e-10, 1e3, 1e6
DEFAULT_ARMS = "lora,loraplus"
CLASSIFICATION, REGRESSION, MULTI_LABEL = "classification", "regression", "multi-label"
OF_LABELS = (CLASSIFICATION, REGRESSION, MULTI_LABEL)
"""Tasks of texts with labels, which train a new head; all others train a language model."""
ON_ALL, ON_COMPLETION, ON_ASSISTANT = "all", "completion", "assistant"
LOSS_ON = (ON_ALL, ON_COMPLETION, ON_ASSISTANT)
CUT, DROP, SPLIT = "cut", "drop", "split"
LONG_EXAMPLES = (CUT, DROP, SPLIT)


def _option(default: object, help: str, *flags: str, parser: Callable[[str], Any] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "flags": flags, "parser": parser})


def learning_rate(text: str) -> float | str:
    """A number, or "auto".

    Raises:
        InvalidRateError: neither.
    """
    if str(text).strip().lower() == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise InvalidRateError(f'--lr must be a number or "auto", got {text!r}') from None


def check_held(option: str, value: float, lowest: float, highest: float) -> None:
    """Refuses a rate or ratio outside the range that a search starts from.

    Raises:
        InvalidRateError: names the option.
    """
    if not lowest <= value <= highest:
        raise InvalidRateError(f"{option} must lie between {lowest:g} and {highest:g}, got {value:g}")


@dataclass(kw_only=True)
class _RunConfig:
    """Data, model, adapter and training length: all that a run needs but its rates."""

    task: str = _option(
        CLASSIFICATION,
        "classification; regression: a number a text; multi-label: any labels a text; sft: chats, prompts with "
        "completions, or texts; lm: texts. The last two train a decoder.",
    )
    model: str = _option("", "Model folder, or a name on the hub.")
    data: str = _option(
        "",
        "CSV, TSV, JSON Lines, Excel or Parquet file (or .gz), folder (CLASS/*.txt, or of `datasets`), or hub dataset.",
    )
    eval_data: str | None = _option(
        None, "Validation data; without it a part of --data is kept aside, stratified by class."
    )
    text_column: str | None = _option(None, "Column with the text; guessed if not given.")
    label_column: str | None = _option(
        None,
        "Column with the label or number (multi-label: or several of 0 and 1, comma-separated); guessed if not given.",
    )
    prompt_column: str | None = _option(
        None, "sft: column with what is asked. Default: prompt, instruction (with input), question, …"
    )
    completion_column: str | None = _option(
        None, "sft: column with what is answered. Default: completion, output, answer, response."
    )
    messages_column: str | None = _option(None, "sft: column with chats. Default: messages, conversations.")
    encoding: str | None = _option(
        None, "Encoding of text files, such as cp1252. Default: UTF-8 or UTF-16; others are guessed, and that is said."
    )
    loss_on: str | None = _option(
        None,
        "sft: the tokens to learn: all, completion (of prompt/completion data) or assistant (turns of a chat). "
        "Default: completion where there is one, else all.",
    )
    packing: bool | None = _option(
        None,
        "sft and lm: put several examples of a batch into one row, kept apart. Default: on a GPU, where the model can "
        "keep them apart.",
    )
    long_examples: str | None = _option(
        None, "sft and lm: cut, drop or (lm) split what is longer than --max-length. Default: sft cut, lm split."
    )
    chat_template: str | None = _option(
        None, "sft: Jinja file to use instead of the tokenizer's own chat template; saved with the adapter."
    )
    load_in_4bit: bool = _option(False, "sft and lm: keep the base model in 4 bits (bitsandbytes).")
    output: str = _option("", "Folder to write to.")
    rank: int = _option(8, "Rank r of the adapter.")
    alpha: float = _option(16.0, "α of the adapter; its output is scaled by α / r.")
    lora_dropout: float = _option(0.0, "Dropout on the adapter's input.")
    target_modules: str | None = _option(
        None, "Layers to adapt: comma-separated names or all-linear. Default: what PEFT adapts in this architecture."
    )
    use_rslora: bool = _option(False, "Scale by α / √r (rsLoRA).")
    use_dora: bool = _option(False, "Learn magnitudes apart (DoRA).")
    weight_decay: float = _option(0.0, "Decoupled weight decay, not on biases and norms.")
    warmup_ratio: float = _option(0.06, "Part of the steps over which the rate rises linearly.")
    lr_scheduler_type: str = _option("linear", "Schedule after warm-up, any of transformers' names.")
    max_length: int | None = _option(
        None, "Tokens of the longest example. Default: covers 99% of the texts; sft and lm: all, up to 1024."
    )
    max_steps: int | None = _option(None, "Optimizer steps; overrides --epochs.")
    epochs: float = _option(3.0, "Passes over the training data.")
    batch_size: int = _option(32, "Examples a step, over all processes.")
    eval_batch_size: int = _option(64, "Examples at once in evaluation, in each process.")
    gradient_accumulation_steps: int = _option(1, "Parts that a step's batch is computed in, one after another.")
    eval_fraction: float = _option(0.1, "Part of --data kept for validation when --eval-data is not given.")
    max_eval_samples: int | None = _option(
        None,
        "Use at most so many validation examples (stratified, by seed). Default: all; in a short run as many of --data "
        "as can be evaluated three times in a fifth of its time.",
    )
    eval_steps: int | None = _option(
        None,
        "Steps between evaluations. Default: ten in a run; fewer, but three, where they took over a fifth of it.",
    )
    seed: int = _option(0, "Seed of the splits, of initialisation and of data order.")
    bf16: bool = _option(False, "Compute in bfloat16 where it pays.")
    speed_up: bool = _option(
        True, "Compute the same gradients in less time and memory (loraplus.speed_up); --no-speed-up computes as PEFT."
    )
    trust_remote_code: bool = _option(False, "Run code that comes with the model. Only for models you trust.")


# Flags made from the fields of `Rates`: those that every run may have, and those that only one run has, since a
# comparison and a search set the ratio themselves.
_RateFlags: Any = make_dataclass("_RateFlags", rate_fields(sets_ratio=False, overrides=str | None), kw_only=True)
_RatioFlags: Any = make_dataclass("_RatioFlags", rate_fields(sets_ratio=True, overrides=str | None), kw_only=True)


@dataclass(kw_only=True)
class TaskConfig(_RateFlags, _RunConfig):
    """What every run needs: data, model, adapter, training length, and the rates that nothing searches."""

    lr_head: float = _option(DEFAULT_LR_HEAD, "Rate of the new classification head; sft and lm have none.")

    @property
    def head_rate(self) -> float | None:
        """`lr_head` where the task trains a head; a decoder's output layer stays as it is."""
        return self.lr_head if self.task in OF_LABELS else None


@dataclass(kw_only=True)
class _LrFlag:
    """A class of its own, so that --lr comes before --lr-ratio in --help and in printed commands."""

    lr: float | str = _option(
        None,  # until a configuration is made, which fills it in
        f"η_A, the rate of A, or auto: both rates are set while training. Default: auto, or {DEFAULT_LR:g} with "
        "--lr-ratio.",
        parser=learning_rate,
    )


@dataclass(kw_only=True)
class _ReportFlag:
    report_to: str = _option(
        "none", "Send losses and rates to tensorboard (logs/ in --output), trackio or wandb, comma-separated; or none."
    )


@dataclass(kw_only=True)
class TrainConfig(_ReportFlag, _RatioFlags, _LrFlag, TaskConfig):
    """One training run; rates that are not given are filled in when it is made."""

    lr_ratio: float = _option(
        None, f"λ = η_B / η_A of rates that are numbers; 1 is plain LoRA. Default: {DEFAULT_LR_RATIO:g}."
    )
    samples: int = _option(3, "sft and lm: validation prompts that base and adapter answer in the report; 0 for none.")

    def __post_init__(self) -> None:
        if self.lr is None:
            self.lr = AUTO if self.lr_ratio is None and not self.lr_ratio_overrides else DEFAULT_LR
        if self.lr_ratio is None:
            self.lr_ratio = DEFAULT_LR_RATIO


@dataclass(kw_only=True)
class CompareConfig(_ReportFlag, TaskConfig):
    """LoRA against LoRA+ and other methods; what has rates to tune is tuned with the same number of runs."""

    arms: str = _option(DEFAULT_ARMS, "What to compare with LoRA, comma-separated: $arms.")  # the command fills in
    test_data: str | None = _option(None, "Test data; without it a stratified part of --data is kept aside.")
    test_fraction: float = _option(0.2, "Part of --data kept for the test when --test-data is not given.")
    max_test_samples: int | None = _option(None, "Use at most so many test examples (stratified, by seed).")
    tuning_runs: int = _option(8, "Tuning runs for each arm that has rates to tune.")
    seeds: int = _option(
        5, "Fresh seeds on which each arm's winner is trained and tested. Fewer than 3 give no verdict."
    )
    lr_ratio: float = _option(
        DEFAULT_LR_RATIO, "λ at which tuning of LoRA+ starts, of its untuned run, and of $arms_at_ratio."
    )
    untuned_lr: float = _option(DEFAULT_LR, "Rate η_A of both arms in the untuned picture.")
    workers: int | None = _option(None, "Runs side by side. Default: one a core up to 2 on a CPU, one on a GPU.")


@dataclass(kw_only=True)
class TuneConfig(_ReportFlag, TaskConfig):
    """A search for η_A and λ within a budget."""

    tuning_runs: float | None = _option(
        None,
        f"Budget: the cost of so many runs of full length. Default: {DEFAULT_TUNING_RUNS}, unless --minutes is given.",
    )
    minutes: float | None = _option(None, "Budget: minutes of training, added up over all runs.")
    storage: str | None = _option(
        None,
        "Journal file or URL (postgresql://…) of the study. Processes with the same --storage and the same settings, "
        "each with an --output of its own, work on one study. Default: a journal in --output.",
    )
    study: str = _option("loraplus-tune", "Name of the study within --storage.")
    workers: int | None = _option(None, "Runs side by side. Default: one a core up to 2 on a CPU, one on a GPU.")


@dataclass(kw_only=True)
class BenchConfig(TaskConfig):
    """A comparison of speed and memory with PEFT and Trainer; without a model of the user's, on built-in ones."""

    output: str = _option("", "File that the results are written to, as JSON.")
    minutes: float = _option(6.0, "Time for all, about.")
    rows: str | None = _option(
        None, "Built-in models to run, comma-separated: reviews, encoder, decoder, masked. Default: all."
    )
    ablation: bool = _option(False, "Ours with each lever alone, and with each left out, in place of PEFT's arms.")
    memory: bool = _option(True, "Measure memory, too (in a process of its own).")
    profile: bool = _option(False, "Take a step of PEFT's best arm and of ours apart, operator by operator.")
    table: str | None = _option(None, "Print such a file of results as Markdown, and measure nothing.")
