"""Every command that a page shows can be typed: its program, its flags, its files and its targets are there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib

import pytest
import typer

from loraplus.cli.main import app
from pages.blocks import PAGES, ROOT, blocks, inline, name_of

PROGRAM = typer.main.get_command(app)
COMMANDS = PROGRAM.commands  # type: ignore[attr-defined]
FLAGS = {flag for command in COMMANDS.values() for p in command.params for flag in [*p.opts, *p.secondary_opts]}
TARGETS = set(re.findall(r"^([\w-]+)(?=[^=\n]*:(?!=))", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {
    "test-newest", "test-oldest",
}  # fmt: skip
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
WITHOUT_A_LOOK = {"axolotl", "cd", "cp", "echo", "export", "git", "optuna-dashboard", "pip-audit"}
# Flags that pages name and that are not ours.
OF_OTHERS = {
    "--multi_gpu": "accelerate launch", "--loraplus_lr_ratio": "a script's, through HfArgumentParser",
    "--loraplus_auto_rates": "the same", "--no-deps": "pip",
    "--optimizer": "ms-swift's and Lightning's", "--lorap_lr_ratio": "ms-swift's own",
    "--learning_rate": "transformers'", "--optim_args": "the same",
}  # fmt: skip


def commands_in(text: str) -> list[list[str]]:
    """The words of each command in shell lines, without comments, variables and redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("|;&<>"):
                if words:
                    found.append(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=\S*", word):
                words.append(word)
    return found


def check_ours(words: list[str], whole: bool) -> None:
    """`whole`: a command as it is typed; a part in running text may leave out what is needed."""
    assert words, "loraplus by itself"
    if words[0].startswith("-"):
        assert words[0] in {"--help", *(flag for p in PROGRAM.params for flag in p.opts)}, words
        return
    assert words[0] in COMMANDS, f"no command {words[0]}"
    if "--" in words:  # what follows is a command of the user's own
        words = words[: words.index("--")]
        whole = False
    command, arguments = COMMANDS[words[0]], words[1:]
    if whole and "--config" not in arguments and "…" not in arguments:
        command.make_context(words[0], list(arguments))  # flags, values of the right type, nothing left over
        return
    known = {flag for p in command.params for flag in [*p.opts, *p.secondary_opts]} | {"--help"}
    assert not [word for word in arguments if word.startswith("--") and word not in known], words


def check_python(words: list[str], whole: bool) -> None:
    if words[0] == "-m":
        if words[1] == "loraplus":
            check_ours(words[2:], whole)
        elif words[1] == "pip":
            check_pip(words[2:])
        else:
            assert importlib.util.find_spec(words[1]) is not None, f"no module {words[1]}"
    elif words[0] != "-c":
        script = ROOT / words[0]
        assert script.is_file(), f"no file {words[0]}"
        text = script.read_text(encoding="utf-8")
        missing = [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in text]
        assert not missing or "TrlParser" in text, missing


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    wanted = [word for word in words[1:] if not word.startswith("-")]
    for word in wanted:
        assert not word.startswith("loraplus"), f"{word} is on no index: say . in a clone"
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        assert extras is None or set((extras[1] or "").split(",")) - {""} <= EXTRAS, f"no such extra: {word}"


def check(words: list[str], whole: bool = True) -> None:
    program = words[0].removeprefix(".venv/bin/")
    if program == "loraplus":
        check_ours(words[1:], whole)
    elif program in ("python", "python3"):
        check_python(words[1:], whole)
    elif program in ("torchrun", "accelerate"):
        check_python(words[words.index("-m") :] if "-m" in words else [next(w for w in words if ".py" in w)], whole)
    elif program == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
    elif program == "pip":
        check_pip(words[1:])
    elif program == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in words[1:] if not word.startswith("-"))
    else:
        assert program in WITHOUT_A_LOOK, f"a program that no test knows: {program}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_can_be_typed(page):
    for block in blocks(page):
        if block.language == "sh":
            for words in commands_in(block.code):
                try:
                    check(words)
                except (AssertionError, ValueError, typer.TyperException) as error:
                    pytest.fail(f"{block}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_flags_in_running_text_are_there(page):
    for line, token in inline(page, "code_inline"):
        words = token.content.split()
        try:
            if words and words[0] in ("loraplus", "make", "pip", "torchrun") and len(words) > 1:
                for command in commands_in(token.content):
                    check(command, whole=False)
            elif words and re.fullmatch(r"--[a-z][\w-]+", words[0]):
                assert words[0] in FLAGS | OF_OTHERS.keys() | {"--help"} or words[0] in _of_scripts(), words[0]
        except (AssertionError, ValueError) as error:
            pytest.fail(f"{name_of(page)}:{line}: {token.content}: {error}")


def _of_scripts() -> set[str]:
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    return {flag for script in scripts for flag in re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8"))}
