"""JSON and YAML of unknown origin: within limits, and one line for each defect."""

from __future__ import annotations

import json

import pytest
import yaml

from loraplus.errors import InputError
from loraplus.files.parsing import ParseError, is_deep, parse_json, parse_yaml
from loraplus.files.single import read_json

DEEP = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 101 + "]" * 101,
    "objects": '{"a":' * 100_000,
    "lists that Python reads": "[" * 900 + "]" * 900,
}


@pytest.mark.parametrize("name", DEEP)
def test_json_that_is_nested_too_deeply_is_one_line(tmp_path, name):
    with pytest.raises(ParseError, match="nested too deeply"):
        parse_json(DEEP[name])
    (tmp_path / "a.json").write_text(DEEP[name])
    with pytest.raises(InputError, match=r"a\.json is JSON that is nested too deeply"):
        read_json(tmp_path / "a.json")


def test_json_as_deep_as_data_are_is_read():
    text = "[" * 100 + "]" * 100
    assert parse_json(text) == json.loads(text) and not is_deep(json.loads(text))


@pytest.mark.parametrize("text", ["9" * 5000, '{"a": ' + "9" * 5000 + "}", "", "{", "[1,]", '{"a" 1}', "\ufeff{}"])
def test_json_that_is_none_is_one_line(text):
    with pytest.raises(ParseError) as caught:
        parse_json(text)
    assert len(str(caught.value).splitlines()) == 1


YAML = {
    "digits": ("lr: " + "9" * 5000, "a number of 5000 characters"),
    "sexagesimal": ("lr: 1" + ":1" * 20_000, "a number of"),
    "brackets": ("lr: " + "[" * 2000, "nested more than 20 deep"),
    "braces": ("{" * 60_000, "nested more than 20 deep"),
    "block lists": ("- " * 30_000, "nested more than 20 deep"),
    "keys of keys": ("? " * 30_000, "nested more than 20 deep"),
    "a tag": ("lr: !!int abc", "tags"),
    "a tag of Python": ("lr: !!python/object/apply:os.system [id]", "tags"),
    "references": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "references"),
    "a reference to itself": ("&a [*a]", "references"),
    "twice": ("lr: 1\nlr: 2", "lr is given twice"),
    "keys that are lists": ("? [a]\n: 1", "a key is a list"),
    "no YAML": ("a: b: c", "not valid YAML"),
    "a zero byte": ("a: \0", "not valid YAML"),
    "length": ("#" * 100_000, "longer than"),
}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", YAML)
def test_yaml_that_no_configuration_needs_is_one_line(name, as_text):
    text, expected = YAML[name]
    if as_text and name in ("digits", "sexagesimal"):
        assert parse_yaml(text, as_text=True) == {"lr": text.removeprefix("lr: ")}
        return
    with pytest.raises(ParseError, match=expected) as caught:
        parse_yaml(text, as_text=as_text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["2001-01-01", "2026-13-01", "true", "1e-4", "007", "1_000", "0x1", "~nobody", "no"])
def test_a_configuration_says_what_it_says(value):
    assert parse_yaml(f"key: {value}", as_text=True) == {"key": value}


def test_dates_stay_text_and_null_is_nothing():
    assert parse_yaml("a: 2001-01-01\nb: null\nc:\nd: ~") == {"a": "2001-01-01", "b": None, "c": None, "d": None}
    assert parse_yaml("b: null\nc:\nd: ~\ne: 'null'", as_text=True) == {"b": None, "c": None, "d": None, "e": "null"}


@pytest.mark.parametrize(
    "value", [1, 1e-4, True, None, "true", "2001-01-01", "1e-4", "é", "a: b", "*a", "!x", ["a", 1]]
)
def test_what_a_run_wrote_is_read_as_it_was(value):
    assert parse_yaml(yaml.safe_dump({"key": value}, allow_unicode=True)) == {"key": value}
