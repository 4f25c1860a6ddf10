"""Reading labelled text: every format, every guess, and one line for every defect."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus.errors import InputError
from loraplus.tasks.columns import choose_columns, choose_text_column, label_names, labelled_texts
from loraplus.tasks.table import Table, read_table

ROWS = [("a good, fine film", "yes"), ('he said "no"', "no"), ("zwei\nZeilen, übrigens", "yes")]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_csv(tmp_path, delimiter=","):
    path = tmp_path / ("data.csv" if delimiter == "," else "data.tsv")
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *ROWS])
    return str(path)


def as_json_lines(tmp_path):
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    return written(tmp_path, "data.jsonl", "\n".join(lines) + "\n")


def as_json_array(tmp_path):
    return written(tmp_path, "data.json", json.dumps([{"text": text, "label": label} for text, label in ROWS]))


def as_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = str(tmp_path / "data.parquet")
    parquet.write_table(pyarrow.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}), path)
    return path


def as_datasets_folder(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict(
        {"text": [t for t, _ in ROWS], "label": [["no", "yes"].index(y) for _, y in ROWS]}, features=features
    )
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "folder"))
    return str(tmp_path / "folder")


FORMATS = {
    "csv": as_csv,
    "tsv": lambda tmp_path: as_csv(tmp_path, "\t"),
    "JSON Lines": as_json_lines,
    "JSON array": as_json_array,
    "Parquet": as_parquet,
    "datasets folder": as_datasets_folder,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_examples(tmp_path, kind):
    found = labelled_texts(read_table(FORMATS[kind](tmp_path)))
    assert list(zip(found.texts, found.labels, strict=True)) == ROWS


def test_a_tsv_with_bare_quotation_marks_is_read_as_it_stands(tmp_path):
    path = written(tmp_path, "data.tsv", 'text\tlabel\n"Bad\t0\nit\'s "great"\t1\n')
    assert labelled_texts(read_table(path)).texts == ['"Bad', 'it\'s "great"']


def test_bare_quotation_marks_in_a_tsv_swallow_no_rows(tmp_path):
    path = written(tmp_path, "data.tsv", 'text\tlabel\n"Bad\t0\nfine\t1\nworse"\t0\n')
    assert labelled_texts(read_table(path)).texts == ['"Bad', "fine", 'worse"']


def test_the_reading_of_a_tsv_that_gets_further_says_what_is_wrong(tmp_path):
    path = written(tmp_path, "data.tsv", 'text\tlabel\n"a\nb"\t0\nc\t1\t2\n')
    with pytest.raises(InputError, match="line 4: 3 fields"):
        read_table(path)


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert list(read_table(written(tmp_path, "data.csv", b"\xef\xbb\xbftext,label\na,1\n")).columns) == [
        "text",
        "label",
    ]


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        (("Review", "Sentiment"), ("fine film", "1"), ("Review", "Sentiment")),
        (("id", "label", "sentence"), ("7", "1", "fine film"), ("sentence", "label")),
        (("words", "class"), ("fine film", "1"), ("words", "class")),
    ],
)
def test_columns_are_guessed_from_usual_names(header, row, expected):
    assert choose_columns(Table("data", {name: [value] for name, value in zip(header, row, strict=True)})) == expected


def test_a_label_column_is_guessed_as_the_only_one_with_few_values():
    table = Table("data", {"words": [f"text {i}" for i in range(9)], "kind": ["a", "b", "c"] * 3, "id": list(range(9))})
    assert choose_columns(table) == ("words", "kind")


def test_an_ambiguous_label_column_is_asked_for():
    table = Table(
        "data", {"words": [f"text {i}" for i in range(9)], "p": ["a", "b", "c"] * 3, "q": ["c", "d", "e"] * 3}
    )
    with pytest.raises(InputError, match="--label-column.*'words', 'p', 'q'"):
        choose_columns(table)


DEFECTS = {
    "empty": ("data.csv", b" \n", "is empty"),
    "header only": ("data.csv", b"text,label\n", "no rows"),
    "too many fields": ("data.csv", b"text,label\na,1\n\nb,1,2\n", "line 4: 3 fields where the header has 2"),
    "after a quoted newline": ("data.csv", b'text,label\n"a\nb",1\nc\n', "line 4: 1 fields"),
    "too few fields": ("data.csv", b"text,label\na,1\nb\n", "line 3: 1 fields where the header has 2"),
    "open quote": ("data.csv", b'text,label\na,1\n"b,2\nc,3\n', "line 3: a quote is opened here and never closed"),
    "open quote late in a row": ("data.csv", b'text,label\n"a ""b""\nc\n","d\n', "line 4: a quote is opened here"),
    "text after a quote": ("data.csv", b'text,label\n"a\nb"c,1\n', "line 3: cannot be parsed"),
    "other separator": ("data.tsv", b"text;label\na;1\nb;0\n", "line 1: the header is one column.*tabs"),
    "column twice": ("data.csv", b"text,text\na,1\n", "'text' more than once"),
    "not UTF-8": ("data.csv", b"text,label\n\xc3\xa9,1\n\xff\xfe,2\n", "line 3: not UTF-8"),
    "bad JSON": ("data.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "line 2: not valid JSON"),
    "JSON of another kind": ("data.jsonl", b'{"text": "a", "label": 1}\n7\n', "line 2: expected an object"),
    "nested JSON": ("data.jsonl", b"[" * 100_000, "line 1: JSON that is nested too deeply"),
    "another kind in an array": ("data.json", b'[{"text": "a", "label": 1}, 7]', "row 2: expected an object"),
    "several labels": ("data.jsonl", b'{"text": "a", "label": [1, 2]}\n', "line 1: the label .* is a list"),
    "text of another kind": ("data.jsonl", b'{"text": {"a": 1}, "label": 1}\n', "line 1: the text .* is a dict"),
    "text NaN": ("data.jsonl", b'{"text": NaN, "label": 1}\n', "text .*missing in 1 of 1 rows"),
    "bad Parquet": ("data.parquet", b"PAR1", "cannot be read as Parquet"),
    "unknown format": ("data.docx", b"PK", "unknown format .docx"),
    "label missing": ("data.csv", b"text,label\na,1\nb,\nc,2\n", "label .*missing in 1 of 3 rows, first in line 3"),
    "label missing in JSON": (
        "d.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "b"}\n',
        "missing in 1 of 2 rows.*line 2",
    ),
    "text missing": ("data.csv", b"text,label\n ,1\nb,2\n", "text .*missing in 1 of 2 rows, first in line 2"),
    "one class": ("data.csv", b"text,label\na,1\nb,1\n", "one class only"),
    "fractions": (
        "data.jsonl",
        b'{"text": "a", "label": 0.5}\n{"text": "b", "label": 1}\n',
        "line 1: label 0.5.*regression target",
    ),
    "fractions in a CSV": ("data.csv", b"text,label\na,1\nb,2.5\n", "line 3: label 2.5.*regression target"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_line_that_names_file_and_place(tmp_path, defect):
    name, content, expected = DEFECTS[defect]
    with pytest.raises(InputError, match=expected) as caught:
        labelled_texts(read_table(written(tmp_path, name, content)))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--eval-data", "--test-data"])
def test_held_out_data_of_one_class_is_not_called_training_data(option):
    table = Table("eval.csv", {"text": ["a film", "b film"], "label": ["good", "good"]})
    with pytest.raises(InputError, match=f"eval.csv \\({option}\\): all 2 rows are of the class 'good'"):
        labelled_texts(table, held_out=option)


@pytest.mark.parametrize("source", ["nowhere.csv", "./nowhere", "/no/where"])
def test_a_missing_file_is_named(source):
    with pytest.raises(InputError, match=f"no file or folder {source}"):
        read_table(source)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    import datasets

    def load(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"no file someone/reviews\.v2, and the hub .*\(no route\)$"):
        read_table("someone/reviews.v2")


def test_a_split_that_is_not_there_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        read_table(as_datasets_folder(tmp_path), split="test")


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="save_to_disk"):
        read_table(str(tmp_path))


def test_a_missing_column_is_answered_with_those_there_are():
    with pytest.raises(InputError, match="no column 'review'.*'text', 'label'"):
        choose_columns(Table("data", {"text": ["a"], "label": ["b"]}), "review")


def test_a_column_named_for_one_part_is_not_guessed_for_the_other():
    table = Table("data", {"target": ["a film", "b film"], "content": ["x", "y"], "kind": ["0", "1"]})
    assert choose_columns(table, text_column="target", label_column="content") == ("target", "content")
    assert choose_text_column(table, label_column="content") == "target"


def test_whole_numbers_in_a_csv_are_one_label_however_they_are_written(tmp_path):
    path = written(tmp_path, "data.csv", "text,label\na,1.0\nb,1\nc,0.0\n")
    assert labelled_texts(read_table(path)).labels == ["1", "1", "0"]


def test_decimal_points_in_names_of_classes_stay(tmp_path):
    path = written(tmp_path, "data.csv", "text,label\na,1.0\nb,v2\n")
    assert labelled_texts(read_table(path)).labels == ["1.0", "v2"]


def test_whole_numbers_are_one_label_however_they_are_written():
    assert labelled_texts(Table("data", {"text": ["a", "b", "c"], "label": [1.0, 1, "0"]})).labels == ["1", "1", "0"]


def test_labels_are_ordered_by_number_where_all_are_numbers():
    assert label_names(["10", "9", "10"]) == ["9", "10"]
    padded = ["0" * zeros + "1" for zeros in range(8, -1, -1)]  # one number: no order of a set may show
    assert label_names([*padded, "2"]) == [*padded, "2"]
    assert label_names(["b", "10", "a"]) == ["10", "a", "b"]


cells = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00\ufeff"), min_size=1).filter(
    str.strip
)


@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_csv_survives_the_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    columns = read_table(str(path)).columns
    assert list(zip(columns["text"], columns["label"], strict=True)) == rows
