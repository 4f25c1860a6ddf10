"""Data that is kept on disk is the data that was kept in memory, and takes little memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from loraplus.errors import InputError
from loraplus.files import scratch_file
from loraplus.tasks import stored
from loraplus.tasks.classification import load_classification
from loraplus.tasks.config import CompareConfig, TrainConfig
from loraplus.tasks.language import load_language_data
from loraplus.tasks.stored import TableWriter
from loraplus.tasks.streamed import Labels, Made, Texts, in_parts
from loraplus.tasks.table import read_table

WORDS = "good bad film Straße ÉTÉ été 電影 the a was 👍 dull".split()


def text(i):
    return "  ".join(WORDS[(i * k + i // 5) % len(WORDS)] for k in range(1, 2 + i % 9))  # some stand there twice


def csv(path, count=90, start=0):
    rows = [
        f'"{text(i)}{chr(10) if i % 7 == 0 else ""}",{i},{("yes", "no", "it, depends")[i % 3]!r}' for i in range(count)
    ]
    rows = [row.replace("'it, depends'", '"it, depends"') for row in rows[start:]]
    path.write_text("text,number,label\n" + "\n\n".join(rows) + "\n", encoding="utf-8")
    return {"data": str(path)}


def jsonl(path):
    rows = [
        {"text": text(i), "label": (1, 1.0, "2")[i % 3], **({"later": [i, None]} if i > 40 else {})} for i in range(90)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"data": str(path)}


def array(path):
    path.write_text(json.dumps([{"label": i % 2 == 0, "review": text(i)} for i in range(70)]))
    return {"data": str(path)}


def tsv(path):
    path.write_text("a\tb\n" + "".join(f'"{text(i)}\t{i % 4}\n' for i in range(80)), encoding="utf-8")
    return {"data": str(path)}


def categories(path):
    columns = {
        "text": pyarrow.array([text(i) for i in range(90)]).dictionary_encode(),
        "label": [i % 3 for i in range(90)],
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=13)
    return {"data": str(path)}


def folder(path):
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    rows = {"text": [text(i) for i in range(90)], "label": [i % 2 for i in range(90)]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(path))
    return {"data": str(path)}


def beside(path):
    files = {"eval_data": "e.csv", "test_data": "t.csv"}
    return csv(path) | {name: csv(path.with_name(file), 40, 9 * len(file) // 5)["data"] for name, file in files.items()}


def chats(path):
    turns = [
        [{"role": "user", "content": text(i)}, {"role": "assistant", "content": text(i + 3), "tool_calls": None}]
        for i in range(60)
    ]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns) + "\n")
    return {"data": str(path), "task": "sft", "loss_on": "assistant"}


def pairs(path):
    path.write_text("\n".join(json.dumps({"prompt": text(i), "completion": text(i + 2)}) for i in range(60)) + "\n")
    return {"data": str(path), "task": "sft", "max_eval_samples": 5, "max_length": 24}


def lines(path):
    path.write_text("\n".join(text(i) for i in range(60)) + "\n", encoding="utf-8")
    return {"data": str(path), "task": "lm", "max_length": 16}


def mixed(path):
    asked = [text(i) if i % 3 else [{"role": "user", "content": text(i)}] for i in range(60)]
    answers = [text(i + 2) if i % 3 else [{"role": "assistant", "content": text(i + 2)}] for i in range(60)]
    tools = [[{"name": "f", "of": None}], None, "", '[{"name": "g"}]']
    rows = [
        {"prompt": a, "completion": b, "tools": tools[i % 4]}
        for i, (a, b) in enumerate(zip(asked, answers, strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, *rows[:9]])) + "\n")
    return {"data": str(path), "task": "sft", "long_examples": "drop", "max_length": 60, "test_fraction": 0.2}


# The facts and tokens as they were when whole tables were in memory.
CASES = {
    "d.csv": (csv, {}, "a681292b4b1ac4b0"),
    "one.csv": (csv, {"max_length": 6, "seed": 7, "max_eval_samples": 5}, "4c3cfe6fcfc69e73"),
    "other.csv": (beside, {"max_length": 9, "max_test_samples": 20}, "9a907af8e2691b19"),
    "d.jsonl": (jsonl, {"test_fraction": 0.3, "eval_fraction": 0.4}, "32d72047d758530f"),
    "d.json": (array, {}, "8c4eded03ab44da0"),
    "d.tsv": (tsv, {}, "36c35064c0dff419"),
    "d.parquet": (categories, {}, "49eaeddc981b7aa5"),
    "folder": (folder, {}, "6de2b6f8797ef6f8"),
    "chats.jsonl": (chats, {}, "fd5f6f9836667b4a"),
    "pairs.jsonl": (pairs, {}, "ff744d6e5f3bea07"),
    "d.txt": (lines, {}, "474ce4eaa1ef5471"),
    "mixed.jsonl": (mixed, {}, "395c43ed3a9fd4c4"),
    "other.txt": (lines, {"test_fraction": 0.2, "max_test_samples": 5, "seed": 3}, "e632e2d41189b367"),
}  # fmt: skip


FIRST_FACTS = (
    "text_column", "label_column", "labels", "train_examples", "validation_examples", "test_examples",
    "train_class_counts",
)  # fmt: skip  # as they stood when the hashes were made


def found(name, path, model_folder, decoder_folder):
    write, options, _ = CASES[name]
    options = write(path / name) | options
    kind = CompareConfig if "test_data" in options or "test_fraction" in options else TrainConfig
    language = "task" in options
    config = kind(model=str(decoder_folder if language else model_folder), output="o", **options)
    load = load_language_data if language else load_classification
    data = load(config, AutoTokenizer.from_pretrained(config.model))
    del data.facts["source"]
    first = () if language else FIRST_FACTS
    facts = {name: data.facts[name] for name in (*first, *data.facts)}
    content = [facts, *([dict(row) for row in split] for split in (data.train, data.validation, data.test))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@pytest.mark.parametrize("cells", [7, 2**16])
@pytest.mark.parametrize("name", CASES)
def test_facts_and_tokens_are_those_of_a_table_in_memory(
    name, cells, tmp_path, model_folder, decoder_folder, monkeypatch
):
    monkeypatch.setattr(stored, "_CELLS_AT_ONCE", cells)
    monkeypatch.setattr(stored, "_BYTES_AT_ONCE", 300 * cells)
    assert found(name, tmp_path, model_folder, decoder_folder) == CASES[name][2]


def test_a_row_is_read_where_it_stands_whatever_the_block(monkeypatch):
    monkeypatch.setattr(stored, "_CHARACTERS_AT_ONCE", 10)
    writer = TableWriter("d")
    rows = [{"a": "x" * i, **({"b": [i, {"c": None}]} if i % 3 == 0 else {})} for i in range(20)]
    for line, row in enumerate(rows, start=1):
        writer.add(row, line, 2 * line)
    table = writer.table()
    assert len(table) == 20 and table.columns["a"] == ["x" * i for i in range(20)]
    assert [table.columns["b"][i] for i in (19, 0, -2, 3)] == [
        None,
        [0, {"c": None}],
        [18, {"c": None}],
        [3, {"c": None}],
    ]
    assert table.columns["b"][2:4] == [None, [3, {"c": None}]] and table.place(4) == "d, line 10"
    with pytest.raises(IndexError):
        table.columns["a"][20]
    late = TableWriter("d")
    for row in [{}, {"a": "x"}, {}, {"b": 1, "a": "y" * 20}]:
        late.add(row, 6)
    assert late.table().columns == {"a": [None, "x", None, "y" * 20], "b": [None, None, None, 1]}
    assert table.columns["a"] != ["x"] and table.columns["a"] != table.columns["b"]


def test_some_rows_of_some_rows_are_those_rows():
    texts = Texts(["a", 1, None, 2.5, "e"]).take(np.array([0, 1, 3, 4])).take(np.array([1, 2]))
    assert list(texts) == ["1", "2.5"] == [texts[0], texts[1]]
    sums = Made(lambda a, b: a + b, (range(5), [10, 20, 30, 40, 50])).take(np.array([1, 3, 4]))
    assert list(sums) == [21, 43, 54] == sums[:] and sums.take(np.array([0, 2])) == [21, 54]
    assert sums == [21, 43, 54] and not sums.take(np.arange(0)) and list(sums.take(np.arange(0))) == []
    labels = Labels.of(["b", "a", "b"])
    assert labels == ["b", "a", "b"] and labels.take(np.array([1])).counts() == {"a": 1}
    assert [rows.tolist() for rows in labels.classes()] == [[1], [0, 2]] and Labels.of([]).classes() == []


def test_long_texts_come_in_smaller_parts(monkeypatch):
    monkeypatch.setattr("loraplus.tasks.streamed._CHARACTERS_AT_ONCE", 10)
    assert [len(part) for part in in_parts(["a"] * 7 + ["a" * 30] * 2, 5)] == [5, 3, 1]


class FullDisk:
    """A temporary file on a disk that has room for a few bytes."""

    room = 0

    def __init__(self, **_):
        self._place = 0

    def seek(self, place):
        self._place = place

    def write(self, content):
        if self._place >= self.room:
            raise OSError(28, "No space left on device")
        self._place += min(len(content), self.room)
        return self._place


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_is_one_line_that_says_where_there_is_no_room(tmp_path, monkeypatch, room):
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(scratch_file.tempfile, "TemporaryFile", FullDisk)
    (tmp_path / "d.csv").write_text("text,label\na film,good\n")
    with pytest.raises(InputError, match=r"cannot keep the rows of .*d\.csv in .*: No space left.*TMPDIR"):
        read_table(str(tmp_path / "d.csv"))


def test_no_folder_for_temporary_files_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_file.tempfile, "tempdir", str(tmp_path / "nowhere"))
    (tmp_path / "d.csv").write_text("text,label\na film,good\n")
    with pytest.raises(InputError, match="cannot keep the rows of .*nowhere.*TMPDIR"):
        read_table(str(tmp_path / "d.csv"))


_PEAKS = """
import os, sys
from transformers import AutoTokenizer
from loraplus.tasks import stored, streamed
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.task import task_of
stored._CHARACTERS_AT_ONCE = streamed._CHARACTERS_AT_ONCE = 2**18
for data in sys.argv[3:]:
    config = TrainConfig(task=sys.argv[1], model=sys.argv[2], data=data, output="o")
    task_of(config).load_data(config, AutoTokenizer.from_pretrained(config.model))
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(1024 * int(peak))
print(os.listdir(os.environ["TMPDIR"]))
"""


# Rows of 2,000 characters, and of 120 tokens, which took 17,000 and 32,000 bytes in memory; last, what one may take.
LARGE = {
    "classification": ("d.csv", "text,label\n", lambda i: f"a film {'x' * 2000} {i},{('bad', 'good')[i % 2]}\n", 700),
    "sft": ("d.jsonl", "", lambda i: f'{{"prompt": "grass {i}", "completion": "{" grass is green" * 40}"}}\n', 4000),
    "lm": ("d.txt", "", lambda i: f"{'grass is green ' * 40} {i}\n", 4000),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process without its parent's")
@pytest.mark.parametrize("task", LARGE)
def test_a_row_takes_its_places_and_not_its_text(task, tmp_path, model_folder, decoder_folder):
    name, head, row, most = LARGE[task]
    few, many = 2_000, 8_000
    files = [tmp_path / f"few-{name}", tmp_path / f"many-{name}"]
    for path, count in zip(files, (few, many), strict=True):
        path.write_text(head + "".join(map(row, range(count))))
    (tmp_path / "scratch").mkdir()
    model = model_folder if task == "classification" else decoder_folder
    command = [sys.executable, "-c", _PEAKS, task, str(model), *map(str, files)]
    environment = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    small, large, left = result.stdout.splitlines()[-3:]
    assert (int(large) - int(small)) / (many - few) < most
    assert left == "[]"  # nobody has to remove anything
