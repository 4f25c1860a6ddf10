"""Tables as people have them: what Excel writes, other encodings, packed files, folders of texts."""

from __future__ import annotations

import gzip
import os
import sys
import types

import pytest
from workbooks import with_openpyxl, write_workbook

from loraplus.errors import InputError
from loraplus.tasks import tabular, workbook
from loraplus.tasks.columns import labelled_texts
from loraplus.tasks.encodings import encoding_of
from loraplus.tasks.table import check_source, read_table

ROWS = [("ein schöner Film; wirklich", "gut"), ('er sagte "nein"', "schlecht"), ("zwei\nZeilen, 5 €", "gut")]


def quoted(rows, delimiter, end="\r\n"):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if set(text) & set(f'"{delimiter}\n') else text

    return "".join(delimiter.join(map(cell, row)) + end for row in [("text", "label"), *rows])


def examples(path, **options):
    found = labelled_texts(read_table(str(path), **options))
    return list(zip(found.texts, found.labels, strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_read_whatever_its_separator_and_byte_order_mark(tmp_path, delimiter, encoding):
    path = tmp_path / "data.csv"
    path.write_bytes(quoted(ROWS, delimiter).encode(encoding))
    assert examples(path) == ROWS
    name = {",": (), ";": ("semicolons",), "\t": ("tabs",), "|": ("bars",)}[delimiter]
    assert [f"separated by {n}" for n in name] == [p for p in read_table(str(path)).read_as if "separated" in p]


@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_every_text_format_is_read_packed_and_in_other_encodings(tmp_path, end, encoding):
    rows = [{"text": f"schön {i}", "label": "ja"} for i in range(3)]
    lines = [f'{{"text": "{row["text"]}", "label": "ja"}}' for row in rows]
    content = {
        ".csv": "text;label\n" + "".join(f"{row['text']};ja\n" for row in rows),
        ".tsv": "text\tlabel\n" + "".join(f"{row['text']}\tja\n" for row in rows),
        ".jsonl": "\n".join(lines),
        ".json": f"[{','.join(lines)}]",
        ".txt": "".join(row["text"] + "\n" for row in rows),
    }[end]
    path = tmp_path / f"data{end}.gz"
    path.write_bytes(gzip.compress(content.encode(encoding)))
    table = read_table(str(path), encoding=encoding if encoding == "cp1252" else None)
    assert table.columns["text"] == [row["text"] for row in rows]


def test_a_first_line_that_tells_excel_the_separator_tells_it_here(tmp_path):
    (tmp_path / "d.csv").write_text("sep=;\na, b;label\nx, y;1\nz;0\n")
    table = read_table(str(tmp_path / "d.csv"))
    assert list(table.columns) == ["a, b", "label"] and table.place(0).endswith("d.csv, line 3")


def test_a_comma_in_a_name_does_not_make_a_file_with_semicolons_one_with_commas(tmp_path):
    (tmp_path / "d.csv").write_text("text, as written;label\nfine film;1\ndull, film;0\n")
    assert list(read_table(str(tmp_path / "d.csv")).columns) == ["text, as written", "label"]
    (tmp_path / "e.csv").write_text("text;as written,label\nfine film,1\n")
    assert list(read_table(str(tmp_path / "e.csv")).columns) == ["text;as written", "label"]


def test_rows_of_other_lengths_are_named_in_files_with_semicolons_too(tmp_path):
    (tmp_path / "d.csv").write_text("text;label\na;1\nb;1;2\n")
    with pytest.raises(InputError, match="line 3: 3 fields where the header has 2"):
        read_table(str(tmp_path / "d.csv"))


# Encodings. charset-normalizer is asked where it is installed; here something stands in for it.


def normalizer(*matches):
    kinds = [
        types.SimpleNamespace(encoding=name, chaos=chaos, could_be_from_charset=also) for name, chaos, also in matches
    ]
    return types.SimpleNamespace(from_bytes=lambda sample, cp_isolation: kinds)


@pytest.fixture
def latin(tmp_path):
    (tmp_path / "d.csv").write_bytes("text;label\nfine;gut\nein schöner Film;gut\nöde;schlecht\n".encode("cp1252"))
    return tmp_path / "d.csv"


def test_an_encoding_that_is_named_needs_no_package(latin, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    table = read_table(str(latin), encoding="cp1252")
    assert table.columns["text"] == ["fine", "ein schöner Film", "öde"] and "cp1252" in table.read_as


def test_without_the_package_that_guesses_one_line_says_what_to_do(latin, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    with pytest.raises(InputError, match=r"d.csv, line 3: not UTF-8.*--encoding cp1252.*loraplus\[cli\]"):
        read_table(str(latin))


def test_a_guess_is_told_and_the_commonest_of_equally_good_ones(latin, monkeypatch):
    matches = ("cp1250", 0.0, ["cp1250"]), ("cp1252", 0.0, ["cp1252"]), ("cp1251", 0.2, ["cp1251"])
    monkeypatch.setitem(sys.modules, "charset_normalizer", normalizer(*matches))
    assert read_table(str(latin)).read_as == ("separated by semicolons", "cp1252, guessed")
    monkeypatch.setitem(sys.modules, "charset_normalizer", normalizer(matches[0], ("cp1252", 0.1, ["cp1252"])))
    assert "cp1250, guessed" in read_table(str(latin)).read_as
    monkeypatch.setitem(sys.modules, "charset_normalizer", normalizer())
    with pytest.raises(InputError, match="line 3: .*--encoding"):
        read_table(str(latin))


def test_the_package_that_guesses_tells_western_text(latin):
    pytest.importorskip("charset_normalizer")
    for text in (
        "La película es muy mala, señor",
        "Un très beau film, élégant",
        "Não é bom",
        "En väldigt bra film, år",
    ):
        latin.write_bytes(f"text;label\n{text};1\nplain;0\n".encode("cp1252"))
        assert read_table(str(latin)).columns["text"] == [text, "plain"]


def test_utf_8_that_is_damaged_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", normalizer(("cp1252", 0.0, ["cp1252"])))
    (tmp_path / "d.csv").write_bytes("text,label\nschön,1\n".encode() + b"k\xfchl,2\n")
    with pytest.raises(InputError, match="line 3: not UTF-8"):
        read_table(str(tmp_path / "d.csv"))


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 3 * 2**20 + 5])
def test_the_sample_of_a_guess_holds_the_bytes_that_are_no_utf_8(tmp_path, monkeypatch, size):
    seen = []
    monkeypatch.setitem(
        sys.modules,
        "charset_normalizer",
        types.SimpleNamespace(from_bytes=lambda sample, **_: seen.append(sample) or []),
    )
    (tmp_path / "d.txt").write_bytes(b"a\n" * (size // 2) + b"a" * (size % 2) + b"\xe9\n" + b"a\n" * 2**17)
    with pytest.raises(InputError, match=f"line {size // 2 + 1}: "):
        encoding_of("d.txt", tmp_path / "d.txt")
    assert b"\xe9" in seen[0] and len(seen[0]) <= 2**16


@pytest.mark.parametrize("name", ["nothing", "hex", "rot13", ""])
def test_an_encoding_that_there_is_not_is_one_line(latin, name):
    with pytest.raises(InputError, match="--encoding: there is no encoding"):
        read_table(str(latin), encoding=name)


def test_an_encoding_that_the_text_is_not_in_is_one_line(latin):
    for name, expected in (("utf-8", "line 3: not UTF-8"), ("ascii", "not ascii"), ("utf-16", "not utf-16")):
        with pytest.raises(InputError, match=expected):
            read_table(str(latin), encoding=name)


def test_zero_bytes_are_asked_about(tmp_path):
    (tmp_path / "d.csv").write_bytes("text,label\na,1\n".encode("utf-16-le"))
    with pytest.raises(InputError, match="zero bytes.*--encoding utf-16-le"):
        read_table(str(tmp_path / "d.csv"))
    assert read_table(str(tmp_path / "d.csv"), encoding="utf-16-le").columns["text"] == ["a"]


# Packed files.


def test_a_packed_file_is_held_to_the_limits_of_what_it_unpacks_to(tmp_path, monkeypatch):
    monkeypatch.setattr(tabular, "MOST_BYTES", 2**21)
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b"a,1\n" * 2**20))
    with pytest.raises(InputError, match="d.csv.gz holds more than 2,097,152 bytes"):
        read_table(str(tmp_path / "d.csv.gz"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:20] + b"\xff" + b[21:], lambda b: b"text,label\na,1\n"]
)
def test_a_damaged_packed_file_is_one_line(tmp_path, damage):
    content = "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(200))
    (tmp_path / "d.csv.gz").write_bytes(damage(gzip.compress(content.encode())))
    with pytest.raises(InputError, match=r"d\.csv\.gz") as caught:
        read_table(str(tmp_path / "d.csv.gz"))
    assert "\n" not in str(caught.value)


def test_a_packed_file_of_another_kind_or_of_nothing_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(b" \n"))
    with pytest.raises(InputError, match="unknown format .tar"):
        check_source(str(tmp_path / "d.tar.gz"))
    with pytest.raises(InputError, match="is empty"):
        check_source(str(tmp_path / "e.csv.gz"))


# Workbooks.


def test_a_workbook_is_read_by_its_first_sheet_that_holds_anything(tmp_path, monkeypatch):
    with_openpyxl(monkeypatch)
    path = write_workbook(
        tmp_path / "d.xlsx",
        notes=[],
        data=[[None], ["text", "label", None], ["a film", 1], [None, None], ["b film & more", 0, None]],
    )
    table = read_table(str(path))
    assert dict(table.columns) == {"text": ["a film", "b film & more"], "label": [1, 0]}
    assert table.place(1).endswith("d.xlsx, line 5")


def test_a_workbook_with_a_row_too_long_or_names_missing_is_one_line(tmp_path, monkeypatch):
    with_openpyxl(monkeypatch)
    for rows, expected in (
        ([["text", "label"], ["a", 1, 2]], "line 2: 3 cells where the header has 2"),
        ([["text", "text"], ["a", 1]], "'text' more than once"),
        ([[None, None, "text"], ["a", 1, 2]], "2 columns have no name"),
        ([["text"], []], "no rows"),
        ([], "no rows"),
    ):
        with pytest.raises(InputError, match=expected):
            read_table(str(write_workbook(tmp_path / "d.xlsx", data=rows)))


def test_a_workbook_that_is_none_or_unpacks_to_too_much_is_one_line(tmp_path, monkeypatch):
    with_openpyxl(monkeypatch)
    (tmp_path / "d.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match="cannot be read as an Excel workbook"):
        read_table(str(tmp_path / "d.xlsx"))
    write_workbook(tmp_path / "e.xlsx", data=[["text"], ["a" * 100_000]])
    monkeypatch.setattr(workbook, "_LARGEST_PART", 50_000)
    with pytest.raises(InputError, match="unpacks to more than 50,000 bytes"):
        read_table(str(tmp_path / "e.xlsx"))
    monkeypatch.setattr(tabular, "MOST_BYTES", 60_000)
    with pytest.raises(InputError, match="more than 60,000 bytes"):
        read_table(str(tmp_path / "e.xlsx"))


def test_without_openpyxl_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    path = write_workbook(tmp_path / "d.xlsx", data=[["text", "label"], ["a", 1]])
    with pytest.raises(InputError, match=r"needs the package openpyxl: pip install .loraplus\[cli\]"):
        read_table(str(path))


# Folders of texts by class.


def test_texts_in_folders_by_class_are_rows_in_the_order_of_names(tmp_path):
    for name, text in {"pos/2.txt": "two\nlines", "neg/1.txt": "öde", "pos/10.txt": "ten", "pos/x.md": "no"}.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
    (tmp_path / "d" / "empty").mkdir()
    assert examples(tmp_path / "d") == [("öde", "neg"), ("ten", "pos"), ("two\nlines", "pos")]


def test_a_file_of_a_folder_that_is_empty_or_damaged_is_named(tmp_path, monkeypatch):
    (tmp_path / "d" / "pos").mkdir(parents=True)
    for content, expected in ((b" \n", "1.txt is empty"), ("ö".encode() + b"\xff", "1.txt, line 1: not UTF-8")):
        (tmp_path / "d" / "pos" / "1.txt").write_bytes(content)
        with pytest.raises(InputError, match=f"d/pos/{expected}"):
            read_table(str(tmp_path / "d"))


def test_what_is_no_file_in_such_a_folder_is_passed_over(tmp_path):
    (tmp_path / "d" / "pos" / "x.txt").mkdir(parents=True)
    os.mkfifo(tmp_path / "d" / "pos" / "y.txt")
    (tmp_path / "d" / "pos" / "z.txt").write_text("z")
    assert read_table(str(tmp_path / "d")).columns["text"] == ["z"]
