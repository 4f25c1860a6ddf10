"""What reaches the terminal: no text is markup, none is an escape code, errors are one line whatever is in them."""

from __future__ import annotations

import io
import json
import logging
import shutil
import warnings

import pytest
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from loraplus.cli import main as run_main
from loraplus.cli.main import _plain_warnings
from loraplus.cli.terminal import Console, json_for_terminal, narrated
from loraplus.errors import LoraPlusWarning

NASTY = ["a[/b]", "[red]x[/red]", "[link=http://x]y[/link]", "[@click=app.bell]z", ":smile:", "[not closed", "\\[x]"]
ARGUMENTS = [
    ("inspect", "./{}"),
    ("train", "--model", "{}", "--data", "d.csv", "--output", "o"),
    ("generate", "--model", "{}/", "--prompt", "x"),
    ("{}",),
    ("train", "--{}"),
]
REFUSED = [PermissionError(13, "Permission denied", "/x\n[/b]"), OSError(28, "No space left"), MemoryError()]
OBEYED = ["\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "\x1bc", "a\rb", "\u202egnp", "\u2066x", "\x08\x08"]


def console(**options):
    return Console(file=io.StringIO(), width=200, **options)


def printed(on):
    return on.file.getvalue()


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_shown_as_it_stands(text, terminal):
    for make in (lambda on: on.say(text), lambda on: on.print(Text(text)), lambda on: on.print(table(text, text))):
        on = console(force_terminal=terminal, color_system=None)
        make(on)
        assert text in printed(on)


def table(title, cell):
    made = Table(title, box=None)
    made.add_row(cell)
    return made


@pytest.mark.parametrize("text", OBEYED)
def test_what_a_terminal_obeys_does_not_reach_it(text):
    for make in (lambda on: on.say(text), lambda on: on.print(Text(text)), lambda on: on.print(table(text, text))):
        on = console()
        make(on)
        assert not set(printed(on)) & set("\x1b\x9b\x07\x08\r\u202e\u2066")


def test_styles_of_our_own_still_come_through():
    on = console(force_terminal=True, color_system="standard")
    on.print(Text("a\x1b[5m", style="red"))
    assert printed(on).startswith("\x1b[31ma") and r"\x1b[5m" in printed(on)


@pytest.mark.parametrize("value", ["\x9b31m", "\x7f", "\u202e", "\udcff", "\u2028", "é漢\U0001f600"])
def test_json_is_the_same_to_a_parser_and_nothing_to_a_terminal(value):
    text = json_for_terminal(json.dumps({"a": value}, ensure_ascii=False))
    assert json.loads(text) == {"a": value}
    assert not set(text) & set("\x9b\x7f\u202e\udcff\u2028")


@pytest.mark.parametrize("text", [*NASTY, *OBEYED, "a" * 5000, "n\udcffx", "a b " * 2000], ids=range(18))
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda words: words[0])
def test_an_error_is_one_line_whatever_is_in_it(capsys, tmp_path, monkeypatch, text, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main([part.format(text) for part in arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and err.startswith("loraplus: ")
    assert len(err) <= 501 and not set(err) & set("\x1b\x9b\x07\x08\r\u202e\u2066")
    assert not any(tmp_path.iterdir())


def test_a_warning_is_one_line(capsys):
    with _plain_warnings():
        warnings.warn("a\nb \x1b[31m", LoraPlusWarning, stacklevel=1)
    assert capsys.readouterr().err == "loraplus: warning: a b \\x1b[31m\n"


@pytest.mark.parametrize("raised", REFUSED)
def test_what_the_system_refuses_is_one_line(capsys, monkeypatch, raised, tmp_path):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("loraplus.inspection.inspect_folder", fail)
    with pytest.raises(SystemExit) as stop:
        run_main(["inspect", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1


def test_the_end_of_a_file_is_no_interrupt(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise EOFError

    monkeypatch.setattr("loraplus.inspection.inspect_folder", fail)
    with pytest.raises(SystemExit) as stop:
        run_main(["inspect", str(tmp_path)])
    assert stop.value.code == 2 and "ends before its time" in capsys.readouterr().err


def test_an_adapter_with_names_of_any_kind_is_shown(adapter, tmp_path, loraplus_command):
    folder = shutil.copytree(adapter, tmp_path / "[red]\x1b[5m")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace("layers.0", "layers.[/b]\x1b[5m"): t for name, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/x/\x1b[31m[/b]\u202e"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    outcome = loraplus_command("inspect", folder)
    assert outcome.code == 0 and r"[red]\x1b[5m: adapter" in outcome.out and r"/x/\x1b[31m[/b]\u202e" in outcome.out
    assert "[/b]\\x1b[5m" in outcome.out and "\x1b" not in outcome.out
    found = json.loads(loraplus_command("inspect", folder, "--json").out)
    assert found["base"]["name"] == settings["base_model_name_or_path"]


def test_labels_and_outputs_with_markup_are_trained_and_predicted(
    model_folder, tmp_path, monkeypatch, loraplus_command
):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"a good film {i},a[/b]\na bad film {i},[red]\x1b[31m\n" for i in range(20))
    (tmp_path / "d.csv").write_text("text,label\n" + rows)
    train = (
        "train",
        "--model",
        model_folder,
        "--data",
        "d.csv",
        "--output",
        "h[/x]",
        "--max-steps",
        2,
        "--batch-size",
        8,
    )
    outcome = loraplus_command(*train)
    assert outcome.code == 0 and "adapter: h[/x]" in outcome.out, outcome
    outcome = loraplus_command("predict", "--adapter", "h[/x]", "--data", "d.csv", "--output", "[p].csv")
    assert outcome.code == 0 and "a[/b] " in outcome.out and r"[red]\x1b[31m " in outcome.out, outcome
    assert "written to [p].csv" in outcome.out and "\x1b" not in outcome.out + outcome.err
    assert "\x1b[31m" in (tmp_path / "[p].csv").read_text()


def test_what_the_library_says_of_long_work_is_shown_where_the_rest_is():
    on = console()
    with narrated(on):
        logging.getLogger("loraplus.tasks.progress_log").info("reading %s", "a[/b]\x1b[0m")
    logging.getLogger("loraplus.tasks.progress_log").info("no more")
    assert printed(on) == "reading a[/b]\\x1b[0m\n"
