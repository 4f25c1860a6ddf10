"""`loraplus evaluate`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_evaluate, show_next
from loraplus.cli.scores import show_each, show_scores
from loraplus.cli.terminal import Console, narrated, print_json


@app.command(
    "evaluate",
    epilog=examples(
        "loraplus evaluate --adapter runs/reviews --data kept-aside.csv",
        "loraplus evaluate --adapter runs/reviews --data kept-aside.csv --output runs/scores",
    ),
)
def run(
    adapter: flags.TrainedAdapter,
    data: Annotated[
        str, typer.Option(help="Labelled texts: CSV, TSV, JSON Lines, Excel or Parquet file (or .gz), or a folder.")
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder for scores.json and CSV tables, or a .json file for the scores alone.")
    ] = None,
    model: flags.BaseModel = None,
    text_column: flags.TextColumn = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the label or number. Default: that of training, else guessed.")
    ] = None,
    encoding: flags.Encoding = None,
    batch_size: flags.BatchSize = 64,
    trust_remote_code: flags.TrustRemoteCode = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Score a trained adapter on labelled texts: figures, each class, what is confused with what."""
    from loraplus.files.single import check_file, write_json
    from loraplus.tasks.evaluate import columns_of_training, facts_of_training, notes_of_data, scores_of, truth_of
    from loraplus.tasks.evaluation_folder import check_output, write_evaluation
    from loraplus.tasks.saved_adapter import base_of
    from loraplus.tasks.table import check_source, read_table

    is_file = output is not None and output.endswith(".json")
    target = check_file(output, (".json",), overwrite=overwrite) if output and is_file else None
    folder = check_output(output, overwrite=overwrite) if output and not is_file else None
    check_source(data)
    base_of(adapter, model)
    facts = facts_of_training(adapter)
    console = Console(stderr=json, plain=plain)
    with narrated(console):
        table = read_table(data, encoding=encoding)
    known_text, known_label = columns_of_training(table, facts, text_column, label_column)
    if not json:
        console.say(f"evaluate: {adapter} on {len(table):,} rows of {data}")

    from loraplus.cli.console import counting_bar, quiet_libraries

    quiet_libraries()
    from loraplus.tasks.predict import load_adapter, outputs_of

    classifier, tokenizer = load_adapter(adapter, model, trust_remote_code=trust_remote_code)
    truth = truth_of(table, classifier.config, known_text, known_label)
    texts = [str(text) for text in table.columns[truth.text_column]]
    with counting_bar(console, "labelling", len(texts), plain=plain) as advance:
        logits = outputs_of(classifier, tokenizer, texts, batch_size=batch_size, on_batch=advance)
    scored = scores_of(table, truth, classifier.config, logits.numpy(), facts)
    notes = notes_of_data(data, facts)
    record: dict[str, Any] = {
        "adapter": adapter, "data": data, "text_column": truth.text_column, "label_column": truth.label_column,
        **scored, "notes": notes,
    }  # fmt: skip
    if target is not None:
        write_json(target, record)
    if folder is not None:
        write_evaluation(folder, record)
    if json:
        print_json(record)
        return
    console.say(f"text {truth.text_column!r}, label {truth.label_column!r}")
    show_each(console, scored)
    show_scores(console, scored)
    for note in notes:
        console.say(f"! {note}")
    if output:
        console.say(f"written to {output}")
    columns = {"text_column": text_column, "label_column": label_column}
    options = {"model": model, "encoding": encoding, "trust_remote_code": trust_remote_code}
    show_next(console, *after_evaluate(adapter, data, **columns, **options))
