"""Files as people have them, each given to `loraplus train` as it is: trained on, or refused in one line."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
import shlex
import sys
import types

import pytest
from conftest import NEGATIVE, NEUTRAL, POSITIVE
from language import chat_rows
from workbooks import with_openpyxl, write_workbook


def rows(count=120):
    """(text with letters beyond ASCII, class, number, labels)"""
    draw = random.Random(0)
    for i in range(count):
        good, bad = draw.randint(0, 3), draw.randint(0, 3)
        words = draw.choices(POSITIVE, k=good) + draw.choices(NEGATIVE, k=bad) + draw.choices(NEUTRAL, k=4) + [f"é{i}"]
        draw.shuffle(words)
        labels = [name for name, times in (("warm", good), ("cold", bad)) if times > 1]
        yield " ".join(words), "gut" if good >= bad else "schlecht", 10 * (good - bad) + 0.5, labels


def separated(path, header, lines, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *lines])
    return path


CLASSES = [(text, label) for text, label, *_ in rows()]
FILES = {
    "a semicolon CSV with a mark, as European Excel writes it": (
        lambda p: separated(p / "d.csv", ("Text", "Label"), CLASSES, ";", "utf-8-sig"), (), "separated by semicolons",
    ),
    "a CSV in cp1252": (
        lambda p: separated(p / "d.csv", ("text", "label"), CLASSES, ";", "cp1252"), (), "cp1252, guessed",
    ),
    "Unicode text, as Excel calls UTF-16 with tabs": (
        lambda p: separated(p / "d.tsv", ("text", "label"), CLASSES, "\t", "utf-16"), (), "utf-16",
    ),
    "a packed CSV": (
        lambda p: packed(separated(p / "d.csv", ("text", "label"), CLASSES)), (), "d.csv.gz",
    ),
    "a workbook": (
        lambda p: write_workbook(p / "d.xlsx", notes=[], data=[["text", "label"], *map(list, CLASSES)]), (), "d.xlsx",
    ),
    "a folder of texts by class": (lambda p: by_class(p / "reviews"), (), "2: "),
    "numbers with decimal commas": (
        lambda p: separated(
            p / "d.csv", ("text", "score"), [(t, f"{n}".replace(".", ",")) for t, _, n, _ in rows()], ";"
        ),
        ("--task", "regression"), "-29.5 to 30.5",
    ),
    "several labels in a cell": (
        lambda p: separated(p / "d.csv", ("text", "tags"), [(text, "|".join(labels)) for text, *_, labels in rows()]),
        ("--task", "multi-label"), "2: ",
    ),
    "Alpaca": (
        lambda p: as_json(p / "alpaca.json", [
            {"instruction": f"Say {text}.", "input": "", "output": label} for text, label in CLASSES
        ]),
        ("--task", "sft"), "prompt 'instruction' with 'input', completion 'output'",
    ),
    "questions and answers": (
        lambda p: separated(p / "d.csv", ("Question", "Answer"), CLASSES), ("--task", "sft"),
        "prompt 'Question', completion 'Answer'",
    ),
    "questions and answers in columns of other names": (
        lambda p: separated(p / "d.csv", ("asked", "said"), CLASSES, ";", "utf-8-sig"),
        ("--task", "sft", "--prompt-column", "asked", "--completion-column", "said"), "prompt 'asked'",
    ),
}  # fmt: skip


def packed(path):
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def by_class(folder):
    for i, (text, label) in enumerate(CLASSES):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def as_json(path, values):
    path.write_text(json.dumps(values))
    return path


def stands_in_for_packages(monkeypatch):
    """Has something stand in for openpyxl and charset-normalizer where they are not installed."""
    with_openpyxl(monkeypatch)
    if importlib.util.find_spec("charset_normalizer"):
        return
    match = types.SimpleNamespace(encoding="cp1252", chaos=0.0, could_be_from_charset=["cp1252"])
    monkeypatch.setitem(sys.modules, "charset_normalizer", types.SimpleNamespace(from_bytes=lambda *_, **__: [match]))


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_people_have_it_is_trained_on(
    name, tmp_path, monkeypatch, model_folder, decoder_folder, loraplus_command
):
    make, flags, expected = FILES[name]
    stands_in_for_packages(monkeypatch)
    model = decoder_folder if "sft" in flags else model_folder
    outcome = loraplus_command(
        "train", "--model", model, "--data", make(tmp_path), "--output", tmp_path / "out", "--max-steps", 2,
        "--batch-size", 8, *flags,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert expected in " ".join(outcome.out.split()), outcome.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    data = metrics["data"]
    assert data["train_examples"] + data["validation_examples"] + data["duplicates_removed"] == 120


REFUSED = {
    "a CSV in cp1252, without the package that guesses": (
        lambda p: separated(p / "d.csv", ("text", "label"), CLASSES, ";", "cp1252"), (), "--encoding cp1252",
    ),
    "a workbook, without the package that reads it": (
        lambda p: write_workbook(p / "d.xlsx", data=[["text", "label"], *map(list, CLASSES)]), (), "openpyxl",
    ),
    "an old workbook": (lambda p: as_json(p / "d.xls", []), (), "unknown format .xls"),
    "words where numbers are wanted": (
        lambda p: separated(p / "d.csv", ("text", "label"), CLASSES), ("--task", "regression"), "--task classification",
    ),
    "a task that there is not": (
        lambda p: separated(p / "d.csv", ("text", "label"), CLASSES), ("--task", "multilabel"), "'multi-label'",
    ),
    "a folder of other things": (lambda p: as_json(p / "x.json", []).parent, (), "FOLDER/CLASS/*.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(name, tmp_path, monkeypatch, model_folder, refused):
    make, flags, expected = REFUSED[name]
    for package in ("openpyxl", "charset_normalizer"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "data").mkdir()
    line = refused(
        "train", "--model", model_folder, "--data", make(tmp_path / "data"), "--output", tmp_path / "out", *flags
    )
    assert expected in line and not (tmp_path / "out").exists()


def test_check_says_what_is_seen_and_stops(tmp_path, model_folder, loraplus_command):
    data = separated(
        tmp_path / "d.csv", ("a fine film", "gut"), [*CLASSES, (CLASSES[0][0], "GUT"), ("lonely", "selten")]
    )
    outcome = loraplus_command("train", "--model", model_folder, "--data", data, "--lr", 10, "--check")
    assert outcome.code == 0, outcome.err
    for seen in ("122 rows", "4: ", "s a step", "! --lr 10", "several labels", "'GUT' (1)", "'selten'", "column names"):
        assert seen in outcome.out, seen
    last = shlex.split(outcome.out.strip().splitlines()[-1])
    given = ["--model", str(model_folder), "--data", str(data), "--output", "runs/d", "--lr", "10"]
    assert last[:2] == ["loraplus", "train"] and last[2:10] == given and "--check" not in last
    told = loraplus_command("train", "--model", model_folder, "--data", data, "--check", "--json")
    assert set(json.loads(told.out)) == {"rows", "doubts"} and "checked" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["d.csv"]


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_check_stops_other_commands_too(tmp_path, model_folder, reviews_csv, loraplus_command, command):
    outcome = loraplus_command(
        command,
        "--model",
        model_folder,
        "--data",
        reviews_csv,
        "--max-steps",
        12,
        "--check",
        "--output",
        tmp_path / "o",
    )
    assert outcome.code == 0 and "400 rows" in outcome.out and not (tmp_path / "o").exists()


def test_check_refuses_what_train_refuses(refused, tmp_path, model_folder, reviews_csv):
    command = ["train", "--model", model_folder, "--data", reviews_csv, "--check"]
    assert "--target-modules" in refused(*command, "--target-modules", "nothing")
    assert "lr-scheduler-type" in refused(*command, "--lr-scheduler-type", "cosine_with_min_lr")


def test_a_run_that_learnt_nothing_says_so_and_so_do_its_predictions(
    tmp_path, model_folder, reviews_csv, loraplus_command
):
    arguments = ["train", "--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out"]
    outcome = loraplus_command(*arguments, "--lr", "1e-9", "--lr-head", "1e-9", "--max-steps", 4)
    assert "nothing was learnt" in outcome.out and "always the most frequent class: accuracy 0.5" in outcome.out
    assert "eval_macro_f1" in outcome.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["learnt"]["learnt"] is False and metrics["majority_share"] == pytest.approx(0.5, abs=0.02)
    predicted = loraplus_command(
        "predict", "--adapter", tmp_path / "out", "--data", reviews_csv, "--output", tmp_path / "p.csv"
    )
    assert "! nothing was learnt when" in predicted.out


def test_chats_are_told_of_the_flag_for_answers_alone(tmp_path, decoder_folder, loraplus_command):
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(40)))
    outcome = loraplus_command("train", "--task", "sft", "--model", decoder_folder, "--data", data, "--check")
    assert outcome.code == 0 and "--loss-on assistant learns the answers alone" in outcome.out.replace("\n", " ")


def test_numbers_and_labels_are_predicted(tmp_path, model_folder, loraplus_command):
    for task, header, cells in (
        ("regression", "score", [number for _, _, number, _ in rows()]),
        ("multi-label", "tags", ["|".join(labels) for *_, labels in rows()]),
    ):
        lines = [(text, cell) for (text, *_), cell in zip(rows(), cells, strict=True)]
        data = separated(tmp_path / f"{header}.csv", ("text", header), lines)
        output, predicted = tmp_path / task, tmp_path / f"{task}.csv"
        trained = loraplus_command(
            "train", "--task", task, "--model", model_folder, "--data", data, "--output", output, "--max-steps", 2
        )
        assert trained.code == 0, trained.err
        outcome = loraplus_command("predict", "--adapter", output, "--data", data, "--output", predicted, "--json")
        assert outcome.code == 0, outcome.err
        found = list(csv.DictReader(predicted.open()))
        names = ["prediction"] if task == "regression" else ["prediction", "probability of cold", "probability of warm"]
        assert len(found) == 120 and list(found[0]) == ["text", header, *names]
        counts = json.loads(outcome.out)["predictions"]
        assert list(counts) == (["least", "mean", "most"] if task == "regression" else ["cold", "warm"])


def test_a_comparison_of_numbers_is_refused_by_name(refused, tmp_path, model_folder, reviews_csv):
    arguments = ["--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out", "--task", "regression"]
    assert "--task regression is for train, predict and tune" in refused("compare", *arguments)


def test_several_labels_are_compared_and_numbers_tuned(tmp_path, model_folder, run):
    tags = separated(tmp_path / "d.csv", ("text", "tags"), [(text, "|".join(labels)) for text, *_, labels in rows()])
    shared = ["--model", model_folder, "--max-steps", 2, "--batch-size", 8, "--workers", 1]
    done = run(
        "compare", *shared, "--data", tags, "--task", "multi-label", "--tuning-runs", 1, "--seeds", 1,
        "--output", tmp_path / "compared", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["arms"]["lora"]["test"]["accuracy"]["mean"] >= 0
    scores = separated(tmp_path / "s.csv", ("text", "score"), [(text, number) for text, _, number, _ in rows()])
    done = run(
        "tune", *shared, "--data", scores, "--task", "regression", "--tuning-runs", 1, "--output", tmp_path / "tuned",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["eval_loss"] > 0
