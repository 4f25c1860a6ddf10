"""`loraplus generate` from the outside: prompts from everywhere, text to everywhere, one line for what is wrong."""

from __future__ import annotations

import io
import json

import pytest
from tasks.causal import SENTENCES
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplus.tasks.generate import generate

SHORT = ("--max-new-tokens", 8, "--plain")


@pytest.fixture(scope="module")
def expected(base):
    """What the base model says to each sentence's first words, as a chat."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    return generate(model, tokenizer, [sentence[:9] for sentence in SENTENCES], max_new_tokens=8)


def piped(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_one_prompt_is_answered_on_standard_output(base, expected, loraplus_command, monkeypatch):
    done = loraplus_command("generate", "--model", base, "--prompt", SENTENCES[0][:9], *SHORT)
    assert (done.code, done.out) == (0, expected[0] + "\n")
    piped(monkeypatch, SENTENCES[0][:9].encode() + b"\n")
    assert loraplus_command("generate", "--model", base, *SHORT).out == expected[0] + "\n"


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "messages", "conversations"])
def test_a_file_of_prompts_is_answered_row_by_row(base, expected, tmp_path, loraplus_command, kind):
    prompts = [sentence[:9] for sentence in SENTENCES]
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": "learned"}] for p in prompts]
    source = tmp_path / f"prompts.{kind if kind in ('txt', 'csv') else 'jsonl'}"
    source.write_text({
        "txt": "\n\n".join(prompts),
        "csv": "\n".join(["id,prompt", *(f"{i},{p}" for i, p in enumerate(prompts))]),
        "jsonl": "\n".join(json.dumps({"text": p}) for p in prompts),
        "messages": "\n".join(json.dumps({"messages": chat}) for chat in chats),
        "conversations": "\n".join(json.dumps({"conversations": [{"from": "human", "value": p}]}) for p in prompts),
    }[kind] + "\n")  # fmt: skip
    target = tmp_path / "out.jsonl"
    done = loraplus_command("generate", "--model", base, "--prompts", source, "--output", target, *SHORT)
    assert (done.code, done.out) == (0, f"3 completions written to {target}\n")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["completion"] for row in rows] == expected
    assert set(rows[0]) - {"completion"} == {
        "txt": {"text"}, "csv": {"id", "prompt"}, "jsonl": {"text"}, "messages": {"messages"},
        "conversations": {"conversations"},
    }[kind]  # fmt: skip


def test_several_are_shown_with_their_prompts(base, expected, tmp_path, loraplus_command):
    (tmp_path / "p.txt").write_text("\n".join(sentence[:9] for sentence in SENTENCES[:2]))
    out = loraplus_command("generate", "--model", base, "--prompts", tmp_path / "p.txt", *SHORT).out
    assert out.index(SENTENCES[0][:9]) < out.index(SENTENCES[1][:9])


def test_the_adapter_speaks_and_its_base_can_be_named(base, adapter, expected, loraplus_command):
    alone = loraplus_command("generate", "--adapter", adapter, "--prompt", "the light", *SHORT)
    named = loraplus_command("generate", "--adapter", adapter, "--model", base, "--prompt", "the light", *SHORT)
    assert alone.code == 0
    assert alone.out == named.out != expected[0] + "\n"


def test_samples_differ_and_follow_the_seed(base, loraplus_command):
    call = ("generate", "--model", base, "--prompt", "the", "--num-samples", 3, "--temperature", 1, "--json", *SHORT)
    rows = json.loads(loraplus_command(*call).out)
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert len({row["completion"] for row in rows}) == 3
    assert json.loads(loraplus_command(*call).out) == rows
    assert json.loads(loraplus_command(*call, "--seed", 1).out) != rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "the"], "name an adapter, a model, or both"),
        (["--model", "./none", "--prompt", "the"], "there is no model folder ./none"),
        (["--adapter", "none", "--prompt", "the"], "there is no adapter folder none"),
        (["--adapter", "BASE", "--prompt", "the"], "is a whole model, not an adapter"),
        (["--model", "ADAPTER", "--prompt", "the"], "is an adapter, not a model; name it with --adapter"),
        (["--model", "ENCODER", "--prompt", "the"], "is a bert, no causal language model"),
        (["--adapter", "ADAPTER", "--model", "ENCODER", "--prompt", "the"], "is a bert, no causal language model"),
        (["--model", "BASE", "--prompt", "the", "--prompts", "p.txt"], "exclude each other"),
        (["--model", "BASE", "--prompt", " "], "a prompt is empty"),
        (["--model", "BASE", "--prompt", "the " * 90], "tokens, and the model takes 48 with the answer; shorten it"),
        (["--model", "BASE", "--prompts", "none.txt"], "there is no file or folder none.txt"),
        (["--model", "BASE", "--prompts", "broken.txt"], "broken.txt, line 2: not UTF-8 text"),
        (["--model", "BASE", "--prompts", "gap.csv"], "gap.csv, line 3: the prompt is empty or no text"),
        (["--model", "BASE", "--prompts", "gap.csv", "--prompt-column", "x"], "has no column 'x'"),
        (["--model", "BASE", "--prompts", "bare.jsonl"], "bare.jsonl, line 2, message 1: the content is missing"),
        (["--model", "BASE", "--prompts", "long.txt"], "long.txt, line 3: the prompt has"),
        (["--model", "BASE", "--prompts", "number.jsonl"], "no column holds text; name it with --prompt-column"),
        (["--model", "BASE", "--prompt", "caf\udce9"], "a prompt is no Unicode text"),
        (["--model", "BASE", "--prompts", "answer.jsonl"], "the chat has no turn to answer"),
        (["--model", "BASE", "--prompt", "the", "--output", "out.txt"], "must end in .jsonl"),
        (["--model", "BASE", "--prompt", "the", "--output", "there.jsonl"], "there.jsonl exists"),
        (["--model", "BASE", "--prompt", "the", "--output", "no/out.jsonl"], "there is no folder no to write"),
        (["--model", "BASE", "--prompt", "the", "--num-samples", 2], "needs a --temperature"),
        (["--model", "BASE", "--prompt", "the", "--top-p", 0], "top_p must be above 0"),
        (["--model", "BASE", "--prompt", "the", "--no-chat", "--system", "x"], "a system message needs a chat"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(base, adapter, model_folder, tmp_path, refused, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.txt").write_bytes("the\ncafé été".encode() + b"\xe9\xff\n" + "déjà\n".encode())
    (tmp_path / "gap.csv").write_text("id,prompt\n1,the\n2,\n")
    (tmp_path / "answer.jsonl").write_text('{"messages": [{"role": "assistant", "content": "so"}]}\n')
    (tmp_path / "bare.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [{"role": "user"}]}'
    )
    (tmp_path / "long.txt").write_text("the\n\n" + "the " * 90)
    (tmp_path / "number.jsonl").write_text('{"count": 1}')
    (tmp_path / "there.jsonl").write_text("kept")
    folders = {"BASE": base, "ADAPTER": adapter, "ENCODER": model_folder}
    assert message in refused("generate", *(folders.get(option, option) for option in options))
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def test_a_classifiers_adapter_writes_no_text(adapter, tmp_path, refused):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "SEQ_CLS"}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    assert "is an adapter for SEQ_CLS" in refused("generate", "--adapter", tmp_path, "--prompt", "the")


def test_nothing_piped_in_or_no_text_is_one_line(base, refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert "nothing to generate from" in refused("generate", "--model", base)
    piped(monkeypatch, b"caf\xe9")
    assert "standard input is not UTF-8" in refused("generate", "--model", base)
    piped(monkeypatch, b"")
    assert "a prompt is empty" in refused("generate", "--model", base)
