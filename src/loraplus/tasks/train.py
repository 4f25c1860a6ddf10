"""`loraplus train`: data and a model in, a PEFT-format adapter with its metrics and curves out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from loraplus.errors import DivergedError, InterruptedRun, LostProcessError
from loraplus.files.checkpoints import check_places, checkpoints, newest_whole
from loraplus.files.commands import CARD_FILE, DATA_FILE, SCORES_FILE
from loraplus.files.manifest import is_as_listed, seal
from loraplus.files.output import check_output, hold_output, note_data, prepare_output
from loraplus.files.single import write_atomically, write_csv, write_json
from loraplus.groups import explain
from loraplus.integrations.checkpoints import rates_record, write_rates
from loraplus.integrations.trainer_checkpoints import saved_whole
from loraplus.integrations.transformers import LoraPlusTrainer
from loraplus.speed.fast import Fast
from loraplus.tasks.callbacks import DivergenceGuard, RunTotals, StepClock, StopOnSignal
from loraplus.tasks.checks import check_settings, rates_of
from loraplus.tasks.config import AUTO, TrainConfig
from loraplus.tasks.data_parallel import DataParallelTrainer, is_lost_process, is_main_process, processes, wait_for_all
from loraplus.tasks.finished import METRICS_FILE, finished_run
from loraplus.tasks.look import seen_of_run
from loraplus.tasks.model_card import is_unfilled, model_card
from loraplus.tasks.seen import Seen
from loraplus.tasks.task import Task, TaskData, task_of
from loraplus.tasks.training import build_trainer, total_steps

_LOG = logging.getLogger(__name__)
CURVES_FILE = "curves.csv"
SAMPLES_FILE = "samples.json"
_COLUMNS = ("step", "epoch", "train_loss", "grad_norm")


def train(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_seen: Callable[[Seen], None] | None = None,
) -> dict[str, Any]:
    """Trains an adapter for a task and writes it with its metrics, curves and configuration.

    Everything that can be wrong with the input is found before the output folder is touched. Under torchrun or
    accelerate launch the processes share out each batch, and the main one writes.

    Args:
        config: data, model, rates, length.
        overwrite: replace what an earlier run left in the output folder.
        resume: go on from the last checkpoint in the output folder, if there is one.
        callbacks: watch the run.
        on_seen: told what was seen of the data, before training. What is doubtful is logged as a warning.

    Returns:
        The content of metrics.json.

    Raises:
        InputError, InvalidRateError, …: bad input; nothing was written.
        ResumeMismatchError: the last checkpoint was trained at other rates.
        DamagedCheckpointError: there are checkpoints, and none is whole.
        CheckpointError: the disk is full, say; the last checkpoint is kept.
        DivergedError: the loss became NaN; the last good checkpoint is kept.
        InterruptedRun: a signal came; a checkpoint is saved.
        LostProcessError: another process of the run ended; the last checkpoint is kept.
    """
    check_settings(config)
    output, wanted = Path(config.output), asdict(config)
    check_output(config.output, wanted, overwrite=overwrite, resume=resume)
    check_places(output)
    if resume and (metrics := finished_run(output)) is not None:
        return metrics
    run = _ready(config, callbacks)
    main = is_main_process()
    with hold_output(config.output) if main else nullcontext():
        if main:
            prepare_output(config.output, wanted, overwrite=overwrite, resume=resume)
            note_data(output / DATA_FILE, run.data.facts)
            if on_seen:
                on_seen(run.seen)
            run.seen.tell()
        wait_for_all()
        _take_steps(run, resume=resume)
        curves = curve_rows(run.trainer.state.log_history, run.task.metrics)
        if main:
            write_csv(output / CURVES_FILE, curves)
        _end_if_stopped(run)
        scored = run.task.scores(run.trainer, run.data)
        metrics = _metrics(run, scored)
        if main:
            _write_results(run, metrics, scored, curves)
        wait_for_all()
        return metrics


@dataclass(frozen=True)
class _Run:
    """A run whose data and model are loaded, and what watches it."""

    config: TrainConfig
    task: Task[Any]
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    seen: Seen
    trainer: DataParallelTrainer
    clock: StepClock
    totals: RunTotals
    stop: StopOnSignal

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def _ready(config: TrainConfig, callbacks: Sequence[TrainerCallback]) -> _Run:
    """Loads data and model and builds the trainer; refuses what cannot be trained."""
    rates = rates_of(config, config.lr, config.lr_ratio)
    task = task_of(config)
    tokenizer = task.load_tokenizer(config)
    data = task.load_data(config, tokenizer)
    total_steps(config, len(data.train))  # refuses a length before the model is loaded
    model = task.load_model(config, data, tokenizer, config.seed)
    seen = seen_of_run(config, data)
    clock, stop = StepClock(), StopOnSignal()
    totals = RunTotals(clock)
    totals.trainer = trainer = build_trainer(
        config,
        rates,
        data,
        model,
        tokenizer,
        seed=config.seed,
        output=config.output,
        checkpoints=True,
        auto=config.lr == AUTO,
        callbacks=[clock, totals, stop, DivergenceGuard(rates), *callbacks],
    )
    return _Run(config, task, data, tokenizer, seen, trainer, clock, totals, stop)


def _take_steps(run: _Run, *, resume: bool) -> None:
    """Trains until the last step or a signal.

    Raises:
        DivergedError, LostProcessError: they name the checkpoint that is kept.
    """
    with run.stop.listening():
        try:
            run.trainer.train(resume_from_checkpoint=resume and bool(checkpoints(run.output)))
        except DivergedError as error:
            raise _diverged(error, run.output) from None
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise _lost_process(run.trainer.state.global_step, run.output) from None


def _end_if_stopped(run: _Run) -> None:
    """Raises `InterruptedRun` if a signal came before the last step."""
    step, steps = run.trainer.state.global_step, run.trainer.state.max_steps
    if run.stop.stopped.is_set() and step < steps:
        wait_for_all()  # each writes its part of the checkpoint
        raise InterruptedRun(
            f"interrupted after step {step} of {steps}; saved to {run.output}/checkpoint-{step}; "
            "go on with the same command and --resume"
        )


def _metrics(run: _Run, scored: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json says. Evaluates the model, and its base without the adapter."""
    trainer, task, data = run.trainer, run.task, run.data
    step, best = trainer.state.global_step, trainer.state.best_global_step
    evaluation = _evaluation_at(best, trainer) or trainer.evaluate()
    return {
        "eval_loss": evaluation["eval_loss"],
        **{name: evaluation[name] for name in task.metrics},
        **task.outcome(data, scored),
        "base": _of_base(task, trainer, data),
        "steps": step,
        "best_step": best if best is not None else step,
        **_rates_in_use(trainer),
        "batch_size": run.config.batch_size,  # over all processes
        "processes": processes(),
        **task.facts_of_run(trainer),
        "speed_up": dict(Counter(module.what for module in trainer.model.modules() if isinstance(module, Fast))),
        "train_loss": run.totals.loss / step,
        "train_seconds": run.totals.seconds,
        "seconds_per_step": run.clock.seconds_per_step,
        "doubts": list(run.seen.doubts),
        "groups": explain(trainer.model, trainer.optimizer).groups(),
        "data": data.facts,
    }


def _write_results(run: _Run, metrics: dict[str, Any], scored: dict[str, Any], curves: list[dict[str, Any]]) -> None:
    """The adapter, its card, samples and scores; metrics.json last, since it says that the run is finished."""
    _save_adapter(
        run, curves, model_card(run.config, metrics, scored, is_chat=run.task.is_chat(run.config, run.tokenizer))
    )
    if samples := run.task.samples(run.config.samples, run.trainer.model, run.data, run.tokenizer):
        write_json(run.output / SAMPLES_FILE, samples)
    if scored:
        write_json(run.output / SCORES_FILE, scored)
    write_json(run.output / METRICS_FILE, metrics)


def _evaluation_at(step: int | None, trainer: LoraPlusTrainer) -> dict[str, Any] | None:
    """The logged evaluation of a step, so that its weights need not be evaluated again."""
    rows = (row for row in reversed(trainer.state.log_history) if row["step"] == step and "eval_loss" in row)
    return next(rows, None)


def _of_base(task: Task[Any], trainer: DataParallelTrainer, data: TaskData) -> dict[str, float]:
    """The measures before training: the model without its adapter, with the head that it began with."""
    with trainer.model.disable_adapter():
        measured = trainer.answers(data.validation).metrics
    return {name: measured[name] for name in ("eval_loss", *task.metrics)}


def _diverged(error: DivergedError, output: Path) -> DivergedError:
    checkpoint, _ = newest_whole(output)
    kept = f"{checkpoint} is from before it, and --resume would diverge again: " if checkpoint else ""
    return DivergedError(f"{error} ({kept}other rates are another run, begun with --overwrite or in another --output)")


def _lost_process(step: int, output: Path) -> LostProcessError:
    checkpoint, _ = newest_whole(output)
    on = (
        f"go on from {checkpoint} with the same command and --resume"
        if checkpoint
        else "there is no checkpoint yet; start again with --overwrite, or with --eval-steps for earlier ones"
    )
    return LostProcessError(f"another process of this run ended after step {step}; {on}")


def _rates_in_use(trainer: LoraPlusTrainer) -> dict[str, Any]:
    """η_A and λ; with automatic rates those of the last measurement, without the schedule."""
    auto, rates = trainer.loraplus_auto, trainer.loraplus_rates
    if auto is None:
        return {"lr": rates.lr, "lr_ratio": rates.lr_ratio, "auto": False}
    ratio = auto.lr_b / auto.lr_a if auto.lr_a else None
    return {"lr": auto.lr_a, "lr_b": auto.lr_b, "lr_ratio": ratio, "auto": True, "auto_why": auto.why}


def _save_adapter(run: _Run, curves: list[dict[str, Any]], card: str) -> None:
    """Adapter in PEFT's format; beside it what the task needs, rates, curves, card, and the manifest of all that."""
    trainer = run.trainer
    writes_card = _may_write_card(run.output)
    with saved_whole(run.output, run.output) as folder:
        trainer.model.save_pretrained(str(folder), safe_serialization=True)
        run.task.save_beside_adapter(trainer.model, run.data, run.tokenizer, folder)
        write_rates(folder, rates_record(trainer.loraplus_rates, trainer.model, trainer.loraplus_auto))
        write_csv(folder / CURVES_FILE, curves)
        note_data(folder / DATA_FILE, run.data.facts)
        if writes_card:
            write_atomically(folder / CARD_FILE, card)
        seal(folder, [path for path in folder.iterdir() if path.name != CARD_FILE or writes_card])


def _may_write_card(output: Path) -> bool:
    """Whether there is no card yet, or none that somebody has written in."""
    path = output / CARD_FILE
    if not path.is_file() or is_as_listed(output, CARD_FILE) or is_unfilled(path.read_text(errors="replace")):
        return True
    _LOG.warning("%s is not what loraplus wrote, so it stays as it is; move it away for a card of this run", path)
    return False


def curve_rows(log_history: list[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row a logged step: training loss and rates, and the evaluation where there was one.

    Args:
        log_history: of a Trainer's state.
        metrics: what an evaluation tells beside `eval_loss`.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "loss" not in entry and "eval_loss" not in entry:
            continue
        row = rows.setdefault(entry["step"], {"step": entry["step"], "epoch": entry.get("epoch")})
        for name in ("loss", "eval_loss", *metrics, "grad_norm"):
            if name in entry:
                row["train_loss" if name == "loss" else name] = entry[name]
        row |= {name: value for name, value in entry.items() if name.startswith(("lr/", "updates/"))}
    logged = {name for row in rows.values() for name in row}
    rates = sorted(name for name in logged if name.startswith(("lr/", "updates/")))  # a resumed run's own order differs
    columns = [name for name in (*_COLUMNS, *rates, "eval_loss", *metrics) if name in logged]
    return [{name: row.get(name) for name in columns} for _, row in sorted(rows.items())]
