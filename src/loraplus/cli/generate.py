"""`loraplus generate`"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_predict, show_next
from loraplus.cli.terminal import Console, json_lines, print_json, screen
from loraplus.errors import InputError, visible


@app.command(
    "generate",
    epilog=examples(
        'loraplus generate --adapter runs/chat --prompt "What is LoRA+?" --chat',
        "loraplus generate --adapter runs/chat --prompts questions.txt --output answers.jsonl",
    ),
)
def run(
    adapter: Annotated[str | None, typer.Option(help="Folder that PEFT or `loraplus train` wrote.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; with --adapter, its base model if that has moved.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; else --prompts or standard input.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File with many: .txt (one a line), JSON Lines, CSV, TSV or Parquet.")
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Its column. Default: prompt, messages, conversations, or the one with text.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Whether a prompt is a user's turn. Default: if there is a chat template."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, more draws.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest with this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.", min=0)] = 0,
    num_samples: Annotated[int, typer.Option(help="Continuations of each prompt.", min=1)] = 1,
    batch_size: flags.BatchSize = 8,
    output: Annotated[str | None, typer.Option(help="JSON Lines file to write.")] = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Let a causal language model go on from a prompt, or from each prompt of a file."""
    from loraplus.files.single import check_file, write_atomically
    from loraplus.tasks.saved_adapter import base_of
    from loraplus.tasks.table import check_source

    if num_samples > 1 and temperature == 0:
        raise InputError("--num-samples above 1 needs a --temperature: at 0 all samples are the same")
    target = check_file(output, (".jsonl",), overwrite=overwrite) if output else None
    if prompt is not None and prompts is not None:
        raise InputError("--prompt and --prompts exclude each other")
    if prompts is not None:
        check_source(prompts)
    base_of(adapter, model)

    from loraplus.cli.console import counting_bar, quiet_libraries

    quiet_libraries()
    import torch

    from loraplus.tasks.adapter import load_causal
    from loraplus.tasks.generate import generate

    columns, texts, places = _read(prompt, prompts, prompt_column)
    decoder, tokenizer, _ = load_causal(model, adapter, trust_remote_code=trust_remote_code)
    if torch.cuda.is_available():
        decoder.cuda()
    asked = [text for text in texts for _ in range(num_samples)]
    streams = len(asked) == 1 and target is None and not json
    console = Console(stderr=json or target is None, plain=plain)
    with counting_bar(console, "generating", len(asked), plain=plain or streams) as advance:
        completions = generate(
            decoder, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            batch_size=batch_size, chat=chat, system=system, on_text=_write if streams else None, on_batch=advance,
            places=[place for place in places for _ in range(num_samples)],
        )  # fmt: skip
    rows = _rows(columns, completions, num_samples)
    if target is not None:
        write_atomically(target, json_lines(rows))
    if json:
        result: Any = {"output": output, "completions": len(rows)} if target else rows
        print_json(result)
    elif target is not None:
        console.say(f"{len(rows)} completions written to {output}")
    elif streams:
        _write("\n")
    else:
        _show(asked, completions, plain)
    if adapter is not None and not json:
        show_next(console, *after_predict(adapter, model, trust_remote_code))


def _read(
    prompt: str | None, prompts: str | None, column: str | None
) -> tuple[Mapping[str, Sequence[Any]], list[Any], list[str]]:
    """(columns of the source, prompts, where each stands if they are those of a file)"""
    from loraplus.tasks.prompts import read_prompts, read_stdin

    if prompts is not None:
        table, texts = read_prompts(prompts, column)
        return table.columns, texts, [table.place(index) for index in range(len(texts))]
    text = read_stdin() if prompt is None else prompt
    return {"prompt": [text]}, [text], []


def _rows(columns: Mapping[str, Sequence[Any]], completions: list[str], num_samples: int) -> list[dict[str, Any]]:
    """The source's own columns, and what was generated from each row."""
    rows = []
    for index, completion in enumerate(completions):
        source, sample = divmod(index, num_samples)
        numbered = {"sample": sample} if num_samples > 1 else {}
        rows.append(
            {**{name: values[source] for name, values in columns.items()}, **numbered, "completion": completion}
        )
    return rows


def _write(piece: str) -> None:
    out, _ = screen()
    out.write(visible(piece))
    out.flush()


def _show(asked: list[Any], completions: list[str], plain: bool) -> None:
    """Each prompt, and what follows."""
    from rich.text import Text

    from loraplus.tasks.prompts import shown

    console = Console(plain=plain)
    for prompt, completion in zip(asked, completions, strict=True):
        console.print(Text(shown(prompt), style="bold"), soft_wrap=True)
        console.copyable(completion.strip("\n"))
        console.print()
