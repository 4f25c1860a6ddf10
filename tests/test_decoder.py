"""The decoder's text, its pre-training and its folder, with a recipe of seconds."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tasks.causal import SENTENCES, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from loraplus.errors import InputError
from loraplus.reproduce import verse_decoder
from loraplus.reproduce.verse_decoder import Recipe
from loraplus.reproduce.verses import conversation, pack, passage, read_chapters, training_texts
from loraplus.tasks.generate import generate

ROOT = Path(__file__).resolve().parent.parent

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "examples" / "making"))
    import decoder as decoder_script
    from decoder import held_out_loss, main, make

RECIPE = Recipe(
    vocabulary=300, hidden=16, layers=1, heads=2, intermediate=16, context=64, batch=2, steps=12, warmup=2,
    evaluate_every=6, save_every=4, held_out_every=4, conversation_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    path = tmp_path_factory.mktemp("verses") / "verses.csv"
    rows = [f'{book},{chapter},{i},"{sentence} {book}"' for book in (1, 2) for chapter in range(1, 7)
            for i, sentence in enumerate(SENTENCES, start=1)]  # fmt: skip
    path.write_text("\n".join(["book,chapter,verse,text", *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def built(verses, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "decoder"
    return folder, make(verses, folder, RECIPE)


def test_held_out_chapters_are_never_trained_on(verses):
    chapters = read_chapters(verses, 4)
    assert (len(chapters.training), len(chapters.held_out)) == (9, 3)
    tokenizer = tiny_tokenizer()
    texts = list(training_texts(tokenizer, chapters.training, 2))
    assert len(texts) == 9 + 4
    assert texts[0] == passage(tokenizer, chapters.training[0])


def test_a_passage_and_a_conversation_say_the_same_words():
    tokenizer = tiny_tokenizer()
    chapter = list(SENTENCES)
    assert tokenizer.decode(passage(tokenizer, chapter)) == "<s>" + "\n".join(chapter) + "</s>"
    told = tokenizer.decode(conversation(tokenizer, chapter, system=True))
    assert told.startswith("<s><|system|>Go on with the passage.</s><|user|>the light")
    assert told.count("<|assistant|>") == 1
    assert told.endswith("<|user|>" + chapter[2] + "</s>")


def test_the_template_marks_what_the_assistant_says():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "the light"}, {"role": "assistant", "content": "was good"}]
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(said) == "was good</s>"


@pytest.mark.parametrize("text", ["Naïve — 日本\n\n  two  spaces [and] tabs\t", "A’b", " leading"])
def test_the_tokenizer_gives_back_any_text(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_packing_drops_only_the_end():
    assert pack([[1, 2, 3], [4, 5], [6, 7]], 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(InputError, match="2 tokens are not enough"):
        pack([[1, 2]], 3)


def test_the_folder_loads_in_single_precision_with_the_loss_it_names(built, verses):
    folder, figures = built
    assert {path.name for path in folder.iterdir()} >= {
        "README.md", "config.json", "curve.csv", "curve.svg", "decoder.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert not folder.with_name("decoder.training").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    held_out = pack((passage(tokenizer, chapter) for chapter in read_chapters(verses, 4).held_out), 64)
    assert held_out_loss(model.eval(), held_out) == pytest.approx(figures["held_out_loss"], rel=1e-5)
    assert figures["held_out_loss"] == pytest.approx(figures["held_out_loss_before_rounding"], rel=1e-3)
    assert (folder / "model.safetensors").stat().st_size < 3 * model.num_parameters()
    assert json.loads((folder / "decoder.json").read_text()) == figures


def test_it_learns_and_the_card_shows_it(built):
    folder, figures = built
    rows = [line.split(",") for line in (folder / "curve.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("eval_loss")]) for row in rows[1:] if row[rows[0].index("eval_loss")]]
    assert losses[-1] < losses[0] - 0.1
    picture = ElementTree.parse(folder / "curve.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    card = (folder / "README.md").read_text()
    assert f"{figures['held_out_perplexity']:.1f}" in card
    assert card.count("**In the beginning**") == 2


class _StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 9:
            raise KeyboardInterrupt


def test_interrupted_it_goes_on_to_the_same_weights(built, verses, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(verses, tmp_path / "decoder", RECIPE, [_StopAt()])
    assert not (tmp_path / "decoder").exists()
    with pytest.raises(InputError, match=r"another recipe \(lr was 0\.002, now 0\.1\); delete it"):
        make(verses, tmp_path / "decoder", replace(RECIPE, lr=0.1))
    again = make(verses, tmp_path / "decoder", RECIPE)
    assert again["held_out_loss"] == built[1]["held_out_loss"]
    assert (tmp_path / "decoder" / "model.safetensors").read_bytes() == (built[0] / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists; delete it"):
        make(verses, tmp_path / "decoder", RECIPE)


def test_interrupted_after_the_last_step_it_trains_no_further(built, verses, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(verse_decoder, "_save_in_half", stop)
        make(verses, tmp_path / "decoder", RECIPE)
    make(verses, tmp_path / "decoder", RECIPE)
    for name in ("model.safetensors", "curve.csv"):
        assert (tmp_path / "decoder" / name).read_bytes() == (built[0] / name).read_bytes()


def test_what_is_no_book_of_verses_is_refused(reviews_csv, verses):
    with pytest.raises(InputError, match="has no column 'book', 'chapter'"):
        read_chapters(str(reviews_csv), 4)
    with pytest.raises(InputError, match="has 12 chapters; at least 13"):
        read_chapters(verses, 13)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoder_script, "obtain", lambda *_: str(tmp_path / "none.csv"))
    assert main(["--output", str(tmp_path / "decoder")]) == 2
    assert capsys.readouterr().err == f"loraplus: there is no file or folder {tmp_path / 'none.csv'}\n"


def test_the_decoder_in_the_repository_is_small_and_speaks_in_verses():
    folder = ROOT / "examples" / "decoder"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    figures = json.loads((folder / "decoder.json").read_text())
    assert (model.dtype, model.num_parameters()) == (torch.float32, figures["parameters"])
    verse = torch.tensor([tokenizer("And it came to pass in those days, that he went out from the city.")["input_ids"]])
    other = verse[:, torch.randperm(verse.shape[1], generator=torch.Generator().manual_seed(0))]
    assert held_out_loss(model.eval(), verse) < figures["held_out_loss"] + 0.5 < held_out_loss(model, other)
    assert generate(model, tokenizer, ["And it came to"], chat=False, max_new_tokens=2) == [" pass,"]
