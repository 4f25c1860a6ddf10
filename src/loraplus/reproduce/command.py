"""One experiment from first to last: checks, assets, runs, and the files that say what was found."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.commands import PLOTS_FOLDER
from loraplus.files.output import check_output, hold_output, prepare_output
from loraplus.files.paths import resolved
from loraplus.files.single import read_json, write_atomically, write_json
from loraplus.report.live import LivePage
from loraplus.reproduce import png
from loraplus.reproduce.assets import obtain
from loraplus.reproduce.experiment import Experiment, Record, Records
from loraplus.reproduce.files import RUNS_FILE, SUMMARY_FILE, columns_of, read_runs, write_runs
from loraplus.reproduce.page import PAGE_FILE, render, running
from loraplus.reproduce.registry import experiment_class
from loraplus.reproduce.report import Report
from loraplus.study.runner import JOURNAL_FILE, LOG_FILE, OnEvent, default_workers, has_begun, run_all
from loraplus.study.storage import without_password
from loraplus.study.store import StudyStore
from loraplus.tasks.command_line import command_line

SCHEMA_VERSION = 1
# Processes of one study may differ in these: where each of them works and writes.
MAY_DIFFER = ("output", "workers", "storage", "data")
PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an experiment is run; `scale` and `seeds` change its results, the rest does not."""

    name: str
    output: str
    scale: str = "cpu"
    seeds: int = 3
    data: str = "data"
    storage: str | None = None
    workers: int | None = None

    @property
    def experiment(self) -> Experiment:
        """The experiment that is asked for.

        Raises:
            InputError: there is none of that name, or not at that scale.
        """
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers must be at least 1, got {self.workers}")
        return experiment_class(self.name).at(self.scale, self.seeds, self.data)

    @property
    def command(self) -> str:
        """The command line that gives these results."""
        return command_line("reproduce", self.name, scale=self.scale, seeds=self.seeds)


def reproduce(
    options: Options,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: OnEvent | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs what is missing of an experiment, and writes its results, plots and page.

    Several processes, on one machine or on many, share the runs if they are called with the same `storage`, each with
    an output folder of its own. Each of them writes the whole result.

    Runs train in processes of their own, so a script that calls this needs `if __name__ == "__main__":`.

    Args:
        options: What to run, and where.
        overwrite: Replace an earlier run's output; a study in a storage of its own stays.
        resume: Go on with an earlier run of the same settings; finished runs are not done again.
        progress: Called with every `Event` of the study.
        say: Told about assets that are obtained.

    Returns:
        The content of summary.json. The folder also holds runs.csv, plots/*.png, index.html, config.yaml and, without
        a storage of its own, study.journal.

    Raises:
        InputError: a name, a setting, the storage, the data or the output folder cannot be used.
        InterruptedRun: SIGINT or SIGTERM came; `resume=True` goes on.

    Example:
        >>> reproduce(Options(name="toy", output="runs/toy"))["figures"]  # doctest: +SKIP
    """
    experiment = options.experiment
    settings = all_settings(experiment)
    saved = _saved(options, settings)
    check_output(options.output, saved, overwrite=overwrite, resume=resume, ignore=MAY_DIFFER)
    experiment.check_packages()
    if problem := experiment.problem():
        raise InputError(f"{experiment.name}: {problem}")
    for asset in experiment.needed_assets():
        obtain(asset, Path(options.data), say=say)
    begun = resume and has_begun(options.output, SUMMARY_FILE, RUNS_FILE)
    store = None if options.storage is None else _open(options.storage, experiment, settings, shared=True, begun=begun)
    with hold_output(options.output):
        folder = prepare_output(options.output, saved, overwrite=overwrite, resume=resume, ignore=MAY_DIFFER)
        results = run_all(
            experiment,
            store or _open(str(folder / JOURNAL_FILE), experiment, settings, shared=False, begun=begun),
            experiment.timed_run,
            workers=options.workers or default_workers(),
            on_event=LivePage(folder / PAGE_FILE, running(experiment, options.command), progress),
            log=folder / LOG_FILE,
        )
        evaluation = evaluate(experiment, results, command=options.command, versions=_versions())
        return write_results(folder, evaluation)


def redraw(options: Options, source: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Works out figures, plots and page again from runs.csv and summary.json of an earlier run; trains nothing.

    Args:
        options: The experiment's name and the output folder; scale and seeds are those of the earlier run.
        source: Folder of the earlier run.
        overwrite: Replace an earlier run's output.

    Returns:
        The content of the new summary.json.

    Raises:
        InputError: the folder holds no results of this experiment, or the output folder cannot be used.
    """
    source = Path(source)
    if resolved(source) == resolved(options.output):
        raise InputError(f"--redraw: {source} cannot be its own --output; name another folder")
    experiment_class(options.name).check_packages()
    summary = read_json(source / SUMMARY_FILE)
    try:
        settings, columns = summary["settings"], summary["columns"]
        name, scale, seeds = summary["experiment"], settings["scale"], int(settings["seeds"])
        origin = {"command": str(summary["command"]), "versions": dict(summary["versions"])}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"--redraw: {source / SUMMARY_FILE} is no summary of an experiment") from None
    if name != options.name:
        raise InputError(f"--redraw: {source} holds results of {name}, not {options.name}")
    options = replace(options, scale=scale, seeds=seeds)
    experiment = options.experiment
    results = read_runs(source / RUNS_FILE, columns)
    saved = _saved(options, all_settings(experiment))
    check_output(options.output, saved, overwrite=overwrite, resume=False, ignore=MAY_DIFFER)
    try:
        evaluation = evaluate(experiment, results, settings=settings, **origin)
    except (KeyError, IndexError, ValueError):
        if not (missing := experiment.next_runs(results)):
            raise
        raise InputError(f"--redraw: {source} lacks runs, such as {experiment.describe(missing[0])}") from None
    with hold_output(options.output):
        folder = prepare_output(options.output, saved, overwrite=overwrite, resume=False, ignore=MAY_DIFFER)
        return write_results(folder, evaluation)


def dry_run(options: Options) -> dict[str, Any]:
    """What would be run: settings, what it needs, and the runs known before the first result.

    Raises:
        InputError: see `reproduce`; nothing is written.
    """
    experiment = options.experiment
    runs = experiment.next_runs({})
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "claims": list(experiment.claims),
        "settings": all_settings(experiment),
        "needs": [*experiment.needs(), *(f"{name} (in {options.data})" for name in experiment.needed_assets())],
        "runs_known": len(runs),
        "first_runs": [experiment.describe(run) for run in runs[:10]],
        "output": options.output,
    }


@dataclass(frozen=True)
class Evaluation:
    """What an experiment's runs come to: the content of summary.json, the report, and the runs in order."""

    summary: dict[str, Any]
    report: Report
    results: list[Record]


def evaluate(
    experiment: Experiment,
    results: Records,
    *,
    command: str,
    versions: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Works out figures and report; writes nothing.

    Args:
        experiment: Whose results they are.
        results: All runs.
        command, versions: How they were made.
        settings: Under which. Default: those of the experiment.
    """
    in_order = sorted(results.values(), key=lambda result: [_sortable(value) for value in result.trial.params.values()])
    results = {result.trial.key: result for result in in_order}
    figures = experiment.figures(results)
    report = experiment.report(results, figures)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment.name,
        "title": experiment.title,
        "claims": list(experiment.claims),
        "verdict": list(report.verdict),
        "figures": figures,
        "runs": len(results),
        "diverged": sum(result.status == "diverged" for result in in_order),
        "training_seconds": round(sum(round(result.seconds, 3) for result in in_order), 1),  # as runs.csv has them
        "command": command,
        "versions": dict(versions),
        "settings": dict(settings or all_settings(experiment)),
        "columns": columns_of(in_order),
    }
    return Evaluation(summary, report, in_order)


def write_results(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Writes runs.csv, the plots, the page and, last, summary.json, whose content it returns."""
    write_runs(folder / RUNS_FILE, evaluation.results)
    plots = folder / PLOTS_FOLDER
    plots.mkdir(exist_ok=True)
    for figure in evaluation.report.figures:
        write_atomically(plots / f"{figure.name}.png", png.draw(figure))
    write_atomically(folder / PAGE_FILE, render(evaluation.summary, evaluation.report))
    write_json(folder / SUMMARY_FILE, evaluation.summary)  # last: who sees it knows that the rest is there
    return evaluation.summary


def all_settings(experiment: Experiment) -> dict[str, Any]:
    """What changes the results, as it is saved and compared."""
    settings = {"scale": experiment.scale, "seeds": experiment.seeds, **experiment.settings()}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _saved(options: Options, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What config.yaml holds."""
    own = {key: value for key, value in asdict(options).items() if key not in ("name", "scale", "seeds")}
    own["storage"] = options.storage and without_password(options.storage)
    return {"experiment": options.name, **settings, **own}


def _open(
    location: str, experiment: Experiment, settings: Mapping[str, Any], *, shared: bool, begun: bool
) -> StudyStore:
    """The study of these settings; others may be in the same storage."""
    print_of_settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    name = f"loraplus-reproduce-{experiment.name}-{print_of_settings}"
    store = StudyStore.open(location, name, shared=shared, begun=begun)
    store.check_settings(settings)
    return store


def _versions() -> dict[str, str]:
    """Of the packages that results may depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _sortable(value: object) -> tuple[bool, Any]:
    return isinstance(value, str), value
