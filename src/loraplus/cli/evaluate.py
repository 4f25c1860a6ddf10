"""`loraplus evaluate`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_evaluate, after_evaluate_language, show_next
from loraplus.cli.scores import show_each, show_losses, show_scores
from loraplus.cli.terminal import Console, narrated, print_json
from loraplus.errors import InputError


@app.command(
    "evaluate",
    epilog=examples(
        "loraplus evaluate --adapter runs/reviews --data kept-aside.csv",
        "loraplus evaluate --adapter runs/chat --data kept-aside.jsonl --output runs/scores",
    ),
)
def run(
    adapter: flags.TrainedAdapter,
    data: Annotated[
        str,
        typer.Option(
            help="Labelled texts, or what a language model learns from: CSV, TSV, JSON Lines, Excel or Parquet file "
            "(or .gz), or a folder."
        ),
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder for scores.json and CSV tables, or a .json file for the scores alone.")
    ] = None,
    model: flags.BaseModel = None,
    text_column: flags.TextColumn = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the label or number. Default: that of training, else guessed.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Language models: column with what is asked.")] = None,
    completion_column: Annotated[
        str | None, typer.Option(help="Language models: column with what is answered.")
    ] = None,
    messages_column: Annotated[str | None, typer.Option(help="Language models: column with chats.")] = None,
    encoding: flags.Encoding = None,
    batch_size: flags.BatchSize = 64,
    trust_remote_code: flags.TrustRemoteCode = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Score a trained adapter on data kept aside: of labels each class and what is confused, else the perplexity."""
    from loraplus.files.single import check_file, write_json
    from loraplus.tasks.evaluate import facts_of_training, notes_of_data
    from loraplus.tasks.evaluation_folder import check_output, write_evaluation
    from loraplus.tasks.saved_adapter import adapter_settings, base_of
    from loraplus.tasks.table import check_source, read_table

    is_file = output is not None and output.endswith(".json")
    target = check_file(output, (".json",), overwrite=overwrite) if output and is_file else None
    folder = check_output(output, overwrite=overwrite) if output and not is_file else None
    check_source(data)
    base_of(adapter, model)
    is_language = adapter_settings(adapter).get("task_type") == "CAUSAL_LM"
    of_chats = {
        "prompt_column": prompt_column,
        "completion_column": completion_column,
        "messages_column": messages_column,
    }
    other = {"label_column": label_column} if is_language else of_chats
    if given := [f"--{name.replace('_', '-')}" for name, value in other.items() if value is not None]:
        kind = "a language model, which has no labels" if is_language else "texts with labels, which have no prompts"
        raise InputError(f"{given[0]} cannot be used: {adapter} is an adapter of {kind}")
    facts = facts_of_training(adapter)
    console = Console(stderr=json, plain=plain)
    with narrated(console):
        table = read_table(data, encoding=encoding)
    if not json:
        console.say(f"evaluate: {adapter} on {len(table):,} rows of {data}")
    columns = {"text_column": text_column, **(of_chats if is_language else {"label_column": label_column})}
    options: dict[str, Any] = {"batch_size": batch_size, "trust_remote_code": trust_remote_code, "plain": plain}
    scored = (_language if is_language else _labels)(console, table, adapter, model, facts, columns, **options)
    record: dict[str, Any] = {
        "adapter": adapter, "data": data, **scored, "notes": [*scored.get("notes", ()), *notes_of_data(data, facts)],
    }  # fmt: skip
    if target is not None:
        write_json(target, record)
    if folder is not None:
        write_evaluation(folder, record)
    if json:
        print_json(record)
        return
    if is_language:
        show_losses(console, record)
    else:
        console.say(f"text {record['text_column']!r}, label {record['label_column']!r}")
        show_each(console, record)
        show_scores(console, record)
    for note in record["notes"]:
        console.say(f"! {note}")
    if output:
        console.say(f"written to {output}")
    how = {"model": model, "trust_remote_code": trust_remote_code}
    if is_language:
        show_next(console, *after_evaluate_language(adapter, **how))
    else:
        show_next(console, *after_evaluate(adapter, data, **columns, encoding=encoding, **how))


def _labels(
    console: Console, table: Any, adapter: str, model: str | None, facts: dict[str, Any], columns: dict[str, Any],
    *, batch_size: int, trust_remote_code: bool, plain: bool,
) -> dict[str, Any]:  # fmt: skip
    """The scores of an adapter that labels texts, and the columns they are of."""
    from loraplus.cli.console import counting_bar, quiet_libraries

    quiet_libraries()
    from loraplus.tasks.evaluate import columns_of_training, scores_of, truth_of
    from loraplus.tasks.predict import load_adapter, outputs_of

    known = columns_of_training(table, facts, columns["text_column"], columns["label_column"])
    classifier, tokenizer = load_adapter(adapter, model, trust_remote_code=trust_remote_code)
    truth = truth_of(table, classifier.config, *known)
    texts = [str(text) for text in table.columns[truth.text_column]]
    with counting_bar(console, "labelling", len(texts), plain=plain) as advance:
        logits = outputs_of(classifier, tokenizer, texts, batch_size=batch_size, on_batch=advance)
    scored = scores_of(table, truth, classifier.config, logits.numpy(), facts)
    return {"text_column": truth.text_column, "label_column": truth.label_column, **scored}


def _language(
    console: Console, table: Any, adapter: str, model: str | None, facts: dict[str, Any], columns: dict[str, Any],
    *, batch_size: int, trust_remote_code: bool, plain: bool,
) -> dict[str, Any]:  # fmt: skip
    """Loss and perplexity of an adapted language model, and what they are of."""
    from loraplus.cli.console import counting_bar, quiet_libraries

    quiet_libraries()
    from loraplus.tasks.adapter import load_causal
    from loraplus.tasks.conversations import NamedColumns
    from loraplus.tasks.evaluate_language import kept_aside, losses

    adapted, tokenizer, base = load_causal(model, adapter, trust_remote_code=trust_remote_code)
    named = NamedColumns(**{name.removesuffix("_column"): value for name, value in columns.items()})
    with narrated(console):
        aside = kept_aside(table, adapter, tokenizer, facts, named, base)
    with counting_bar(console, "measuring", 2 * len(aside.rows), plain=plain) as advance:
        measured = losses(adapted, tokenizer, aside, batch_size=batch_size, on_batch=advance)
    told = {name: value for name, value in aside.facts.items() if name != "largest_token"}
    return {**told, **measured, "notes": list(aside.notes)}
