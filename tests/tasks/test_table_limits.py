"""What a table may hold is limited, and a file that breaks a limit is refused before it fills time or memory."""

from __future__ import annotations

import itertools
import json
import logging
import shutil

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from loraplus.errors import InputError
from loraplus.tasks import separated, tabular, text_files
from loraplus.tasks.columns import labelled_texts
from loraplus.tasks.conversations import read_examples
from loraplus.tasks.progress_log import ProgressLog
from loraplus.tasks.table import read_table


@pytest.fixture
def limits(monkeypatch):
    for module, name, value in (
        (text_files, "LONGEST_ROW", 1000), (separated, "LONGEST_ROW", 1000), (tabular, "MOST_ROWS", 100),
        (tabular, "MOST_CELLS", 500), (tabular, "MOST_BYTES", 20_000), (text_files, "_LARGEST_ARRAY", 3000),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


LARGE = {
    "a line of a CSV": ("d.csv", "text,label\na,1\n" + "a" * 2000 + ",1\n", "line 3: longer than 1,000 characters"),
    "a header": ("d.csv", "a," * 2000, "line 1: longer than"),
    "a quote that stays open": ("d.csv", 'text,label\na,1\n"' + "b,1\n" * 500, "line 3: a row of more than 1,000"),
    "a line of a TSV": ("d.tsv", "text\tlabel\n" + "a" * 2000 + "\t1\n", "line 2: longer than"),
    "a line of JSON": ("d.jsonl", json.dumps({"text": "a" * 2000}), "line 1: longer than"),
    "an array": ("d.json", json.dumps([{"text": "a"}] * 400), "one JSON array of more than 3,000 bytes"),
    "a line of text": ("d.txt", "a\n" + "a" * 2000, "line 2: longer than"),
    "rows": ("d.csv", "text\n" + "a\n" * 200, "more than 100 rows"),
    "rows of JSON": ("d.jsonl", '{"text": "a"}\n' * 200, "more than 100 rows"),
    "lines of text": ("d.txt", "a\n" * 200, "more than 100 rows"),
    "cells": ("d.csv", ",".join(map(str, range(20))) + "\n" + (",".join("a" * 20) + "\n") * 90, "more than 500 cells"),
    "columns that each row has another of": (
        "d.jsonl", "".join(json.dumps({str(i): 1}) + "\n" for i in range(60)), "more than 500 cells",
    ),
    "bytes": ("d.csv", "text\n" + "a\n" * 20_000, "more than 20,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_file_that_holds_too_much_is_one_line(tmp_path, limits, name):
    file, content, expected = LARGE[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=expected):
        read_table(str(tmp_path / file))


def repeated(value, count):
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([value]))


BOMBS = {
    "rows": (lambda: pyarrow.table({"text": ["a"] * 5000}), "more than 100 rows"),
    "one long text in every row": (lambda: pyarrow.table({"text": repeated("a" * 900, 90)}), "more than 20,000 bytes"),
    "lists": (lambda: pyarrow.table({"text": [["a"] * 50] * 20}), "more than 500 cells"),
    "columns": (lambda: pyarrow.table({str(i): ["a"] * 90 for i in range(20)}), "more than 500 cells"),
    "two columns of one name": (
        lambda: pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"]), "two columns of one name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_much_is_one_line(tmp_path, limits, name, kind):
    make, expected = BOMBS[name]
    path = tmp_path / "d.parquet"
    if kind == "parquet":
        parquet.write_table(make(), path, compression="zstd")
    elif name == "two columns of one name":
        pytest.skip("datasets makes none")
    else:
        path = tmp_path / "folder"
        datasets.Dataset(make()).save_to_disk(str(path))
    with pytest.raises(InputError, match=expected):
        read_table(str(path))


def test_facts_of_columns_that_arrow_does_not_survive_are_one_line(tmp_path):
    """Arrow ends the process over a size histogram that does not fit the column's depth."""
    parquet.write_table(pyarrow.table({"text": ["a"] * 40, "label": ["b"] * 40}), tmp_path / "d.parquet")
    good = (tmp_path / "d.parquet").read_bytes()
    end = len(good) - 8
    refused = 0
    for place in range(end - int.from_bytes(good[-8:-4], "little"), end, 3):
        (tmp_path / "d.parquet").write_bytes(good[:place] + bytes([good[place] ^ 0x11]) + good[place + 1 :])
        try:
            read_table(str(tmp_path / "d.parquet"))
        except InputError:
            refused += 1
    assert refused > 20


def test_a_header_of_100000_columns_is_read_at_once(tmp_path):
    names = [f"c{i}" for i in range(100_000)]
    (tmp_path / "d.csv").write_text(",".join(names) + "\n" + ",".join("x" for _ in names) + "\n")
    assert list(read_table(str(tmp_path / "d.csv")).columns) == names
    (tmp_path / "e.csv").write_text(",".join([*names, "c7"]) + "\n")
    with pytest.raises(InputError, match="'c7' more than once"):
        read_table(str(tmp_path / "e.csv"))


def test_a_wide_table_without_labels_is_asked_for_them_in_one_line(tmp_path):
    (tmp_path / "d.csv").write_text(",".join(f"c{i}" for i in range(10_000)) + "\n" + ",".join("x" * 10_000) + "\n")
    with pytest.raises(InputError, match="--label-column") as caught:
        labelled_texts(read_table(str(tmp_path / "d.csv")))
    assert len(str(caught.value)) <= 500


def nested(depth):
    return json.loads('{"a": ' * depth + "1" + "}" * depth)


@pytest.mark.parametrize("depth", [200, 500, 900, 100_000])
@pytest.mark.parametrize(
    "row",
    [
        '{"messages": [{"role": "user", "content": "a", "x": %s}]}',
        '{"prompt": "a", "completion": %s}',
        '{"messages": [{"role": "assistant", "content": "a"}], "tools": %s}',
        '{"messages": [{"role": "assistant", "content": "a"}], "tools": [%s]}',
    ],
)
def test_a_chat_that_is_nested_deeply_is_one_line(tmp_path, row, depth):
    (tmp_path / "d.jsonl").write_text(row % ("[" * depth + "]" * depth) + "\n")
    with pytest.raises(InputError, match="line 1.*nested too deeply"):
        read_examples(read_table(str(tmp_path / "d.jsonl")), "sft")


@pytest.mark.parametrize("text", ["[" * 500 + "]" * 500, "[" * 100_000, "[{", "9" * 5000])
def test_tools_that_stand_there_as_text_are_within_the_same_limits(tmp_path, text):
    row = {"messages": [{"role": "assistant", "content": "a"}], "tools": text}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="line 1: the tools are a string that is "):
        read_examples(read_table(str(tmp_path / "d.jsonl")), "sft")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "d"
    rows = {"text": [f"text {i} é" for i in range(50)], "label": ["a", "b"] * 25, "messages": [[{"x": "y"}]] * 50}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    return folder


def test_every_flipped_byte_of_an_arrow_file_is_read_or_one_line(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "d")
    (file,) = folder.glob("*.arrow")
    good = file.read_bytes()
    refused = 0
    for place in range(0, len(good), 7):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x80]) + good[place + 1 :])
        try:
            read_table(str(folder))
        except InputError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("name", ["../other", "/etc/passwd"])
def test_a_saved_folder_names_no_file_outside_of_it(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "d")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="which is not in it"):
        read_table(str(folder))


def test_bytes_that_are_no_text_are_found_wherever_they_stand(tmp_path):
    for count in (1, 5, 300_000):
        (tmp_path / "d.csv").write_bytes(b"text,label\n" + "é,1\n".encode() * count + b"\xff,1\n" + b"a,1\n" * 3)
        with pytest.raises(InputError, match=f"line {count + 2}: not UTF-8"):
            read_table(str(tmp_path / "d.csv"))


def test_long_work_says_how_far_it_has_come(monkeypatch, caplog):
    clock = itertools.count(0, 2.0)
    monkeypatch.setattr("loraplus.tasks.progress_log.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="loraplus"):
        telling = ProgressLog("tokenising, texts", 10_000)
        for _ in range(10):
            telling.advance(1000)
    assert caplog.messages[0] == "tokenising, texts: 2,000 of 10,000" and 1 < len(caplog.messages) < 5


def test_a_parquet_file_that_repeats_a_large_value_is_refused_before_it_fills_the_memory(tmp_path):
    for name, wrap in (("flat", lambda column: column), ("nested", _lists_of_one)):
        value = pyarrow.DictionaryArray.from_arrays([0] * 20_000, pyarrow.array(["x" * 1_000_000]))
        parquet.write_table(pyarrow.table({"text": wrap(value)}), tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match="holds more than .* bytes"):
            read_table(str(tmp_path / f"{name}.parquet"))


def _lists_of_one(column):
    return pyarrow.ListArray.from_arrays(list(range(len(column) + 1)), column)


@pytest.mark.parametrize(("encoding", "at_once"), [("PLAIN", 1000), ("DELTA_BYTE_ARRAY", 1)])
def test_a_large_row_group_is_read_many_rows_at_a_time(tmp_path, monkeypatch, encoding, at_once):
    sizes = []
    advance = ProgressLog.advance
    monkeypatch.setattr(ProgressLog, "advance", lambda self, count=1: (sizes.append(count), advance(self, count)))
    texts = [f"{i} {'a b c d ' * 100}" for i in range(40_000)]
    table = pyarrow.table({"text": texts, "label": ["yes", "no"] * 20_000})
    parquet.write_table(
        table, tmp_path / "d.parquet", use_dictionary=False, column_encoding={"text": encoding, "label": "PLAIN"}
    )
    columns = read_table(str(tmp_path / "d.parquet")).columns
    assert columns["text"] == texts and min(sizes[:-1]) > at_once


def test_categories_dates_and_lists_are_read_as_they_are(tmp_path):
    columns = {"text": ["a", "b", None, "a"], "tags": [["q", None], [], None, ["q"]], "number": [1, 2, 3, None]}
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    arrays["text"] = arrays["text"].dictionary_encode()
    parquet.write_table(pyarrow.table(arrays), tmp_path / "d.parquet")
    assert read_table(str(tmp_path / "d.parquet")).columns == columns


def test_json_of_millions_of_values_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "d.json").write_text('[{"text": [' + "[]," * 10_000_000 + "[]]}]")
    with pytest.raises(InputError, match="JSON that holds more than 10,000,000 values"):
        read_table(str(tmp_path / "d.json"))
