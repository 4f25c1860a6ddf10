"""Alpaca, questions with answers, and columns named by flag, as prompts with completions."""

from __future__ import annotations

import pytest

from loraplus.errors import InputError
from loraplus.tasks.conversations import COMPLETION, CONVERSATION, TEXT, NamedColumns, read_examples
from loraplus.tasks.instructions import pair_columns
from loraplus.tasks.table import Table

ALPACA = {"instruction": ["Add.", "Say hi."], "input": ["2 + 2", ""], "output": ["4", "hi"]}
QUESTIONS = {"id": [1, 2], "Question": ["2 + 2?", "1 + 1?"], "Answer": ["4", "2"]}


def read(columns, as_chat=False, **named):
    table = Table("d.json", columns, lines=[1, 2])
    return read_examples(table, "sft", named=NamedColumns(**named), as_chat=as_chat)


def test_alpaca_becomes_turns_where_there_is_a_chat_template_and_its_own_layout_elsewhere():
    first, second = read(ALPACA, as_chat=True).rows
    assert first.prompt == [{"role": "user", "content": "Add.\n\n2 + 2"}]
    assert first.completion == [{"role": "assistant", "content": "4"}]
    assert second.prompt == [{"role": "user", "content": "Say hi."}]
    examples = read(ALPACA)
    assert examples.kind == COMPLETION and not examples.are_chats
    assert [row.prompt for row in examples.rows] == [
        "### Instruction:\nAdd.\n\n### Input:\n2 + 2\n\n### Response:\n",
        "### Instruction:\nSay hi.\n\n### Response:\n",
    ]
    assert [row.completion for row in examples.rows] == ["4", "hi"]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (ALPACA, "prompt 'instruction' with 'input', completion 'output'"),
        (QUESTIONS, "prompt 'Question', completion 'Answer'"),
        (
            {"instruction": ["a"], "context": ["b"], "response": ["c"]},
            "prompt 'instruction' with 'context', completion",
        ),
        ({"input": ["a", "b"], "output": ["b", "c"]}, "prompt 'input', completion 'output'"),
        ({"instruction": ["a"], "input": [None], "output": ["c"]}, "prompt 'instruction', completion 'output'"),
        ({"prompt": ["a"], "response": ["c"], "text": ["d"]}, "prompt 'prompt', completion 'response'"),
    ],
)
def test_usual_names_are_found_whatever_their_case(columns, shown):
    assert shown in read(columns).columns


def test_columns_can_be_named():
    columns = {
        "asked": ["a", "b"],
        "said": ["c", "d"],
        "text": ["e", "f"],
        "talk": [[{"role": "assistant", "content": "x"}]] * 2,
    }
    named = read(columns, as_chat=True, prompt="asked", completion="said")
    assert named.rows[0].prompt == [{"role": "user", "content": "a"}]
    assert read(columns, messages="talk").kind == CONVERSATION
    assert read(columns, text="asked").kind == TEXT and read(columns).kind == TEXT
    assert (
        read({"question": ["a", "b"], "said": ["c", "d"]}, completion="said").columns
        == "prompt 'question', completion 'said'"
    )


def test_prompts_and_completions_of_those_names_stay_as_they_stand():
    columns = {"prompt": ["2 + 2 =", "1 + 1 ="], "completion": [" 4", " 2"]}
    for named in ({}, {"prompt": "prompt", "completion": "completion"}):
        assert read(columns, as_chat=True, **named).rows[0].prompt == "2 + 2 ="


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        (ALPACA, {"prompt": "asked"}, "no column 'asked' \\(--prompt-column\\).*'instruction'"),
        (ALPACA, {"messages": "chat"}, "no column 'chat' \\(--messages-column\\)"),
        ({"a": ["x"], "b": ["y"]}, {"prompt": "a"}, "goes with 'a' cannot be told; name it \\(--completion-column\\)"),
        ({"a": ["x"], "b": ["y"]}, {"completion": "b"}, "name it \\(--prompt-column\\)"),
        ({**ALPACA, "output": ["4", " "]}, {}, "line 2: the output is empty"),
        ({**ALPACA, "input": [["x"], ""]}, {}, "line 1: the input is a list"),
        ({"question": ["a"], "answer": [3]}, {}, "line 1: the answer is a int"),
        ({"question": ["a"], "answer": [{"text": ["b"]}]}, {}, "line 1: the answer is a dict"),
    ],
)
def test_what_cannot_be_used_is_one_line(columns, named, expected):
    with pytest.raises(InputError, match=expected):
        read(columns, **named)


def test_a_name_asked_for_keeps_its_usual_partner():
    assert pair_columns("d", ["instruction", "answer", "question"], prompt="instruction").completion == "answer"
