"""Chat templates and patterns run within limits, on any thread, and mean what they mean to transformers and PEFT."""

from __future__ import annotations

import threading

import pytest
from transformers import AutoTokenizer

from loraplus.errors import InputError
from loraplus.tasks import sandbox_process
from loraplus.tasks.chat import Chats, ChatTemplateError
from loraplus.tasks.generate import prompt_ids
from loraplus.tasks.sandbox import check_patterns

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hallo é"}]
NAMES = [f"model.layers.{i}.self_attn.query_projection" for i in range(40)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(sandbox_process, "SECONDS", 0.5)


@pytest.fixture(scope="module")
def tokenizer(decoder_folder):
    return AutoTokenizer.from_pretrained(decoder_folder)


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"return_assistant_tokens_mask": True}])
@pytest.mark.parametrize("count", [1, 2])
def test_a_chat_has_the_tokens_that_transformers_gives_it(tokenizer, options, count):
    expected = tokenizer.apply_chat_template(MESSAGES[:count], return_dict=True, **options)
    found = Chats(tokenizer).apply_chat_template(MESSAGES[:count], **options)
    assert found == {name: list(expected[name]) for name in found} and len(found["input_ids"]) >= 3


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ ((9**9)**9)**9999999 }}",
}
HUGE = {
    "a long text": "{{ 'x' * 10**10 }}",
    "padding": "{{ 'x'.ljust(10**9) }}",
    "doubling": "{% set n=namespace(x='ab') %}{% for i in range(60) %}{% set n.x=n.x~n.x %}{% endfor %}",
    "a long output": "{{ 'x' * 20000000 }}",
    "a list": "{% set n=namespace(x=[1]) %}{% for i in range(60) %}{% set n.x=n.x+n.x %}{% endfor %}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
}


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE])
def test_a_template_that_takes_too_much_is_one_line(tokenizer, name):
    template = {**ENDLESS, **HUGE}[name]
    with pytest.raises(ChatTemplateError, match="too much memory|more than 16,777,216 characters|recursion"):
        Chats(tokenizer).apply_chat_template(MESSAGES, chat_template=template)
    assert Chats(tokenizer).text(MESSAGES[:1])  # the next one is answered


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self._TemplateReference__context }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(tokenizer, template):
    with pytest.raises(ChatTemplateError):
        text = Chats(tokenizer).text(MESSAGES, chat_template=template)
        assert "root:" not in text and "class" not in text
        raise ChatTemplateError("nothing came out of it")


def test_a_template_that_is_none_says_its_line(tokenizer):
    with pytest.raises(ChatTemplateError) as caught:
        Chats(tokenizer).text(MESSAGES, chat_template="a\n{% for")
    assert caught.value.line == 2


def test_limits_hold_on_every_thread(tokenizer, decoder_folder):
    own = AutoTokenizer.from_pretrained(decoder_folder)
    own.chat_template = ENDLESS["loops"]
    found = []

    def ask():
        with pytest.raises(InputError, match="takes more than"):
            prompt_ids(own, "hi")
        found.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert found == [True]


@pytest.mark.parametrize("pattern", ["(.*)*query", r"(.+)+\.query", "((a|.)*)*x", "(.*.*.*)*query"])
@pytest.mark.parametrize(
    "place", [lambda p: {"target_modules": p}, lambda p: {"rank_pattern": {p: 3}}, lambda p: [[p]]]
)
def test_a_pattern_that_takes_too_long_is_named(pattern, place):
    with pytest.raises(InputError, match="takes too long on this model's names"):
        check_patterns("adapter_config.json", place(pattern), NAMES)


@pytest.mark.parametrize(
    "pattern", ["query", "query|value", r".*\.(query|value)_projection", "(", "layers.[0-9]+.x", r"(?:a\.)?b", "a{2,3}"]
)
def test_a_pattern_as_people_write_them_passes(pattern):
    check_patterns("adapter_config.json", {"target_modules": pattern, "r": 8, "alpha_pattern": {pattern: 1}}, NAMES)


def test_an_interrupted_request_leaves_no_answer_to_the_next(monkeypatch):
    def interrupted(*unused):
        raise KeyboardInterrupt

    check_patterns("a.json", ["a.*"], NAMES)
    with monkeypatch.context() as during:
        during.setattr("loraplus.tasks.sandbox.struct.unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_patterns("a.json", ["b.*"], NAMES)
    with pytest.raises(InputError, match="takes too long"):
        check_patterns("a.json", ["(.*)*z"], NAMES)
    check_patterns("a.json", ["c.*"], NAMES)
