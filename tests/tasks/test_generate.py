"""Text is what the model says, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from loraplus.errors import InputError
from loraplus.tasks.generate import generate, prompt_ids

from .causal import tiny_gpt2, tiny_llama, tiny_tokenizer

PROMPTS = ["the", "and it was so, and the evening", "darkness was upon the waters and the", "so"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(vocabulary=len(tokenizer))


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def any_model(request, tokenizer):
    return request.param(vocabulary=len(tokenizer))


def by_hand(model, ids: list[int], steps: int) -> list[int]:
    """Greedy, the whole text through the model for every token."""
    for _ in range(steps):
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, best]
        if best == model.config.eos_token_id:
            break
    return ids


def test_greedy_text_is_the_likeliest_token_each_time(model, tokenizer):
    ids = prompt_ids(tokenizer, PROMPTS[1], chat=False)
    expected = tokenizer.decode(by_hand(model, ids, 12)[len(ids) :], skip_special_tokens=True)
    assert generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=12, chat=False) == [expected]
    assert expected


@pytest.mark.parametrize("chat", [False, True])
def test_batched_is_one_by_one(any_model, tokenizer, chat):
    alone = [generate(any_model, tokenizer, [prompt], max_new_tokens=12, chat=chat)[0] for prompt in PROMPTS]
    assert generate(any_model, tokenizer, PROMPTS, max_new_tokens=12, chat=chat) == alone
    assert len(set(alone)) > 1


def test_each_prompt_is_continued_to_the_end_of_the_context_and_no_further(any_model, tokenizer):
    any_model.generation_config.eos_token_id = None
    no_end = tiny_tokenizer()
    no_end.eos_token = None
    texts = generate(any_model, no_end, PROMPTS, max_new_tokens=500, chat=False)
    any_model.generation_config.eos_token_id = 2
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = prompt_ids(tokenizer, prompt, chat=False)
        any_model.config.eos_token_id = None
        whole = by_hand(any_model, ids, 48 - len(ids))
        any_model.config.eos_token_id = 2
        assert text == tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)


def test_drawing_follows_the_seed_and_leaves_the_random_state_alone(model, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_a_tiny_top_p_is_greedy(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, top_p=1e-6) == greedy


def test_the_models_own_generation_settings_do_not_come_in(model, tokenizer):
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=3)
    try:
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain
    finally:
        model.generation_config.update(repetition_penalty=1.0, do_sample=False, top_k=None)


def test_training_mode_comes_back(model, tokenizer):
    model.train()
    generate(model, tokenizer, ["the"], max_new_tokens=1)
    assert model.training
    model.eval()


def test_pieces_add_up_to_the_text(model, tokenizer):
    pieces: list[str] = []
    text = generate(model, tokenizer, ["the light"], max_new_tokens=20, chat=False, on_text=pieces.append)[0]
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_a_text_is_the_users_turn_where_there_is_a_template(model, tokenizer):
    ids = prompt_ids(tokenizer, "the light", system="be good")
    assert tokenizer.decode(ids) == "<s><|system|>be good</s><|user|>the light</s><|assistant|>"
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)).count("</s>") == 3
    assert tokenizer.decode(prompt_ids(tokenizer, "the light", chat=False)) == "<s>the light"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        (["  "], {}, "a prompt is empty"),
        (["the " * 80], {"chat": False}, r"prompt 1 has \d+ tokens, and the model takes 48"),
        (["the"], {"chat": False, "system": "x"}, "a system message needs a chat"),
        ([[{"role": "user", "content": "a"}]], {"chat": False}, "list of messages"),
        ([[{"content": "a"}]], {}, "the chat template refuses"),
        (["the"], {"temperature": -1.0}, "temperature"),
        (["the"], {"top_p": 0.0}, "top_p"),
        (["the"], {"max_new_tokens": 0}, "max_new_tokens"),
        (["a"], {"seed": 2**64}, "seed must lie between 0 and"),
        (["a"], {"seed": -1}, "seed must lie between 0 and"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, tokenizer, prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(model, tokenizer, prompts, **options)


def test_a_chat_needs_a_template(model, tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = None
    assert prompt_ids(bare, "the") == prompt_ids(tokenizer, "the", chat=False)
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(bare, "the", chat=True)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_a_token_number_that_no_model_has_is_one_line(tokenizer, name):
    model = tiny_llama(vocabulary=len(tokenizer))
    setattr(model.generation_config, name, 10**23)
    with pytest.raises(InputError):
        generate(model, tokenizer, ["the"], max_new_tokens=1)
