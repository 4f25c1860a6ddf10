"""What is read as an example, and what is refused with its line."""

from __future__ import annotations

import json

import pytest
from language import chat_rows, pair_rows, text_rows, write_lines

from loraplus.errors import InputError
from loraplus.tasks.conversations import COMPLETION, CONVERSATION, TEXT, read_examples
from loraplus.tasks.table import read_table

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def read(path, rows, task="sft", **options):
    return read_examples(read_table(str(write_lines(path / "data.jsonl", rows))), task, **options)


@pytest.mark.parametrize(
    ("rows", "task", "kind"),
    [
        (chat_rows(3), "sft", CONVERSATION),
        (pair_rows(3), "sft", COMPLETION),
        (text_rows(3), "sft", TEXT),
        (text_rows(3), "lm", TEXT),
        ([{"prompt": [USER], "completion": [ASSISTANT]}], "sft", COMPLETION),
    ],
)
def test_the_kind_follows_from_the_columns(tmp_path, rows, task, kind):
    found = read(tmp_path, rows, task)
    assert found.kind == kind and len(found.rows) == len(rows)
    assert found.rows[-1].where.endswith(f"data.jsonl, line {len(rows)}")


def test_sharegpt_rows_are_conversations(tmp_path):
    (row,) = read(
        tmp_path, [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
    ).rows
    assert row.messages == [USER, ASSISTANT]


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_other_formats_give_the_same_rows(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [USER, {**ASSISTANT, "name": "bot"}]}, {"messages": [USER, ASSISTANT]}]
    data = datasets.Dataset.from_list(rows)
    path = tmp_path / ("data.parquet" if form == "parquet" else "data")
    data.to_parquet(path) if form == "parquet" else data.save_to_disk(path)
    assert [row.messages for row in read_examples(read_table(str(path)), "sft").rows] == [
        row["messages"] for row in rows
    ]


def test_empty_fields_of_columnar_files_are_gone_however_deep(tmp_path):
    datasets = pytest.importorskip("datasets")
    call = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {"y": 2}}}]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": call}]
    datasets.Dataset.from_list([{"messages": messages, "tools": call}]).to_parquet(tmp_path / "data.parquet")
    (row,) = read_examples(read_table(str(tmp_path / "data.parquet")), "sft").rows
    assert (row.messages, row.tools) == (messages, call)


def test_tools_may_be_json_text_or_empty(tmp_path):
    rows = read(tmp_path, [{**GOOD, "tools": json.dumps([{"name": "f"}])}, {**GOOD, "tools": ""}]).rows
    assert [row.tools for row in rows] == [[{"name": "f"}], None]


def test_a_prompt_beside_a_conversation_is_not_a_second_kind(tmp_path):
    assert read(tmp_path, [{**GOOD, "prompt": "hi", "prompt_id": "1"}]).kind == CONVERSATION


def test_lines_of_text_end_where_the_file_says(tmp_path):
    (tmp_path / "texts.txt").write_bytes("one\u2028still one\r\n\r\ntwo\x0c\x85\n".encode())
    table = read_table(str(tmp_path / "texts.txt"))
    assert (table.columns["text"], table.lines) == (["one\u2028still one", "two\x0c\x85"], [1, 3])


GOOD = {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, {"messages": [USER]}], r"line 2: the conversation has no assistant turn"),
        ([GOOD, {"messages": []}], r"line 2: messages is an empty list"),
        ([GOOD, {"messages": None}], r"line 2: there are no messages"),
        ([GOOD, {"messages": "hi"}], r"line 2: messages is a str, expected a list"),
        ([GOOD, {"messages": [USER, "hello"]}], r"line 2, message 2: expected \{.*found a str"),
        ([GOOD, {"messages": [USER, {"content": "hello"}]}], r"line 2, message 2: it has no role"),
        ([GOOD, {"messages": [USER, {"role": "assistant"}]}], r"line 2, message 2: the content is missing"),
        ([GOOD, {"messages": [USER, {"role": "assistant", "content": 7}]}], r"line 2, message 2: the content is a int"),
        ([GOOD, {"messages": [USER, {**ASSISTANT, "content": " "}]}], r"line 2, message 2: the assistant turn is"),
        ([GOOD, {"prompt": "a", "completion": "b"}], r"mixes .*'messages' first in line 1, 'prompt' first in line 2"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], r"line 2: the completion is empty"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}], r"line 2: the prompt is empty"),
        ([{"prompt": "a", "completion": 3}], r"line 1: the completion is a int"),
        ([{"prompt": [USER], "completion": "b"}], r"line 1: prompt and completion must both be"),
        ([{"prompt": [USER], "completion": [USER]}], r"line 1: the completion has no assistant turn"),
        ([GOOD, {**GOOD, "tools": "[{"}], r"line 2: the tools are a string that is not valid JSON"),
        ([GOOD, {**GOOD, "tools": {"name": "f"}}], r"line 2: the tools are a dict, expected a list"),
        ([{"conversations": [{"from": ["human"], "value": "hi"}]}], r"line 1, message 1: it has no role"),
        ([GOOD, {"prompt": "a"}], r"line 2: there are no messages"),
        ([{"text": "a"}, {"text": "half \ud83d"}], r"line 2: half of a surrogate pair"),
        ([{"prompt": "a"}], r"has a column 'prompt' but nothing in a column 'completion'"),
        ([{"said": "a", "heard": "b"}], r"needs a column 'messages'.*--prompt-column.*it has 'said', 'heard'"),
        ([{"text": "a"}, {"text": " "}], r"the text \(column 'text'\) is missing in 1 of 2 rows, first in line 2"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_line(tmp_path, rows, says):
    with pytest.raises(InputError, match=says):
        read(tmp_path, rows)


def test_a_text_column_can_be_named(tmp_path):
    rows = [{"story": "once upon a time", "messages": json.dumps([])}]
    assert read(tmp_path, rows, text_column="story").rows[0].text == "once upon a time"
