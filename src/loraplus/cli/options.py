"""Turns a configuration dataclass into a command: every field a flag, the same names as YAML keys.

`--config file.yaml` fills click's default map, so a value from the file goes through the same conversion and the
same error messages as a flag, and a flag on the command line wins over the file.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from string import Template
from types import MappingProxyType
from typing import Annotated, Any, get_type_hints

import typer

from loraplus.cli import flags as common_flags
from loraplus.cli.flag_groups import OF_COMMAND, ORDER, group_of
from loraplus.cli.terminal import Console, is_speaker, without_chatter
from loraplus.errors import InputError
from loraplus.files.parsing import LONGEST_YAML, ParseError, parse_yaml
from loraplus.files.single import read_text

# Options of the command itself, not of the run: never part of the configuration.
COMMAND_ONLY = {"config", "overwrite", "resume", "check", "json", "plain", "help"}


def load_yaml(path: str, known: set[str]) -> dict[str, Any]:
    """Reads a configuration file; keys may be spelled with - or _, and a list stands for its items joined by commas.

    Raises:
        InputError: the file cannot be read, is not a mapping, or holds a key that does not exist or is a flag only.
    """
    try:
        data = parse_yaml(read_text(path, LONGEST_YAML + 1, "--config: "), as_text=True)
    except ParseError as error:
        raise InputError(f"{path}{f', line {error.line}' if error.line else ''}: {error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected `key: value` lines, found {type(data).__name__}")
    resolved = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in COMMAND_ONLY:
            raise InputError(f"{path}: {name} is a flag only, no configuration key; say --{name} on the command line")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"{path}: there is no configuration key {key!r}; the nearest is {near[0]!r}")
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in items):
            raise InputError(f"{path}: {name} must be a value or a list of values")
        resolved[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return resolved


def _fill_default_map(context: typer.Context, path: str | None) -> str | None:
    if path:
        known = {p.name for p in context.command.params if p.name} - COMMAND_ONLY
        context.default_map = load_yaml(path, known)
    return path


def _parameter(
    spec: Field[Any], annotation: object, names: Mapping[str, str], needed: Sequence[str]
) -> inspect.Parameter:
    name = spec.name.replace("_", "-")
    # The negative form lets a flag win over `true` in the file.
    flags = spec.metadata.get("flags") or (
        f"--{name}/--no-{name}" if annotation in (bool, bool | None) else f"--{name}",
    )
    parser = spec.metadata.get("parser")
    help = Template(spec.metadata["help"]).safe_substitute(names)
    option = typer.Option(
        *flags, help=help, show_default=spec.default not in ("", None), parser=parser,
        metavar="NUMBER|auto" if parser else None, rich_help_panel=group_of(spec.name, needed),
    )  # fmt: skip
    default = inspect.Parameter.empty if spec.default is MISSING else spec.default
    return inspect.Parameter(
        spec.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[str if parser else annotation, option],
    )


_CONFIG = typer.Option(
    "--config",
    help="YAML file with any of these flags as keys.",
    is_eager=True,
    callback=_fill_default_map,
    rich_help_panel=OF_COMMAND,
)
_OWN_FLAGS = {
    "config": (Annotated[str | None, _CONFIG], None),
    "overwrite": (common_flags.Overwrite, False),
    "resume": (common_flags.Resume, False),
    "check": (common_flags.Check, False),
    "json": (common_flags.Json, False),
    "plain": (common_flags.Plain, False),
}


def config_command(
    app: typer.Typer,
    name: str,
    config_class: type,
    check: Callable[[Any, Collection[str]], object] = lambda config, typed: None,
    required: Sequence[str] = ("model", "data", "output"),
    own: Sequence[str] = ("overwrite", "resume", "check", "json", "plain"),
    names: Mapping[str, str] = MappingProxyType({}),
    examples: str = "",
) -> Callable[[Callable[..., None]], Any]:
    """Registers `run(config, overwrite, resume, json, plain)` as a command with one flag a field of the class.

    Args:
        app: that has the command.
        name: of the command.
        config_class: its flags.
        check: of the command's own settings, and which of them were typed as flags; what all runs have is checked here,
            before `run` imports anything heavy.
        required: fields that must be given.
        own: the command's own flags, which `run` takes beside the configuration. --check is not passed on.
        names: replacements for $… in the help of flags, for lists that later modules make.
        examples: command lines, shown below the flags.
    """

    def register(run: Callable[..., None]) -> Any:
        hints = get_type_hints(config_class)
        specs = sorted(fields(config_class), key=lambda spec: ORDER.index(group_of(spec.name, required)))

        def command(context: typer.Context, **values: Any) -> None:
            values.pop("config")
            extra = {key: values.pop(key) for key in own}
            only_checked = extra.pop("check", False)
            for needed in required:
                if not values[needed] and not (only_checked and needed == "output"):
                    raise InputError(f"--{needed} is needed (a flag, or a key of the --config file)")
            config = config_class(**values)
            sources = {name: context.get_parameter_source(name) for name in values}
            check(config, {name for name, source in sources.items() if source and source.name == "COMMANDLINE"})
            if "output" in required:
                from loraplus.tasks.checks import check_run

                check_run(config, overwrite=extra["overwrite"], resume=extra["resume"])
                if is_speaker() and not extra["json"]:  # a program needs no greeting
                    console = Console(plain=extra["plain"])
                    into = "nothing is written (--check)" if only_checked else f"into {config.output}"
                    console.say(f"{name}: {config.task} on {config.data} with {config.model}, {into}")
            with without_chatter():  # what a command imports is not quiet either
                if only_checked:
                    from loraplus.cli.seen import run_check

                    return run_check(name, config, json=extra["json"], plain=extra["plain"])
                return run(config, **extra)

        parameters = [
            inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *(_parameter(spec, hints[spec.name], names, required) for spec in specs),
        ]
        parameters += [
            inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for flag, (annotation, default) in _OWN_FLAGS.items()
            if flag == "config" or flag in own
        ]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = run.__doc__
        return app.command(name, epilog=examples)(command)

    return register
