"""Small decoders: both starts, what a scale is to Adam, and the plan of `init`."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplus.files.single import write_csv
from loraplus.reproduce import small_decoders, small_tasks
from loraplus.reproduce.init import RULES, Init, scale_of
from loraplus.reproduce.small_tasks import Rows, SmallTask
from loraplus.reproduce.small_training import SmallAdapter, batches, build, train
from loraplus.reproduce.verses import train_tokenizer
from loraplus.steps.movement import adapted_layers
from loraplus.study.records import Record


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, use_cache=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("decoder")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def task(kind: str) -> SmallTask:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 32, (4 + i % 5,), generator=generator).tolist() for i in range(120)]
    rows = Rows(ids, [int(row[-1] > 16) for row in ids])
    part = Rows(rows.ids[:40], rows.targets[:40])
    return SmallTask(kind, 2 if kind == "classes" else 1, rows, part, part)


def outcome(folder, kind, adapter, lr, lr_ratio=1.0, steps=12, evaluations=3):
    model = build(folder, task(kind), adapter, seed=0)
    return train(
        model, task(kind), lr, lr_ratio, steps=steps, order=batches(task(kind).train.ids, 8, 0), evaluations=evaluations
    )


@pytest.mark.parametrize("kind", ["lm", "classes"])
def test_a_run_is_evaluated_at_equal_distances_and_learns(decoder, kind):
    found = outcome(decoder, kind, SmallAdapter(), 3e-2, steps=30)
    assert [point.step for point in found.curve] == [10, 20, 30]
    start = outcome(decoder, kind, SmallAdapter(), 1e-9, steps=30).curve[0].eval_loss
    assert found.values["eval_loss"] < start - 0.02
    assert found.values["test_loss"] == pytest.approx(found.values["eval_loss"])
    assert ("test_accuracy" in found.values) == (kind == "classes")


def test_a_loss_that_is_no_number_ends_the_run_with_an_infinite_one(decoder):
    model = build(decoder, task("lm"), SmallAdapter(), seed=0)
    model.get_output_embeddings().weight.data[3] = math.inf
    steps = []
    found = train(
        model,
        task("lm"),
        1e-2,
        1.0,
        steps=12,
        order=batches(task("lm").train.ids, 8, 0),
        evaluations=3,
        on_step=lambda step, _: steps.append(step),
    )
    assert found.status == "diverged" and found.values == {"eval_loss": math.inf} and not steps


def test_the_reverse_start_makes_a_zero_and_b_random_and_leaves_the_model_as_it_is(decoder):
    usual, reverse = (build(decoder, task("lm"), SmallAdapter(start=s), 0) for s in ("A-random", "B-random"))
    for layer in adapted_layers(reverse):
        a, b = layer.weights
        assert not a.any() and 0 < b.abs().max() <= 1 / math.sqrt(8)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.allclose(usual(input_ids=ids).logits, reverse(input_ids=ids).logits)


def test_the_scale_is_a_rate_of_the_factor_that_starts_at_zero(decoder):
    four = outcome(decoder, "lm", SmallAdapter(alpha=32), 1e-2).values["eval_loss"]
    assert outcome(decoder, "lm", SmallAdapter(alpha=8), 1e-2, 4.0).values["eval_loss"] == pytest.approx(four, abs=2e-4)
    assert abs(outcome(decoder, "lm", SmallAdapter(alpha=8), 1e-2).values["eval_loss"] - four) > 1e-2
    four = outcome(decoder, "lm", SmallAdapter(alpha=32, start="B-random"), 1e-2).values["eval_loss"]
    same = outcome(decoder, "lm", SmallAdapter(alpha=8, start="B-random"), 4e-2, 0.25).values["eval_loss"]
    assert same == pytest.approx(four, abs=2e-4)


def test_batches_cover_the_data_and_hold_examples_of_about_one_length():
    lengths = [2 + i % 20 for i in range(400)]
    rows = [[0] * length for length in lengths]
    order = batches(rows, 10, seed=0)
    first = [next(order) for _ in range(40)]
    assert sorted(i for batch in first for i in batch) == list(range(400))
    assert max(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first) < 6


def test_init_shares_the_runs_of_rules_that_agree_and_finds_the_optimum():
    assert [scale_of(rule, 8) for rule in RULES] == [1.0, 2.0, 2.0, 5.657]
    experiment, results = Init(ranks=(8,), seeds=2), {}
    assert len(experiment.columns()) == 2 * (3 + 1)
    while runs := experiment.next_runs(results):
        for run in runs:
            product = run["lr"] * math.sqrt(run["lr_ratio"] * run["scale"])
            loss = 2 + (math.log10(product / 5e-3)) ** 2 + 0.1 * (run["start"] == "B-random")
            results[run.key] = Record(run, "done", values={"eval_loss": loss, "test_loss": loss + run["seed"] / 1000})
    assert sum(result.trial["phase"] == "final" for result in results.values()) == 2 * 2 * 2  # starts, λ, seeds
    figures = experiment.figures(results)
    for row in figures["columns"]:
        assert row["optimum"] * math.sqrt(row["scale"]) == pytest.approx(5e-3, rel=0.02)
    report = experiment.report(results, figures)
    assert any("4 of 4 pairs" in sentence for sentence in report.verdict)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder with a few verses and snippets, which count as the real ones."""
    monkeypatch.setattr(small_decoders.assets, "obtain", lambda name, folder, say: folder / f"{name}.csv")
    tables = {
        "verses.csv": [{"book": "A", "chapter": i % 16, "text": f"verse {i} of the book"} for i in range(60)],
        "rated-snippets.csv": [
            {"domain": ("products", "movies")[i % 2], "rating": 1, "text": f"snippet {i} of them"} for i in range(4000)
        ],
    }
    for name, rows in tables.items():
        write_csv(tmp_path / name, rows)
    return tmp_path


def test_a_decoder_that_two_workers_need_is_pre_trained_once(data, monkeypatch):
    trained = []

    def fresh(width):
        trained.append(width)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=small_decoders.VOCABULARY, hidden_size=width, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=width, max_position_embeddings=64, pad_token_id=0,
        ))  # fmt: skip

    monkeypatch.setattr(small_decoders, "_fresh", fresh)
    monkeypatch.setattr(small_decoders, "STEPS", 20)
    with ThreadPoolExecutor(2) as workers:
        folders = list(workers.map(lambda _: small_decoders.obtain(data, 32), range(2)))
    assert folders == [small_decoders.folder_of(data, 32)] * 2 and trained == [32]
    assert {path.name for path in (data / "small-models").iterdir()} == {"tokenizer", "decoder-32"}


def test_every_decoder_reads_a_task_in_pieces_of_its_own(data, monkeypatch):
    tokenizer = small_decoders.tokenizer(data, 32)
    own = train_tokenizer(["snippet of them"] * 9, 300, 48)
    own.save_pretrained(small_decoders.folder_of(data, small_decoders.WIDEST))
    for width, pieces in ((32, tokenizer), (small_decoders.WIDEST, own)):
        task = small_tasks.load(data, "lm-movies", width)
        text = pieces.decode(task.train.ids[0], skip_special_tokens=True).strip()
        assert text.startswith("snippet ") and text.endswith(" of them"), text
        assert (task.train.ids[0][0], task.train.ids[0][-1]) == (pieces.bos_token_id, pieces.eos_token_id)
