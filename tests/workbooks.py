"""Workbooks as Excel writes them, made and read by the standard library, where openpyxl is not installed."""

from __future__ import annotations

import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_REL = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_KINDS = "application/vnd.openxmlformats-officedocument.spreadsheetml"


def write_workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    """Sheets of rows of texts, numbers and None."""
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_KINDS}.sheet.main+xml"/>'
        + "".join(
            f'<Override PartName="/xl/worksheets/sheet{i}.xml" ContentType="{_KINDS}.worksheet+xml"/>'
            for i in range(1, len(sheets) + 1)
        )
        + "</Types>",
        "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{_REL}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_REL}"><sheets>'
        + "".join(f'<sheet name="{name}" sheetId="{i}" r:id="r{i}"/>' for i, name in enumerate(sheets, start=1))
        + "</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
        + "".join(
            f'<Relationship Id="r{i}" Type="{_REL}/worksheet" Target="worksheets/sheet{i}.xml"/>'
            for i in range(1, len(sheets) + 1)
        )
        + "</Relationships>",
    }
    for i, rows in enumerate(sheets.values(), start=1):
        parts[f"xl/worksheets/sheet{i}.xml"] = (
            f'<worksheet xmlns="{_MAIN}"><sheetData>' + "".join(map(_row, rows)) + "</sheetData></worksheet>"
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>\n' + content)
    return path


def _row(cells: list[Any]) -> str:
    return "<row>" + "".join(map(_cell, cells)) + "</row>"


def _cell(value: Any) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, str):
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'
    return f"<c><v>{value}</v></c>"


class _Sheet:
    def __init__(self, title: str, content: bytes) -> None:
        self.title, self._content = title, content

    def iter_rows(self, values_only: bool) -> Iterator[tuple[Any, ...]]:
        assert values_only
        for row in ElementTree.fromstring(self._content).iter(f"{{{_MAIN}}}row"):
            yield tuple(map(_value, row))


def _value(cell: ElementTree.Element) -> Any:
    text, number = cell.find(f".//{{{_MAIN}}}t"), cell.find(f"{{{_MAIN}}}v")
    if text is not None:
        return text.text
    if number is None or number.text is None:
        return None
    return float(number.text) if "." in number.text else int(number.text)


def _load_workbook(path: Path, read_only: bool, data_only: bool) -> Any:
    assert read_only and data_only
    with zipfile.ZipFile(path) as archive:
        names = [sheet.get("name", "") for sheet in ElementTree.fromstring(archive.read("xl/workbook.xml"))[0]]
        sheets = [_Sheet(name, archive.read(f"xl/worksheets/sheet{i}.xml")) for i, name in enumerate(names, start=1)]
    return types.SimpleNamespace(worksheets=sheets, close=lambda: None)


def with_openpyxl(monkeypatch: Any) -> None:
    """Has something stand in for openpyxl where it is not installed."""
    try:
        import openpyxl  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=_load_workbook))
