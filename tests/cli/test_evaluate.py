"""`loraplus evaluate`, scores by `predict`, the report of a classifier and its card, from the outside."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import review
from huggingface_hub import ModelCard
from language import chat_rows, text_rows, write_lines
from peft import PeftModel
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification

EVIL = '<b>"n|o*"</b> `x`'
CLASSES = {"positive": "good|one", "negative": EVIL, "neither": "neither"}


def write(path, rows, names=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def rows_of(count, seed):
    rng = random.Random(seed)
    for index in range(count):
        kind = ("positive", "negative")[index % 2]
        text = "the film plot actor the scene" if index % 5 == 4 else review(rng, kind)
        yield f"{text} {index}", CLASSES["neither" if index % 5 == 4 else kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    from loraplus.cli import main

    place = tmp_path_factory.mktemp("my runs")
    data = write(
        place / "all of it.csv", [*rows_of(200, 0), ("</script><script>alert(1)</script>", CLASSES["positive"])]
    )
    with pytest.raises(SystemExit) as stop:
        main([
            "train", "--model", str(model_folder), "--data", str(data), "--output", str(place / "run 1"), "--max-steps",
            "40", "--batch-size", "16", "--lr", "5e-3", "--rank", "4", "--eval-steps", "20",
        ])  # fmt: skip
    assert stop.value.code == 0
    return place


@pytest.fixture(scope="module")
def held_out(trained):
    return write(trained / "held out.csv", rows_of(120, 1))


def last_line(outcome):
    return outcome.out.strip().splitlines()[-1]


def test_evaluate_tells_the_scores_of_the_answers_that_predict_gives(trained, held_out, tmp_path, loraplus_command):
    evaluated = loraplus_command("evaluate", "--adapter", trained / "run 1", "--data", held_out, "--json")
    assert evaluated.code == 0, evaluated.err
    found = json.loads(evaluated.out)
    target = tmp_path / "p.csv"
    predicted = loraplus_command(
        "predict", "--adapter", trained / "run 1", "--data", held_out, "--output", target, "--json"
    )
    told = json.loads(predicted.out)
    rows = list(csv.DictReader(target.open()))
    labels, answers = [row["label"] for row in rows], [row["prediction"] for row in rows]
    assert found["accuracy"] == pytest.approx(sum(map(str.__eq__, labels, answers)) / 120)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro"))
    assert found["examples"] == 120 and found["accuracy"] > 0.6 and found["learnt"]["learnt"]
    assert [row["label"] for row in found["per_class"]] == sorted(CLASSES.values())
    assert told["scores"] == {name: found[name] for name in told["scores"]}
    assert sum(map(sum, found["confusion_matrix"])) == 120
    assert all(rows[int(row["where"].split()[1]) - 2]["text"] == row["text"] for row in found["mistakes"])


def test_evaluate_writes_a_folder_or_a_file_and_replaces_nothing(
    trained, held_out, tmp_path, loraplus_command, refused
):
    def call(output, *more):
        return ["evaluate", "--adapter", trained / "run 1", "--data", held_out, "--output", output, *more]

    folder, mine = tmp_path / "of mine", tmp_path / "of mine" / "notes.txt"
    assert loraplus_command(*call(folder)).code == 0
    assert {path.name for path in folder.iterdir()} >= {"scores.json", "per_class.csv", "confusion_matrix.csv"}
    record = json.loads((folder / "scores.json").read_text())
    table = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [float(row["f1"]) for row in table] == pytest.approx([row["f1"] for row in record["per_class"]])
    assert not list(tmp_path.rglob("*.tmp"))
    mine.write_text("mine")
    assert "--overwrite replaces an earlier evaluation" in refused(*call(folder))
    assert loraplus_command(*call(folder, "--overwrite")).code == 0 and mine.read_text() == "mine"
    assert loraplus_command(*call(tmp_path / "s.json")).code == 0
    assert json.loads((tmp_path / "s.json").read_text())["accuracy"] == record["accuracy"]
    assert "exists" in refused(*call(tmp_path / "s.json"))
    assert "no scores.json of an earlier evaluation" in refused(*call(trained / "run 1", "--overwrite"))


BAD = {
    "an unknown label": (
        [("a", "good|one"), ("b", "other")],
        ("text", "label"),
        (),
        "line 3: the adapter does not know",
    ),
    "a missing label": ([("a", "good|one"), ("b", "")], ("text", "label"), (), "first in line 3"),
    "no column of labels": ([("a b", "1"), ("b", "1")], ("text", "id"), (), "--label-column"),
    "a column that is not there": ([("a", "neither")], ("text", "label"), ("--label-column", "y"), "no column 'y'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_evaluated_is_refused_in_one_line(name, trained, tmp_path, refused):
    rows, names, more, expected = BAD[name]
    data = write(tmp_path / "d.csv", rows, names)
    assert expected in refused("evaluate", "--adapter", trained / "run 1", "--data", data, *more)


def test_predict_scores_the_rows_that_have_labels_and_says_why_it_scores_none(
    trained, held_out, tmp_path, loraplus_command
):
    def notes_and_scores(rows, *more, names=("text", "label")):
        data = write(tmp_path / "d.csv", rows, names)
        outcome = loraplus_command(
            "predict", "--adapter", trained / "run 1", "--data", data, "--output", tmp_path / "p.csv", "--overwrite",
            "--json", *more,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        return found["notes"], found["scores"]

    some = [(text, label if index % 3 else "") for index, (text, label) in enumerate(rows_of(30, 2))]
    notes, scores = notes_and_scores(some)
    assert scores["examples"] == 20 and any("10 of 30 texts have no 'label'" in note for note in notes)
    notes, scores = notes_and_scores([("a", "other"), ("b", "neither")])
    assert scores is None and any("does not know the label 'other'" in note for note in notes)
    notes, scores = notes_and_scores([("a", "x"), ("b", "y")], names=("text", "id"))
    assert scores is None and not any("score" in note for note in notes)
    _, scores = notes_and_scores([("a", "neither"), ("b", "neither")], "--label-column", "kind", names=("text", "kind"))
    assert scores["examples"] == 2


def test_scores_that_show_something_was_learnt_are_not_contradicted(trained, held_out, tmp_path, loraplus_command):
    adapter = tmp_path / "run"
    shutil.copytree(trained / "run 1", adapter)
    metrics = json.loads((adapter / "metrics.json").read_text())
    metrics["learnt"]["learnt"] = False  # few validation examples can tell so little
    (adapter / "metrics.json").write_text(json.dumps(metrics))
    unlabelled = write(tmp_path / "new.csv", [(text,) for text, _ in rows_of(20, 2)], ("text",))
    for data, told in ((held_out, False), (unlabelled, True)):
        predicted = loraplus_command(
            "predict", "--adapter", adapter, "--data", data, "--output", tmp_path / f"{told}.csv"
        )
        assert predicted.code == 0 and ("nothing was learnt when" in predicted.out) is told


def test_scores_on_the_data_of_training_come_with_a_warning(trained, loraplus_command):
    outcome = loraplus_command("evaluate", "--adapter", trained / "run 1", "--data", trained / "all of it.csv")
    assert "! the adapter was trained on texts of" in outcome.out
    assert EVIL in outcome.out


def test_the_next_command_runs_as_it_stands(trained, held_out, tmp_path, loraplus_command):
    outcome = loraplus_command("evaluate", "--adapter", trained / "run 1", "--data", held_out)
    for name in ("predict", "merge"):
        words = shlex.split(last_line(outcome))
        assert words[:2] == ["loraplus", name]
        outcome = loraplus_command(*words[1:])
        assert outcome.code == 0, outcome.err
    words = shlex.split(last_line(outcome))
    assert words[:2] == ["python", "-c"] and str(trained / "run 1-merged") in words[2]
    compile(words[2], "next", "exec")


def test_the_report_shows_each_class_and_hides_no_text_in_its_code(trained):
    page = (trained / "run 1" / "report.html").read_text()
    for title in ("Losses", "Before and after", "Each class", "Confusion matrix", "The most confident mistakes"):
        assert f"<h2>{title}</h2>" in page
    assert EVIL not in page and "&lt;b&gt;" in page and "<script>alert" not in page
    metrics = json.loads((trained / "run 1" / "metrics.json").read_text())
    scores = json.loads((trained / "run 1" / "scores.json").read_text())
    assert metrics["learnt"]["p_value"] == scores["learnt"]["p_value"]
    assert scores["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert scores["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    labels = {row["text"]: row["label"] for row in csv.DictReader((trained / "all of it.csv").open())}
    assert scores["mistakes"] and all(labels[row["text"]] == row["truth"] for row in scores["mistakes"])
    assert scores["macro_f1"] == pytest.approx(metrics["eval_macro_f1"])
    assert metrics["base"]["eval_loss"] > metrics["eval_loss"]
    assert f"{100 * metrics['base']['eval_accuracy']:.1f}%" in page


def test_the_base_is_the_model_without_its_adapter(trained, model_folder):
    """B is zero at the start, so what the run set out from is the loss of the first evaluation at a rate of 0."""
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.train import train

    output = trained / "still"
    config = TrainConfig(
        model=str(model_folder), data=str(trained / "all of it.csv"), output=str(output), max_steps=1, batch_size=16,
        rank=4, lr=1e-10, lr_ratio=1.0, lr_head=1e-10,
    )  # fmt: skip
    still, moved = train(config)["base"], json.loads((trained / "run 1" / "metrics.json").read_text())["base"]
    assert still == pytest.approx(moved)
    assert still["eval_loss"] == pytest.approx(json.loads((output / "metrics.json").read_text())["eval_loss"], rel=1e-4)


def test_the_card_is_valid_and_what_it_shows_runs(trained):
    folder = trained / "run 1"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-classification"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_accuracy"] in [result.metric_value for result in card.data.eval_results]
    assert "[More Information Needed]" not in card.text
    assert '&lt;b&gt;"n\\|o\\*"&lt;/b&gt; \\`x\\`' in card.text and "<b>" not in card.text
    assert f"| training examples | {metrics['data']['train_examples']} |" in card.text
    code = re.search(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(repr(label) in done.stdout for label in CLASSES.values())
    listed = json.loads((folder / "loraplus_manifest.json").read_text())["files"]
    assert listed["README.md"]["size"] == (folder / "README.md").stat().st_size


def test_a_card_that_somebody_wrote_in_is_kept_and_ours_is_replaced(trained, model_folder, tmp_path, loraplus_command):
    def call(*more):
        return loraplus_command(
            "train", "--model", model_folder, "--data", trained / "all of it.csv", "--output", tmp_path / "out",
            "--batch-size", 8, "--rank", 2, *more,
        )  # fmt: skip

    card = tmp_path / "out" / "README.md"
    assert call("--max-steps", 1).code == 0
    first = card.read_text()
    assert call("--max-steps", 2, "--overwrite").code == 0
    assert "max_steps: 2" in card.read_text() and "max_steps: 1" in first
    card.write_text("---\nlicense: mit\n---\n\nmy words\n")
    assert call("--max-steps", 2, "--resume").code == 0 and "my words" in card.read_text()
    outcome = call("--max-steps", 1, "--overwrite")
    assert outcome.code == 0 and "my words" in card.read_text()
    assert "README.md is not what loraplus wrote, so it stays" in outcome.out + outcome.err
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3)
    PeftModel.from_pretrained(model, tmp_path / "out")


@pytest.fixture(scope="module", params=["sft", "lm"])
def language_run(request, tmp_path_factory, decoder_folder):
    """(folder of an adapter, file that it was validated on, its metrics)"""
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.train import train

    place = tmp_path_factory.mktemp("language")
    rows, more = (chat_rows, {"loss_on": "assistant"}) if request.param == "sft" else (text_rows, {"max_length": 24})
    data, aside = (write_lines(place / f"{seed}.jsonl", rows(60, seed)) for seed in (0, 1))
    config = TrainConfig(
        task=request.param, model=str(decoder_folder), data=str(data), eval_data=str(aside), output=str(place / "run"),
        max_steps=8, batch_size=8, rank=4, lr=5e-3, samples=0, **more,
    )  # fmt: skip
    return place / "run", aside, train(config)


def test_a_language_model_has_the_loss_a_token_that_training_measured_and_so_has_its_base(
    language_run, tmp_path, loraplus_command
):
    adapter, aside, metrics = language_run
    arguments = ["evaluate", "--adapter", adapter, "--data", aside, "--batch-size", 7]
    outcome = loraplus_command(*arguments, "--json", "--output", tmp_path / "scores")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert found["perplexity"] == pytest.approx(metrics["eval_perplexity"], rel=1e-4)
    assert found["base"]["loss"] == pytest.approx(metrics["base"]["eval_loss"], rel=1e-4) != found["loss"]
    assert found["target_tokens"] == metrics["data"]["validation_target_tokens"]
    assert found["loss_on"] == metrics["data"]["loss_on"] and not found["notes"]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["loss"] == found["loss"]
    outcome = loraplus_command(*arguments)
    assert (
        f"loss {found['loss']:.4f} a token" in outcome.out and f"base model {found['base']['loss']:.4f}" in outcome.out
    )
    if longer := found["longer_than_context"]:
        assert f"up to 24 tokens; {longer} longer ones split into parts, nothing lost" in outcome.out
    assert bool(longer) == (metrics["data"]["long_examples"] == "split")
    words = shlex.split(last_line(outcome))
    assert words[:2] == ["loraplus", "generate"] and loraplus_command(*words[1:], "--max-new-tokens", 2).code == 0


def test_what_is_not_of_a_kind_of_adapter_is_refused_and_another_kind_of_data_is_told(
    language_run, trained, held_out, tmp_path, loraplus_command, refused
):
    adapter, aside, metrics = language_run
    assert "no labels" in refused("evaluate", "--adapter", adapter, "--data", aside, "--label-column", "x")
    assert "no prompts" in refused(
        "evaluate", "--adapter", trained / "run 1", "--data", held_out, "--prompt-column", "text"
    )
    if metrics["data"]["format"] == "text":
        return
    texts = write(tmp_path / "t.csv", [("a text of words", 1)], ("body", "n"))
    outcome = loraplus_command("evaluate", "--adapter", adapter, "--data", texts, "--text-column", "body", "--json")
    found = json.loads(outcome.out)
    assert found["format"] == "text" and found["loss_on"] == "all" and "another kind" in found["notes"][0]
    (tmp_path / "e.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    assert "e.jsonl, line 1" in refused("evaluate", "--adapter", adapter, "--data", tmp_path / "e.jsonl")


@pytest.mark.parametrize("fact", [{"max_length": "long"}, {"max_length": 1}, {"long_examples": []}, {"loss_on": "it"}])
def test_damaged_facts_of_the_training_data_are_refused_by_name(fact, language_run, tmp_path, refused):
    adapter, aside, _ = language_run
    damaged = shutil.copytree(adapter, tmp_path / "damaged", ignore=shutil.ignore_patterns("checkpoint-*"))
    facts = json.loads((damaged / "data_facts.json").read_text())
    (damaged / "data_facts.json").write_text(json.dumps({**facts, **fact}))
    ((name, value),) = fact.items()
    line = refused("evaluate", "--adapter", damaged, "--data", aside)
    assert f"data_facts.json of {damaged} is damaged: {name} is {value!r}" in line


def test_a_merged_model_is_told_from_an_adapter_with_what_to_type(
    trained, language_run, held_out, tmp_path, loraplus_command, refused
):
    merged = tmp_path / "one model"
    assert loraplus_command("merge", "--adapter", trained / "run 1", "--output", merged).code == 0
    line = refused("predict", "--adapter", merged, "--data", held_out, "--output", tmp_path / "p.csv")
    words = shlex.split(line[line.index("--adapter") :])
    assert "is a whole model" in line and words == ["--adapter", str(trained / "run 1")]
    decoder = tmp_path / "decoder"
    assert loraplus_command("merge", "--adapter", language_run[0], "--output", decoder).code == 0
    line = refused("evaluate", "--adapter", decoder, "--data", language_run[1])
    words = shlex.split(line[line.index("loraplus generate") :])
    assert words == ["loraplus", "generate", "--model", str(decoder)]
    assert loraplus_command(*words[1:], "--prompt", "Hello", "--max-new-tokens", 2).code == 0
