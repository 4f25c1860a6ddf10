"""LoRA against LoRA+ and other methods on one task: checks, runs, statistics, and the files that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.commands import CONFIG_FILE, LATER_SETTINGS, NOT_COMPARED
from loraplus.files.output import check_output, hold_output, prepare_output, saved_config
from loraplus.files.single import write_atomically, write_csv, write_json, write_yaml
from loraplus.report import render
from loraplus.report.live import LivePage, study_page
from loraplus.study.arms import chosen
from loraplus.study.plan import Plan
from loraplus.study.runner import JOURNAL_FILE, LOG_FILE, Event, default_workers, has_begun, run_all
from loraplus.study.store import StudyStore
from loraplus.study.summary import runs_csv_rows, summarise
from loraplus.study.trial import data_facts, data_seen, run_trial
from loraplus.tasks.checks import check_settings
from loraplus.tasks.config import DEFAULT_ARMS, CompareConfig
from loraplus.tasks.measures import measures_of
from loraplus.tasks.seen import Seen

SUMMARY_FILE = "summary.json"
RUNS_FILE = "runs.csv"
REPORT_FILE = "report.html"
# Arms do not change the runs of other arms, so they can be added on resuming.
MAY_DIFFER = (*NOT_COMPARED, "arms")


def compare(
    config: CompareConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Event], None] | None = None,
    on_seen: Callable[[Seen], None] | None = None,
) -> dict[str, Any]:
    """Tunes the arms with the same number of runs, tests the winners on fresh seeds, and writes the report.

    Runs train in processes of their own, so a script that calls this needs `if __name__ == "__main__":`.

    Args:
        config: The task, the budget and the output folder.
        overwrite: Replace an earlier run's output.
        resume: Go on with an earlier run of the same configuration; finished runs are not done again. It may have
            more arms than before.
        progress: Called with every `Event` of the study.
        on_seen: Told what was seen of the data, before the first run. What is doubtful is logged as a warning.

    Returns:
        The summary, as in summary.json. The folder also holds config.yaml, runs.csv, report.html and study.journal.

    Raises:
        InputError: a setting, the data or the output folder cannot be used; nothing has been written then.
        InterruptedRun: SIGINT or SIGTERM came; `resume=True` goes on.
        DivergedError: all tuning runs of an arm diverged.

    Example:
        >>> config = CompareConfig(model="bert-base-uncased", data="reviews.csv", output="runs/reviews")
        >>> compare(config)["verdict"]  # doctest: +SKIP
    """
    check_settings(config)
    arms = chosen(config.arms)
    config = replace(config, arms=",".join(arms))
    settings = asdict(config)
    check_output(config.output, settings, overwrite=overwrite, resume=resume, ignore=MAY_DIFFER)
    if resume:
        _check_arms_kept(config.output, arms)
    facts = data_facts(config, config.untuned_lr, config.lr_ratio, arms)
    seen = data_seen(config)
    if on_seen:
        on_seen(seen)
    seen.tell()
    with hold_output(config.output):
        folder = prepare_output(config.output, settings, overwrite=overwrite, resume=resume, ignore=MAY_DIFFER)
        if resume and _saved_arms(folder) != arms:
            write_yaml(folder / CONFIG_FILE, settings)
        begun = resume and has_begun(folder, SUMMARY_FILE, RUNS_FILE)
        store = StudyStore.open(folder / JOURNAL_FILE, f"loraplus-compare-{fingerprint(settings)}", begun=begun)
        store.check_data(facts)
        workers = config.workers or default_workers()
        records = run_all(
            Plan.from_config(config),
            store,
            partial(run_trial, config),
            workers=workers,
            on_event=LivePage(folder / REPORT_FILE, study_page("compare", settings), progress),
            log=folder / LOG_FILE,
        )
        in_order = list(records.values())
        summary = summarise(in_order, config=settings, data_facts=facts)
        _write(folder, summary, in_order)
    return summary


def fingerprint(settings: dict[str, Any]) -> str:
    """Short hash of all settings that change what a run computes."""
    # A setting that came later counts only where it is used, so that earlier comparisons can be gone on with.
    compared = {
        key: value
        for key, value in settings.items()
        if key not in MAY_DIFFER and (key, value) not in LATER_SETTINGS.items()
    }
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:12]


def _saved_arms(folder: str | Path) -> tuple[str, ...]:
    """The arms of the comparison in a folder, if there is one; earlier versions had two and did not note them."""
    saved = saved_config(Path(folder))
    return tuple(str(saved.get("arms", DEFAULT_ARMS)).split(",")) if saved else ()


def _check_arms_kept(folder: str, arms: tuple[str, ...]) -> None:
    """Arms can be added on resuming; without one that was there, the comparison would be another.

    Raises:
        InputError: names the arms that are missing.
    """
    was = _saved_arms(folder)
    if missing := [arm for arm in was if arm not in arms]:
        raise InputError(
            f"--resume: {folder} was started with --arms {','.join(was)}; arms can be added, but "
            f"{','.join(missing)} cannot be left out"
        )


def _write(folder: Path, summary: dict[str, Any], records: list[Any]) -> None:
    page = render(summary, records)
    write_csv(folder / RUNS_FILE, runs_csv_rows(records, measures_of(summary["config"])))
    write_atomically(folder / REPORT_FILE, page)
    write_json(folder / SUMMARY_FILE, summary)  # last: who sees it knows that the rest is there
