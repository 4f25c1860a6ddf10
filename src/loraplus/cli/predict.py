"""`loraplus predict`"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_predict, show_next
from loraplus.cli.scores import show_scores
from loraplus.cli.terminal import Console, json_lines, narrated, print_json
from loraplus.errors import InputError

if TYPE_CHECKING:
    from loraplus.tasks.tabular import Table

_FORMATS = (".csv", ".tsv", ".jsonl")


@app.command(
    "predict",
    epilog=examples(
        "loraplus predict --adapter runs/reviews --data new.csv --output labelled.csv",
        "loraplus predict --adapter runs/reviews --data new.jsonl --output labelled.jsonl --text-column body",
    ),
)
def run(
    adapter: flags.TrainedAdapter,
    data: Annotated[
        str, typer.Option(help="CSV, TSV, JSON Lines, Excel or Parquet file (or .gz), or a folder of data.")
    ],
    output: Annotated[str, typer.Option(help="File to write: .csv, .tsv or .jsonl.")],
    model: flags.BaseModel = None,
    text_column: flags.TextColumn = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="Column with labels, if scores are wanted. Default: that of training or a usual name."),
    ] = None,
    encoding: flags.Encoding = None,
    batch_size: flags.BatchSize = 64,
    trust_remote_code: flags.TrustRemoteCode = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Label the texts of a file with a trained adapter, and score the answers where the file has labels."""
    from loraplus.files.single import check_file, write_atomically
    from loraplus.tasks.columns import choose_text_column
    from loraplus.tasks.evaluate import columns_of_training, facts_of_training
    from loraplus.tasks.saved_adapter import base_of
    from loraplus.tasks.table import read_table

    target = check_file(output, _FORMATS, overwrite=overwrite)
    base_of(adapter, model)
    console = Console(stderr=json, plain=plain)
    with narrated(console):
        table = read_table(data, encoding=encoding)
    facts = facts_of_training(adapter)
    known_text, known_label = columns_of_training(table, facts, text_column, label_column)
    column = choose_text_column(table, known_text, known_label)
    texts = ["" if text is None else str(text) for text in table.columns[column]]
    if not json:
        console.say(f"predict: {len(texts)} texts of {data} with {adapter}, into {output}")

    from loraplus.cli.console import counting_bar, quiet_libraries

    quiet_libraries()
    from loraplus.tasks.predict import answers, load_adapter, outputs_of

    classifier, tokenizer = load_adapter(adapter, model, trust_remote_code=trust_remote_code)
    with counting_bar(console, "labelling", len(texts), plain=plain) as advance:
        logits = outputs_of(classifier, tokenizer, texts, batch_size=batch_size, on_batch=advance)
    rows = answers(logits, classifier.config)
    scored, scoring = _scored(
        table, classifier.config, logits.numpy(), facts, data, column, known_label, label_column is not None
    )
    names = list(dict.fromkeys([*table.columns, *rows[0]]))
    labelled = ({**{name: values[i] for name, values in table.columns.items()}, **row} for i, row in enumerate(rows))
    write_atomically(target, _render(labelled, names, target.suffix))
    counts = _summary(rows, classifier.config)
    notes = [*_notes(adapter, [row["prediction"] for row in rows], scored), *scoring]
    if json:
        print_json({"output": output, "examples": len(rows), "predictions": counts, "scores": scored, "notes": notes})
    else:
        shares = " · ".join(f"{label} {count:g}" for label, count in counts.items())
        console.say(f"{len(rows)} texts labelled: {shares}")
        if scored is not None:
            show_scores(console, scored)
        for note in notes:
            console.say(f"! {note}")
        console.say(f"written to {output}")
        show_next(console, *after_predict(adapter, model, trust_remote_code))


def _scored(
    table: Table, config: Any, logits: Any, facts: dict[str, Any], data: str, text: str, label: str | None, asked: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """The scores of the rows with a label, and what is to be said of them.

    A column that only looks like one of labels is passed over with a note; one that was asked for is not.
    """
    from loraplus.tasks.evaluate import labelled_rows, notes_of_data, scores_of, truth_of

    labels = labelled_rows(table, config, label)
    if labels is None or labels[1] == text:
        if asked:
            raise InputError(f"{data}: column {label!r} (--label-column) holds no label")
        return None, []
    rows, label = labels
    labelled = table if len(rows) == len(table) else table.take(rows)
    try:
        truth = truth_of(labelled, config, text, label)
    except InputError as error:
        if asked:
            raise
        return None, [f"no scores: {error}"]
    notes = [] if labelled is table else [f"{len(table) - len(rows):,} of {len(table):,} texts have no {label!r}"]
    return scores_of(labelled, truth, config, logits[rows], facts), notes + notes_of_data(data, facts)


def _notes(adapter: str, predicted: list[Any], scored: dict[str, Any] | None) -> list[str]:
    """Warnings: the adapter's training learnt nothing (unless these scores show otherwise), or all answers agree."""
    from loraplus.files.paths import is_file, user_path
    from loraplus.files.single import read_json
    from loraplus.tasks.finished import METRICS_FILE
    from loraplus.tasks.learnt import ADVICE

    notes = []
    path = user_path(adapter) / METRICS_FILE
    metrics = read_json(path) if is_file(path) else {}
    learnt = metrics.get("learnt") if isinstance(metrics, dict) else None
    shown = scored is not None and scored["learnt"]["learnt"]  # on more texts than were kept for validation
    if isinstance(learnt, dict) and learnt.get("learnt") is False and not shown:
        notes.append(f"nothing was learnt when {adapter} was trained, by the permutation test; {ADVICE}")
    if len(predicted) > 1 and len(set(predicted)) == 1:
        notes.append(f"every text is given {str(predicted[0])!r}")
    return notes


def _summary(rows: list[dict[str, Any]], config: Any) -> dict[str, float]:
    """How often each label was given; of numbers their range and mean."""
    predicted = [row["prediction"] for row in rows]
    if config.problem_type == "regression":
        return {"least": min(predicted), "mean": sum(predicted) / len(predicted), "most": max(predicted)}
    several = config.problem_type == "multi_label_classification"
    labels = Counter(label for value in predicted for label in (value.split("|") if several else (value,)))
    return {label: labels[label] for label in config.id2label.values()}


def _render(rows: Iterable[dict[str, Any]], names: list[str], suffix: str) -> str:
    if suffix == ".jsonl":
        return json_lines(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
