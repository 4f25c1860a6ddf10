"""Reads columnar files: Parquet, folders that `datasets` saved, and the hub.

They are read in batches, so that a small file that unpacks to a huge one is noticed before it fills the memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.paths import is_inside
from loraplus.files.single import read_json
from loraplus.tasks.progress_log import ProgressLog
from loraplus.tasks.sandbox import TooMuchError, parquet_facts
from loraplus.tasks.stored import TableWriter
from loraplus.tasks.tabular import Table, check_size

_ROWS_AT_ONCE = 8192
_BYTES_AT_ONCE = 2**29


def read_parquet(source: str, path: Path) -> Table:
    """A Parquet file.

    Raises:
        InputError: damaged, or larger than a table may be; the latter is known before the rows are read.
    """
    parquet = _require("pyarrow.parquet", source)
    try:
        facts = parquet_facts(str(path))
        with parquet.ParquetFile(path, read_dictionary=facts["dictionaries"]) as file:
            groups = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
            check_size(source, file.metadata.num_rows, facts["values"], sum(groups))
            # A value is no larger than the part of the file that it is in, but may stand in every row.
            most = _BYTES_AT_ONCE // max([1, *groups]) if facts["repeats"] else _ROWS_AT_ONCE
            batches = file.iter_batches(batch_size=max(1, min(_ROWS_AT_ONCE, most)))
            return _from_batches(source, file.schema_arrow.names, batches, file.metadata.num_rows)
    except InputError:
        raise
    except TooMuchError:
        raise InputError(f"{source} cannot be read as Parquet (what it says of its columns is damaged)") from None
    except Exception as error:  # Arrow raises many kinds; each means that the file cannot be used
        raise InputError(f"{source} cannot be read as Parquet ({_reason(error)})") from None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder looks like one that `datasets` wrote."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def read_datasets_folder(source: str, path: Path, split: str) -> Table:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Raises:
        InputError: a damaged one, no such split.
    """
    datasets = _require("datasets", source)
    try:
        _check_names(path)
        return _from_dataset(source, datasets.load_from_disk(str(path)), split)
    except InputError:
        raise
    except Exception as error:  # a damaged folder fails in as many ways as it has files
        raise InputError(f"{source} cannot be loaded as a datasets folder ({_reason(error)})") from None


def read_hub(source: str, split: str) -> Table:
    """A dataset of the hub, or of the hub's cache.

    Raises:
        InputError: there is none of that name, or no such split.
    """
    datasets = _require("datasets", source)
    try:
        return _from_dataset(source, datasets.load_dataset(source), split)
    except InputError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means that the data is not to be had
        raise InputError(
            f"there is no file {source}, and the hub did not give a dataset of that name ({_reason(error)})"
        ) from None


def _require(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f'{source} needs the package {module}: pip install "loraplus[cli]"') from None


def _reason(error: Exception) -> str:
    """First line of an error of another library."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_names(path: Path) -> None:
    """Refuses a folder whose files name files outside of it."""
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json")["splits"]
        folders = [path / name for name in splits if _checked(path, name)]
    else:
        folders = [path]
    for folder in folders:
        for file in read_json(folder / "state.json")["_data_files"]:
            _checked(folder, file["filename"])


def _checked(path: Path, name: object) -> bool:
    if not is_inside(name):
        raise InputError(f"{path} names {name}, which is not in it")
    return True


def _from_dataset(source: str, loaded: Any, split: str) -> Table:
    datasets = _require("datasets", source)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise InputError(f"{source} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    loaded.data.table.validate(full=True)  # first: Arrow follows the offsets in its own files wherever they lead
    check_size(source, len(loaded), len(loaded) * len(loaded.column_names), loaded.data.table.nbytes)
    classes = {name: kind for name, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)}
    batches = loaded.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    return _from_batches(source, loaded.column_names, batches, len(loaded), classes)


def _class_names(column: Any, kind: Any) -> Any:
    """The names that a column of numbers stands for; -1 is none."""
    arrow = importlib.import_module("pyarrow")
    names = [None if value is None or value < 0 else kind.int2str(value) for value in column.to_pylist()]
    return arrow.array(names, arrow.string())


def _from_batches(
    source: str, names: list[str], batches: Iterable[Any], total: int, classes: Mapping[str, Any] | None = None
) -> Table:
    if len(set(names)) < len(names):
        raise InputError(f"{source} has two columns of one name")
    progress = ProgressLog(f"reading {source}, rows", total)
    writer = TableWriter(source)
    rows = cells = size = 0
    for batch in batches:
        batch.validate(full=True)  # text is UTF-8, and an offset leads into the data, only if somebody looked
        earlier = size
        for column in batch.columns:
            inside, bytes_ = _measured(column)
            cells, size = cells + inside, size + bytes_
            check_size(source, rows + batch.num_rows, cells, size)
        columns = [
            _class_names(column, classes[name]) if classes and name in classes else column
            for name, column in zip(names, batch.columns, strict=True)
        ]
        writer.add_batch(names, columns, batch.num_rows, size - earlier)
        rows += batch.num_rows
        progress.advance(batch.num_rows)
    return writer.table()


def _measured(column: Any) -> tuple[int, int]:
    """(values, bytes) of a column, with those inside of lists and structures, and with every repetition of a value."""
    if hasattr(column, "dictionary"):
        return len(column), _written_out(column)
    if hasattr(column, "chunks"):
        parts = column.chunks
    elif hasattr(column, "flatten") and column.type.num_fields:
        inside = column.flatten()
        parts = inside if isinstance(inside, list) else [inside]
    else:
        return len(column), column.nbytes
    values, sizes = zip(*map(_measured, parts), strict=True) if parts else ((), ())
    return sum(values) + (0 if hasattr(column, "chunks") else len(column)), sum(sizes)


def _written_out(column: Any) -> int:
    """The bytes that a dictionary-encoded column would take with every value written out in its row."""
    compute = importlib.import_module("pyarrow.compute")
    values = column.dictionary
    try:
        return len(column) * values.type.bit_width // 8
    except ValueError:  # not of one width
        pass
    try:
        lengths = compute.binary_length(values).cast("int64")
    except NotImplementedError:  # no text either: the largest value has all the bytes, as far as is known
        return len(column) * values.nbytes
    return compute.sum(lengths.take(column.indices)).as_py() or 0
