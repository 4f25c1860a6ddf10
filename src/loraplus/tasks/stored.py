"""Tables in temporary files, written and read in blocks, so that memory holds one block of a table."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from loraplus.files.scratch_file import ScratchFile
from loraplus.tasks.streamed import Streamed
from loraplus.tasks.tabular import Table, check_size

_CELLS_AT_ONCE = 2**16
_CHARACTERS_AT_ONCE = 2**22
_BYTES_AT_ONCE = 2**24
_TEXT, _JSON = {b"kind": b"text"}, {b"kind": b"json"}  # of the cells of a block


class _Blocks:
    """Blocks of rows. Each is an Arrow stream of one batch: its columns, or all of its cells as one long column.

    One long column, for rows of text and JSON, is quick however many columns there are. A block may lack the last ones.
    """

    def __init__(self, source: str) -> None:
        self._file = ScratchFile(f"the rows of {source}")
        self._places: list[tuple[int, int]] = []
        self.starts = [0]  # the first row of every block, and of the next
        self._cached: tuple[int, Any] | None = None

    def add_columns(self, columns: Sequence[Any], rows: int) -> None:
        """Arrays of Arrow."""
        self._add(columns, rows, None)

    def add_cells(self, cells: list[Any], rows: int) -> None:
        """Values of JSON, those of the first column first."""
        kind = _TEXT
        if not all(value is None or type(value) is str for value in cells):
            kind = _JSON
            cells = [None if value is None else json.dumps(value) for value in cells]
        self._add([pa.array(cells, pa.large_string())], rows, kind)

    def _add(self, arrays: Sequence[Any], rows: int, kind: dict[bytes, bytes] | None) -> None:
        schema = pa.schema([pa.field(str(place), array.type) for place, array in enumerate(arrays)], kind)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(list(arrays), schema=schema))
        content = sink.getvalue()
        self._places.append((self._file.append(content), content.size))
        self.starts.append(self.starts[-1] + rows)

    def read(self, block: int, place: int) -> list[Any]:
        """The values of a column in a block; None in each row where it lacks the column."""
        if self._cached is None or self._cached[0] != block:
            content = pa.py_buffer(self._file.read(*self._places[block]))
            self._cached = block, pa.ipc.open_stream(content).read_next_batch()
        batch = self._cached[1]
        kind = batch.schema.metadata
        if kind is None:
            return batch.column(place).to_pylist()
        rows = self.starts[block + 1] - self.starts[block]
        values = batch.column(0).slice(place * rows, rows).to_pylist() or [None] * rows
        return [None if value is None else json.loads(value) for value in values] if kind == _JSON else values


class Column(Streamed[Any]):
    """A column of a stored table.

    Args:
        blocks: of the table.
        place: of the column.
        kind: what its values are made; None for what they are.
    """

    def __init__(self, blocks: _Blocks, place: int, kind: Callable[[Any], Any] | None = None) -> None:
        self._blocks, self._place, self._kind = blocks, place, kind
        self._cached: tuple[int, list[Any]] = -1, []

    def __len__(self) -> int:
        return self._blocks.starts[-1]

    def __iter__(self) -> Iterator[Any]:
        for block in range(len(self._blocks.starts) - 1):
            yield from self._read(block)

    def _read(self, block: int) -> list[Any]:
        values = self._blocks.read(block, self._place)
        return values if self._kind is None else list(map(self._kind, values))

    def value(self, index: int) -> Any:
        """The value of a row; quick if the row is in the same block as the one before."""
        block = bisect_right(self._blocks.starts, index) - 1
        if self._cached[0] != block:
            self._cached = block, self._read(block)
        return self._cached[1][index - self._blocks.starts[block]]


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
            self._blocks.add_columns([_plain(column.slice(start, step)) for column in columns], min(step, rows - start))

    def table(self) -> Table:
        """All that was added."""
        self._flush()
        first = int(self._numbered)  # the numbers of the lines stand before the columns
        columns = {name: Column(self._blocks, place) for place, name in enumerate(self._names, start=first)}
        return Table(self._source, columns, Column(self._blocks, 0, int) if self._numbered else None)

    def _flush(self) -> None:
        if not self._rows:
            return
        cells = [row.get(name) for name in self._names for row in self._rows]
        self._blocks.add_cells([*map(str, self._lines), *cells], len(self._rows))
        self._rows, self._lines, self._characters = [], [], 0


def _plain(column: Any) -> Any:
    """A column without its dictionary. Values that Python cannot hold raise here, where the file is known."""
    plain = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    plain = plain.dictionary_decode() if isinstance(plain, pa.DictionaryArray) else plain
    if not (pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type)):
        plain.to_pylist()
    return plain
