"""The page of a run on texts with labels: made from the files of a folder alone, and nothing of the data is obeyed."""

from __future__ import annotations

import re

import pytest

from loraplus.errors import InputError
from loraplus.files.single import write_csv, write_json, write_yaml
from loraplus.report.training import write_report

EVIL = "</script><script>alert(1)</script><img src=x>"
LEARNT = {"learnt": True, "p_value": 0.001, "level": 0.05, "test": "permutation test over the examples"}
METRICS = {
    "eval_loss": 0.5, "steps": 20, "best_step": 15, "lr": 1e-3, "lr_ratio": 16.0, "auto": False, "batch_size": 8,
    "seconds_per_step": 0.1, "base": {"eval_loss": 0.75, "eval_accuracy": 0.25, "eval_mse": 12345.0},
    "data": {
        "source": EVIL, "text_column": EVIL, "label_column": EVIL, "train_examples": 9, "validation_examples": 4,
        "duplicates_removed": 0, "max_length": 64, "truncated_train_examples": 1,
    },
}  # fmt: skip
EACH = {"label": EVIL, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 4, "predicted": 2}
MISTAKE = {"text": EVIL, "truth": EVIL, "prediction": EVIL, "probability": 0.875}
SCORES = {
    "classification": {
        "loss": 0.5, "accuracy": 0.5, "macro_f1": 0.4, "majority_share": 0.5, "labels": [EVIL, "b"],
        "per_class": [EACH, {**EACH, "label": "b"}], "confusion_matrix": [[77, 0], [1, 1]],
        "confused": [{"truth": "b", "prediction": EVIL, "count": 1}], "mistakes": [MISTAKE],
    },
    "multi-label": {
        "loss": 0.5, "accuracy": 0.5, "micro_f1": 0.6, "macro_f1": 0.4, "labels": [EVIL, "b"], "per_label": [EACH],
        "mistakes": [{**MISTAKE, "truth": "", "label": EVIL}],
    },
    "regression": {
        "loss": 0.5, "mse": 2.0, "mae": 1.0, "r2": 0.5, "pearson": 0.7, "mean_error": -0.25,
        "absolute_error": {"median": 0.75, "percentile_90": 2.0, "largest": 3.0},
        "mistakes": [{"text": EVIL, "truth": 1e-6, "prediction": 3.0, "error": 3.0}],
    },
}  # fmt: skip


def page_of(folder, task, **more):
    write_yaml(folder / "config.yaml", {"task": task, "model": EVIL, "data": "d", "output": "o", "lr_ratio": 16.0})
    write_json(folder / "metrics.json", METRICS)
    write_json(folder / "scores.json", {"task": task, "examples": 4, "learnt": LEARNT, **SCORES[task], **more})
    write_csv(folder / "curves.csv", [{"step": 1, "train_loss": 2.0}, {"step": 2, "eval_loss": 1.25}])
    return re.sub(r"<script>.{100000,}?</script>", "", write_report(folder).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("task", SCORES)
def test_the_page_is_offline_and_escapes_what_the_data_says(task, tmp_path):
    page = page_of(tmp_path, task)
    assert "<script>alert" not in page and "<img" not in page and page.count("&lt;script&gt;alert(1)") >= 5
    assert not re.search(r"(src|href)\s*=\s*[\"']", page)
    assert "Before and after" in page and "0.7500" in page and "0.5000" in page
    tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert tables and all(table.count("<thead>") == table.count("<tbody>") == 1 for table in tables)


def test_each_task_has_its_own_parts(tmp_path):
    pages = {task: page_of(tmp_path, task) for task in SCORES}
    titles = {task: set(re.findall("<h2>(.*?)</h2>", page)) for task, page in pages.items()}
    assert titles["classification"] >= {"Each class", "Confusion matrix", "The most confident mistakes"}
    assert titles["multi-label"] >= {"Each label", "The most confident mistakes"}
    assert titles["regression"] >= {"Errors", "Largest misses"}
    assert (
        "where always the most frequent class has 50.0%" in pages["classification"]
        and ">77<" in pages["classification"]
    )
    assert "<pre>none</pre>" not in pages["multi-label"] and ">none<" in pages["multi-label"]
    assert "1e-06" in pages["regression"] and "+3" in pages["regression"] and "1.234e+04" in pages["regression"]


def test_many_classes_are_shown_by_what_is_confused_most(tmp_path):
    many = {"labels": list(map(str, range(30))), "confusion_matrix": [[1] * 30] * 30}
    page = page_of(tmp_path, "classification", **many)
    assert "What is confused most" in page and "Confusion matrix" not in page


def test_a_run_that_learnt_nothing_says_so_on_top(tmp_path):
    page = page_of(tmp_path, "classification", learnt={**LEARNT, "learnt": False, "p_value": 0.4})
    assert page.index("Nothing was learnt.") < page.index("Losses")
    assert "<h1>Nothing was learnt after 20 steps</h1>" in page  # of the whole run, not of its best evaluation


def test_a_damaged_file_of_scores_is_one_line(tmp_path):
    page_of(tmp_path, "classification")
    write_json(tmp_path / "scores.json", {"task": "classification"})
    with pytest.raises(InputError, match="are damaged"):
        write_report(tmp_path)
