from __future__ import annotations

import pytest

from loraplus.bench.roofline import _attention, _products, floor_of


def operations(products):
    return sum(2 * count * rows * inner * columns for (rows, inner, columns), count in products.items())


def test_a_decoders_operations_are_those_counted_by_hand(decoder):
    model = decoder.model(dropout=False, lora_dropout=0.0)
    config = model.config
    tokens = round(decoder.tokens / decoder.steps)
    learnt = sum(label != -100 for row in decoder.rows(grouped=True) for label in row["labels"]) // decoder.steps
    d, heads = config.hidden_size, config.num_attention_heads
    kv = d // heads * config.num_key_value_heads
    shapes = [(d, d), (d, kv), (d, kv), (d, d)] + [(d, config.intermediate_size)] * 2 + [(config.intermediate_size, d)]
    r, total = 2, 0
    for layer in range(config.num_hidden_layers):
        for number, (inner, outer) in enumerate(shapes):
            to_input = 0 if layer == 0 and number < 3 else 1
            total += 2 * tokens * inner * outer * (1 + to_input)
            total += 2 * tokens * inner * r * (2 + to_input) + 2 * tokens * r * outer * 3
    total += 2 * learnt * d * config.vocab_size * 2
    assert operations(_products(decoder, model)) == total


def test_a_classifiers_last_layer_counts_texts_behind_its_keys_and_values(classifier):
    model = classifier.model(dropout=False, lora_dropout=0.0)
    texts = classifier.examples // classifier.steps
    tokens = round(classifier.tokens / classifier.steps)
    products = _products(classifier, model)
    width, between = model.config.hidden_size, model.config.intermediate_size
    assert products[(tokens, width, between)] == products[(texts, width, between)] == 2  # first and last layer
    widths = 12 * model.config.hidden_size / classifier.steps
    squares = sum(length**2 for length in classifier.lengths)
    assert _attention(classifier, model) == pytest.approx(widths * (squares + classifier.tokens))  # of two layers


def test_the_floor_is_a_time_at_measured_rates(decoder):
    floor = floor_of(decoder)
    products = operations(floor.products)
    assert floor.operations == products + floor.attention
    seconds = floor.turn()
    assert seconds >= floor.operations / floor.fastest * (1 - 1e-9)
