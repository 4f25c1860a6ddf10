"""Messages: one line, of limited length, with nothing in it that a terminal obeys."""

from __future__ import annotations

import pickle
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus.errors import (
    LONGEST_ERROR,
    LONGEST_MESSAGE,
    InputError,
    LoraPlusWarning,
    RateMismatchError,
    one_line,
    visible,
)


@pytest.mark.parametrize("what", ["a\nb", "a\r\nb", "a\u2028b", "a\x0bb", "\n a \n\n b \n"])
def test_a_message_of_several_lines_becomes_one(what):
    assert str(InputError(what)) == "a b"


def test_a_warning_in_a_script_is_one_line_that_no_terminal_obeys():
    with pytest.warns(LoraPlusWarning) as told:
        warnings.warn("a\nb \x1b[31mred", LoraPlusWarning, stacklevel=1)
    assert str(told[0].message) == r"a b \x1b[31mred"


def test_a_long_name_loses_its_middle_and_the_sentence_around_it_stays():
    text = str(InputError(f"cannot read /data/{'x' * 5000}.csv: file name too long; take another"))
    assert len(text) <= LONGEST_MESSAGE
    assert text.startswith("cannot read /data/xxx") and text.endswith("xxx.csv: file name too long; take another")


def test_a_message_of_many_words_keeps_its_beginning_and_its_end():
    text = str(InputError("the columns are " + "a, " * 5000 + "and no more"))
    of_parameters = str(RateMismatchError("the columns are " + "a, " * 5000 + "and no more"))
    for shown, longest in ((text, LONGEST_MESSAGE), (of_parameters, LONGEST_ERROR)):
        assert len(shown) == longest and shown.startswith("the columns are a,") and shown.endswith("and no more")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b2J", r"\x9b2J"),
        ("a\x07\x00\x7f", r"a\x07\x00\x7f"),
        ("gpj\u202egnp", r"gpj\u202egnp"),
        ("\u2066x\u2069\ufeff", r"\u2066x\u2069\ufeff"),
        ("n\udcffx", r"n\xffx"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_a_terminal_obeys_or_hides_is_spelled_out(text, shown):
    assert visible(text) == shown and str(InputError(text)) == shown


@pytest.mark.parametrize("text", ["ünïcode, 漢字, عربى", "👩‍💻", "می‌خواهم", "a\tb\nc", "[red]a[/b]"])
def test_text_of_any_script_stays_as_it_is(text):
    assert visible(text) == text


@given(st.text())
def test_no_text_makes_a_message_that_a_terminal_obeys(text):
    line = one_line(text)
    assert len(line) <= LONGEST_MESSAGE and len(line.splitlines()) <= 1
    assert visible(line, kept="") == line


def test_an_error_comes_whole_out_of_another_process():
    error = pickle.loads(pickle.dumps(RateMismatchError("x" * 600)))
    assert type(error) is RateMismatchError and error.args == ("x" * 600,)
