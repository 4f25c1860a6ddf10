"""Pages of what is under way, and the page of a search: escaped, offline, and never in the way of the run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from loraplus.errors import InputError
from loraplus.files.single import write_json
from loraplus.report.live import LiveFile, study_page
from loraplus.report.live_training import LiveTraining
from loraplus.report.tuned import write_search_report
from loraplus.study.records import Record, Trial
from loraplus.study.runner import Event

EVIL = "</script><script>alert(1)</script><img src=x>"
SETTINGS = {"task": "classification", "data": EVIL, "model": EVIL, "output": "o"}


def tuning(lr, steps, loss):
    return Record(Trial("tuning", "loraplus", lr, 16.0, 0, steps), "done", steps, loss, 0.5)


def test_the_page_of_a_search_has_a_chart_for_each_length_of_its_runs():
    runs = [tuning(1e-4, 20, 0.7), tuning(1e-3, 20, 0.6), tuning(1e-3, 80, 0.5)]
    page = study_page("tune", SETTINGS)(Event("finished", 0.5, 4, records={run.trial.key: run for run in runs}))
    assert "<h1>0.5 of 4 runs done</h1>" in page and 'http-equiv="refresh"' in page
    assert "<h2>Rates tried in 20 steps</h2>" in page and "<h2>Rates tried in 80 steps</h2>" in page
    assert "<script>alert" not in page and "<img" not in page and "loraplus tune --model" in page
    assert ">steps</th>" in page and "phase" not in page


def state(step, *log):
    return SimpleNamespace(global_step=step, max_steps=40, log_history=list(log))


def test_the_page_of_a_run_is_there_when_it_begins_and_grows_with_its_evaluations(tmp_path):
    live = LiveTraining({**SETTINGS, "output": str(tmp_path)})
    live.on_train_begin(None, state(0), None)
    page = tmp_path / "report.html"
    assert "<h1>Step 0 of 40</h1>" in page.read_text() and "<svg" not in page.read_text()
    log = [
        {"step": 10, "epoch": 1, "loss": 0.75},
        {"step": 10, "epoch": 1, "eval_loss": 0.625, "eval_accuracy": 0.5, "eval_chance_p": 0.3, "eval_runtime": 9.0},
    ]
    live.on_evaluate(None, state(10, *log), None)
    assert "<h1>Step 0 of 40</h1>" in page.read_text()  # not again within two seconds
    live._file._written = -1e9
    live.on_evaluate(None, state(10, *log), None)
    text = page.read_text()
    assert "<h1>Step 10 of 40</h1>" in text and "<svg" in text and 'data-value="0.625"' in text
    table = text[text.index("<h2>Evaluations</h2>") :]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", table[: table.index("</thead>")]) == ["step", "loss", "accuracy"]
    assert "<script>alert" not in text and "<img" not in text


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, caplog):
    live = LiveFile(tmp_path / "nowhere" / "report.html")
    for _ in range(3):
        live._written = -1e9
        assert live.write(lambda: "page")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "nowhere" in caplog.text


def result(task="classification", **best):
    row = {"steps": 20, "lr": 1e-3, "lr_ratio": 16.0, "seed": 0, "seconds": 2.0, "status": "done"}
    return {
        "best": {"lr": 1e-3, "lr_ratio": 16.0, "eval_loss": 0.5, "at_edge": True, **best},
        "cost": {"full_runs": 1.5, "full_steps": 40},
        "train_command": "loraplus train --lr 0.001",
        "trials": [{**row, "eval_loss": None, "status": "diverged"}, {**row, "steps": 40, "eval_loss": 0.5}],
        "data": {"source": EVIL},
        "config": {**SETTINGS, "task": task},
    }


@pytest.mark.parametrize(
    ("task", "best", "told", "not_told"),
    [
        ("classification", {"eval_accuracy": 0.75}, "75.0%", "perplexity"),
        ("sft", {"eval_perplexity": 1.648}, "1.648", "accuracy"),
        ("regression", {"eval_perplexity": 1.648}, "0.5000", "perplexity"),
    ],
)
def test_the_page_of_a_finished_search_says_what_was_found(task, best, told, not_told, tmp_path):
    write_json(tmp_path / "tune.json", result(task, **best))
    text = write_search_report(tmp_path).read_text()
    main = text[text.index("<main>") : text.index("</main>")]
    assert "η<sub>A</sub> 1e-3, λ 16" in main and told in main and not_told not in main and "refresh" not in text
    assert "lowest or highest rate" in main and "diverged" in main and "loraplus train --lr 0.001" in main
    assert "<script>alert" not in text and "<img" not in text


def test_a_search_that_is_damaged_is_named(tmp_path):
    write_json(tmp_path / "tune.json", {"best": {}})
    with pytest.raises(InputError, match=r"tune\.json is damaged"):
        write_search_report(tmp_path)
