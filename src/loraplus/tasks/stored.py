"""Rows in a temporary file: written in blocks, read a block at a time, so that memory holds one block of a table."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from loraplus.tasks.scratch_file import ScratchFile
from loraplus.tasks.streamed import Streamed
from loraplus.tasks.tabular import Table, check_size

_LINES = "lines"  # the names of a table's own columns have a mark before them
_CELLS_AT_ONCE = 2**16
_CHARACTERS_AT_ONCE = 2**22
_BYTES_AT_ONCE = 2**24
_IS_JSON = {b"json": b""}


class _Blocks:
    """Blocks of rows, each Arrow's stream of its columns; a block may have columns that others lack."""

    def __init__(self, source: str) -> None:
        self._file = ScratchFile(f"the rows of {source}")
        self._places: list[tuple[int, int]] = []
        self.starts = [0]  # the first row of every block, and of the next
        self._held: tuple[int, Any] | None = None

    def add(self, arrays: Mapping[str, Any], fields: Sequence[Any], rows: int) -> None:
        """A block, with a field for each array."""
        schema = pa.schema(fields)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema))
        content = sink.getvalue()
        self._places.append((self._file.append(content), content.size))
        self.starts.append(self.starts[-1] + rows)

    def read(self, block: int, name: str) -> list[Any]:
        """The values of a column in a block; None in each row where it lacks the column."""
        if self._held is None or self._held[0] != block:
            self._held = (
                block,
                pa.ipc.open_stream(pa.py_buffer(self._file.read(*self._places[block]))).read_next_batch(),
            )
        batch = self._held[1]
        place = batch.schema.get_field_index(name)
        if place < 0:
            return [None] * (self.starts[block + 1] - self.starts[block])
        values = batch.column(place).to_pylist()
        if batch.schema.field(place).metadata == _IS_JSON:
            return [None if value is None else json.loads(value) for value in values]
        return values


class Column(Streamed[Any]):
    """A column of a stored table."""

    def __init__(self, blocks: _Blocks, name: str) -> None:
        self._blocks, self._name = blocks, name
        self._held: tuple[int, list[Any]] = -1, []

    def __len__(self) -> int:
        return self._blocks.starts[-1]

    def __iter__(self) -> Iterator[Any]:
        for block in range(len(self._blocks.starts) - 1):
            yield from self._blocks.read(block, self._name)

    def value(self, index: int) -> Any:
        """Quick for a row that is in the block of the one before."""
        block = bisect_right(self._blocks.starts, index) - 1
        if self._held[0] != block:
            self._held = block, self._blocks.read(block, self._name)
        return self._held[1][index - self._blocks.starts[block]]


class TableWriter:
    """Makes a table of rows that come one at a time, or of Arrow's batches.

    Args:
        source: name of the table.
    """

    def __init__(self, source: str) -> None:
        self._source, self._blocks = source, _Blocks(source)
        self._names: dict[str, None] = {}
        self._rows: list[Mapping[str, Any]] = []
        self._lines: list[int] = []
        self._characters = 0
        self._count = 0
        self._numbered = False

    def add(self, row: Mapping[str, Any], characters: int, line: int | None = None) -> None:
        """A row; columns that it lacks are None in it.

        Args:
            row: text, or other values of JSON.
            characters: of all of it, about.
            line: that it stands in.

        Raises:
            InputError: the table is too large, or the disk is full.
        """
        self._names.update(dict.fromkeys(row))
        self._rows.append(row)
        self._count += 1
        if line is not None:
            self._numbered = True
            self._lines.append(line)
        check_size(self._source, self._count, self._count * len(self._names))
        self._characters += characters
        if len(self._rows) * len(self._names) >= _CELLS_AT_ONCE or self._characters >= _CHARACTERS_AT_ONCE:
            self._flush()

    def add_batch(self, names: Sequence[str], columns: Sequence[Any], rows: int, size: int) -> None:
        """Arrays of Arrow, which take so many bytes."""
        self._names.update(dict.fromkeys(names))
        self._count += rows
        step = max(1, rows * _BYTES_AT_ONCE // max(_BYTES_AT_ONCE, size))
        for start in range(0, rows, step):
            parts = [_plain(column.slice(start, step)) for column in columns]
            arrays = {f":{name}": part for name, part in zip(names, parts, strict=True)}
            fields = [pa.field(name, array.type) for name, array in arrays.items()]
            self._blocks.add(arrays, fields, min(step, rows - start))

    def table(self) -> Table:
        """All that was added."""
        self._flush()
        columns = {name: Column(self._blocks, f":{name}") for name in self._names}
        return Table(self._source, columns, Column(self._blocks, _LINES) if self._numbered else None)

    def _flush(self) -> None:
        if not self._rows:
            return
        found = {f":{name}": _array([row.get(name) for row in self._rows]) for name in self._names}
        fields = [pa.field(name, array.type, metadata=metadata) for name, (array, metadata) in found.items()]
        arrays = {name: array for name, (array, _) in found.items()}
        if self._lines:
            arrays[_LINES] = pa.array(self._lines, pa.int64())
            fields.append(pa.field(_LINES, pa.int64()))
        self._blocks.add(arrays, fields, len(self._rows))
        self._rows, self._lines, self._characters = [], [], 0


def _array(values: list[Any]) -> tuple[Any, Any]:
    """Texts as they are; a column that has other values, too, as JSON."""
    if all(value is None or type(value) is str for value in values):
        return pa.array(values, pa.large_string()), None
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.large_string()), _IS_JSON


def _plain(column: Any) -> Any:
    """Without a dictionary; what Python cannot hold is found here, while it is known where it stands."""
    plain = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    plain = plain.dictionary_decode() if isinstance(plain, pa.DictionaryArray) else plain
    if not (pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type)):
        plain.to_pylist()
    return plain
