"""The one place where transformers and PEFT read other people's files.

Nothing that comes with a model is run unless the user asked for it, nobody is asked in between, and whatever a library
raises for damaged files becomes one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from loraplus.errors import InputError, LoraPlusError
from loraplus.files.paths import is_file, is_folder, is_inside
from loraplus.files.single import read_json
from loraplus.tasks.pickles import check_archive

_COUNTED, _MOST_LAYERS = ("layer", "expert", "_blocks"), 10_000
_SLACK = 2**27
"""Parameters that a model may have beyond those in its files, such as a new head or a pooler."""
_SPEAKING = (OSError, ValueError, RuntimeError, ImportError)


def first_line(error: BaseException) -> str:
    """The first line of a library's error, with the error's name where the line alone says little."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else ""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if line and isinstance(error, _SPEAKING) and not isinstance(error, RecursionError):
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")


@contextmanager
def loading(what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever a library raises into one line: files may be missing, damaged, or of another model.

    Args:
        what: begins the line.
        advice: ends it.

    Raises:
        InputError: anything was raised.
    """
    try:
        with warnings.catch_warnings(record=True) as said:
            yield
    except LoraPlusError:
        raise
    except BaseException as error:
        # Rust's panics, of damaged tokenizers, are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {first_line(error)}{advice}") from None
    for warning in said:  # what was said before an error is part of it
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def from_pretrained(loader: Any, model: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """`loader.from_pretrained`, which runs no code of the model's own unless it is trusted.

    Args:
        loader: a class of transformers.
        model: folder or hub name.
        trust_remote_code: run code that comes with the model.
        **options: of the loader.

    Raises:
        InputError: a file is missing, damaged or of another kind, or the model does not load without its own code.
    """
    folder = Path(model)
    here = is_folder(folder)
    if here:
        _check_folder(folder, trust_remote_code)
        what = f"cannot load the model in {model}"
    else:
        what = f"cannot load the model {model}: no such folder here, and the hub did not give it"
    with loading(what):
        try:
            return loader.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
        except ValueError as error:
            if trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise _needs_code(model) from None


def load_any_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        InputError: as `from_pretrained`, or it does not say how many tokens it takes.
    """
    tokenizer = from_pretrained(AutoTokenizer, model, trust_remote_code=trust_remote_code)
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)) or length < 2:
        raise InputError(f"the tokenizer of {model} takes {length!r} tokens; it is damaged")
    return tokenizer


def _needs_code(model: str) -> InputError:
    return InputError(
        f"{model} brings code of its own, which is not run; where you trust it, say --trust-remote-code to a command "
        "that has the flag"
    )


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Checks what transformers would follow unchecked: names of files and of kernels, sizes of archives."""
    if is_file(folder / "config.json"):
        config = _settings(folder, folder / "config.json")
        if not trust_remote_code and _names_kernel(config):
            raise _needs_code(str(folder))
    for index in folder.glob("*.index.json"):
        names = _settings(folder, index).get("weight_map")
        if not isinstance(names, dict) or not all(map(is_inside, names.values())):
            raise InputError(f"{index} does not say in which file of this folder which weight is")
    for file in folder.glob("*.bin"):
        check_archive(file)


def _names_kernel(config: dict[str, Any]) -> bool:
    """Whether a configuration, or that of a part of it, names a kernel of the hub: code that is fetched and run."""
    return any(
        (key.strip("_").endswith("_implementation") and "/" in str(value))
        or (isinstance(value, dict) and _names_kernel(value))
        for key, value in config.items()
    )


def _settings(folder: Path, path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"cannot load the model in {folder}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"cannot load the model in {folder}: {path.name} holds no settings")
    return content


def check_fits(
    loader: Any, model: str, *, config: Any = None, trust_remote_code: bool = False, **options: object
) -> None:
    """Refuses a configuration of a far larger model than its weights: the rest would fill the memory.

    Args:
        loader: a model class of transformers.
        model: folder; hub names are not looked at.
        config: instead of the folder's.
        trust_remote_code: models with code of their own are not looked at.
        **options: as for `from_pretrained`; not used.

    Raises:
        InputError: it is, or it cannot be read.
    """
    folder = Path(model)
    if trust_remote_code or not is_folder(folder):
        return
    config = config or from_pretrained(AutoConfig, model)
    check_layers(model, config)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            empty = loader.from_config(config, trust_remote_code=False)
    except Exception:  # loading says what is wrong with it
        return
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    wanted = sum(weight.numel() for weight in (*empty.parameters(), *empty.buffers()))
    if wanted > 8 * size + _SLACK:  # no weight is stored in less than a bit
        raise InputError(
            f"cannot load the model in {model}: its configuration describes {wanted:,} weights, and its files hold "
            f"{size:,} bytes"
        )


def check_layers(model: str, config: object) -> None:
    """Refuses a configuration with so many layers that to list them would take hours.

    Raises:
        InputError: it has.
    """
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    for key, value in (item for part in parts for item in vars(part).items()):
        if any(what in key for what in _COUNTED) and isinstance(value, int) and value > _MOST_LAYERS:
            raise InputError(f"cannot load the model in {model}: its configuration says {key} {value}")
