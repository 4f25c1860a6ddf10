"""`loraplus compare --arms` from the outside: what is run, what is shown, what may be added, what is refused."""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest
import typer
import yaml

from loraplus.study.arms import ALL

SIX = ("lora", "loraplus", "auto", "mua", "prodigy", "schedulefree")  # of every kind
EVERY = ",".join(SIX)


def flags(model_folder, data, output, *more):
    return [
        "compare", "--model", model_folder, "--data", data, "--output", output, "--max-steps", 12, "--batch-size", 16,
        "--rank", 2, "--eval-steps", 6, "--tuning-runs", 1, "--seeds", 2, "--workers", 1, *more,
    ]  # fmt: skip


def rows_of(output):
    return list(csv.DictReader((output / "runs.csv").open()))


@pytest.fixture(scope="module")
def added_to(run, tmp_path_factory, model_folder, reviews_csv):
    """A comparison of two arms, and what it became when the others were added."""
    output = tmp_path_factory.mktemp("arms") / "out"
    first = run(*flags(model_folder, reviews_csv, output, "--arms", "mua, lora"))
    assert first.returncode == 0, first.stderr
    before = rows_of(output)
    second = run(*flags(model_folder, reviews_csv, output, "--arms", EVERY, "--resume", "--json"))
    assert second.returncode == 0, second.stderr
    return output, first, before, second


def test_the_help_names_every_arm():
    from loraplus.cli.main import app

    compare = typer.main.get_command(app).commands["compare"]
    texts = {option.name: option.help for option in compare.params}
    assert texts["arms"].endswith(f": {', '.join(name for name in ALL if name != 'lora')}.")
    assert texts["lr_ratio"].endswith(" schedulefree.")  # the arm that takes λ and does not search it
    assert not any("$" in text for text in texts.values())


def test_two_arms_without_loraplus_are_a_comparison(added_to):
    _, first, before, _ = added_to
    assert [(row["phase"], row["arm"]) for row in before] == [
        ("tuning", "lora"), ("final", "lora"), ("final", "mua"), ("final", "lora"), ("final", "mua"),
    ]  # fmt: skip
    table = first.stderr + first.stdout
    assert "0 tuning runs" in table and "untuned" not in table
    assert "Nothing was learnt: test accuracy is LoRA" in table and " and μA " in " ".join(table.split())  # in 12 steps


def test_arms_are_added_without_doing_a_run_again(added_to):
    output, _, before, second = added_to
    assert "19 runs planned, 5 of them already done" in second.stderr
    assert rows_of(output)[:5] == before
    assert yaml.safe_load((output / "config.yaml").read_text())["arms"] == EVERY


def test_every_arm_is_in_the_table_the_lines_the_files_and_the_verdict(added_to):
    output, _, _, second = added_to
    summary = json.loads(second.stdout)
    assert list(summary["arms"]) == list(SIX)
    assert list(summary["paired_with_lora"]) == ["auto", "mua", "prodigy", "schedulefree"]
    report = (output / "report.html").read_text()
    for arm in (ALL[name] for name in SIX):
        assert f"final {arm.title} " in second.stderr or arm.name in ("lora", "mua")
        assert any(line.startswith(arm.title + " ") for line in second.stderr.splitlines())
        assert arm.title in summary["verdict"] and arm.title in report
    assert second.stderr.count("\n0 tuning runs") == 3
    lines = [line for line in second.stderr.splitlines() if "final Prodigy seed" in line]
    assert len(lines) == 2 and all("came to η_A" in line for line in lines)


def test_rates_that_a_method_sets_are_told_with_its_runs(added_to):
    rows = [row for row in rows_of(added_to[0]) if row["arm"] in ("auto", "mua", "prodigy")]
    assert len(rows) == 6
    assert all(row["phase"] == "final" and float(row["lr"]) > 0 and float(row["lr_b"]) > 0 for row in rows)
    assert {row["lr_ratio"] for row in rows if row["arm"] == "mua"} == {"1.0"}


def test_the_arms_that_a_comparison_has_cannot_be_left_out(added_to, refused, model_folder, reviews_csv):
    output = added_to[0]
    error = refused(*flags(model_folder, reviews_csv, output, "--arms", "lora,loraplus,auto", "--resume"))
    assert "mua,prodigy,schedulefree cannot be left out" in error


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ("lora,prodgy", "the nearest is 'prodigy'"),
        ("lora,auto,auto", "auto is given twice"),
        ("loraplus,auto", "must hold lora"),
        ("lora", "nothing to compare"),
    ],
)
def test_bad_arms_are_one_line(refused, tmp_path, model_folder, reviews_csv, arms, expected):
    assert expected in refused(*flags(model_folder, reviews_csv, tmp_path / "out", "--arms", arms))
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line_that_names_the_extra(refused, tmp_path, model_folder, reviews_csv, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prodigyopt" else find(name))
    error = refused(*flags(model_folder, reviews_csv, tmp_path / "out", "--arms", "lora,prodigy"))
    assert "pip install 'loraplus[peers]'" in error
    assert not (tmp_path / "out").exists()


def test_what_an_arm_cannot_train_is_found_before_anything_is_written(refused, tmp_path, model_folder, reviews_csv):
    settings = ("--arms", "lora,auto", "--target-modules", "word_embeddings")
    assert "lora_A" in refused(*flags(model_folder, reviews_csv, tmp_path / "out", *settings))
    assert not (tmp_path / "out").exists()
