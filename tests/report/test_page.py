"""The report: one offline file, escaped, whole."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from study.test_summary import record, study

from loraplus.report import render
from loraplus.report.page import p_value
from loraplus.report.plots import as_json, look
from loraplus.study.summary import summarise

EVIL = '</script><script>alert(1)</script><img src="x" onerror="alert(2)">'


def page(records=None, **facts):
    records = records or study(0.8)
    data = {
        "source": "reviews.csv", "text_column": "text", "label_column": "label", "labels": ["bad", "good"],
        "train_examples": 10, "validation_examples": 5, "test_examples": 5, "duplicates_removed": 3, "max_length": 16,
        "truncated_train_examples": 0, "split_seed": 0, "steps": 100, **facts,
    }  # fmt: skip
    summary = summarise(records, config={"model": facts.get("source", "m")}, data_facts=data)
    return summary, render(summary, records)


def without_library(html):
    """The page without plotly's own source."""
    return re.sub(r"<script>.{100000,}?</script>", "", html, flags=re.DOTALL)


def test_the_page_tells_verdict_rates_intervals_and_every_run():
    summary, html = page()
    text = without_library(html)
    assert summary["verdict"].replace("'", "&#39;").replace("+", "+") in text
    assert "3e-3" in text
    assert "1.6e-2" in text
    assert "3 texts removed" in text
    assert text.count("<tr><td>tuning") == 6
    assert "diverged" in text


def test_nothing_is_loaded_from_elsewhere():
    _, html = page()
    text = without_library(html)
    assert len(text) < 200_000 < len(html)
    assert not re.search(r"(src|href)\s*=", text)
    assert "@import" not in text
    assert "url(" not in text


def test_text_from_data_cannot_become_markup():
    _, html = page(source=EVIL, labels=[EVIL, "good"], text_column=EVIL)
    text = without_library(html)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_figures_are_valid_json_and_hold_every_tuning_run():
    _, html = page()
    curves, rates = re.search(r'\["curves", (\{.*?\})\], \["rates", (\{.*\})\]\]\) \{', html).groups()
    assert {trace["name"] for trace in json.loads(curves)["data"] if "name" in trace} == {
        "LoRA", "LoRA+", "LoRA, untuned", "LoRA+, untuned",
    }  # fmt: skip
    names = [trace["name"] for trace in json.loads(rates)["data"]]
    assert names == ["λ = 1", "LoRA", "best LoRA", "LoRA+", "best LoRA+", "diverged"]


def figure_of(html, name):
    return json.JSONDecoder().raw_decode(html.split(f'["{name}", ')[1])[0]


def test_a_dot_a_seed_stands_below_each_mean():
    summary, html = page(study(0.9, seeds=4))
    traces = figure_of(html, "seeds")["data"]
    dots = [trace for trace in traces if trace["marker"]["symbol"] == "circle-open"]
    assert [dot["name"] for dot in dots] == ["LoRA+, untuned", "LoRA+"]
    assert dots[1]["x"] == pytest.approx([100 * seed["accuracy_difference"] for seed in summary["paired"]["by_seed"]])
    assert dots[1]["customdata"] == [1, 2, 3, 4]
    mean, difference = traces[3], summary["paired"]["accuracy_difference"]
    assert mean["x"] == pytest.approx([100 * difference["mean"]])
    assert mean["error_x"]["array"] == pytest.approx([100 * (difference["high"] - difference["mean"])])


def test_one_seed_has_a_dot_and_no_interval():
    _, html = page(study(0.9, seeds=1))
    assert all("error_x" not in trace for trace in figure_of(html, "seeds")["data"])
    assert "There is no verdict with fewer than 3 seeds" in html and '<span class="p">no verdict</span>' in html
    assert "once in twenty" not in html


def test_the_page_shows_the_p_that_decides_and_what_describes():
    summary, html = page(study(0.9, seeds=5))
    paired, text = summary["paired"], unescape(html)
    assert f'<span class="p">{p_value(paired["p_value_holm"])}</span>' in text
    assert f'<span class="p">{p_value(summary["untuned"]["p_value"])}</span>' in text
    over_seeds, over_examples = p_value(paired["p_value_over_seeds"]), p_value(paired["over_examples"]["p_value"])
    assert f"deciding nothing: permutation test within seeds {over_seeds}" in text
    assert f"for these very models on new test examples {over_examples}" in text
    assert "the comparison at the best rates still finds something once in twenty times; the untuned" in text


def test_figure_data_cannot_end_the_script_it_stands_in():
    class Figure:
        def to_json(self):
            return json.dumps({"name": EVIL + "&"}, ensure_ascii=False)

    text = as_json(Figure())
    assert not set("<>&") & set(text) and json.loads(text) == {"name": EVIL + "&"}


def test_a_page_without_untuned_runs_is_whole():
    records = [r for r in study(0.8) if r.trial.phase != "untuned"]
    summary, html = page(records)
    assert "Untuned, at a usual rate" not in html
    assert "Untuned" not in summary["verdict"]


def test_a_page_whose_untuned_runs_diverged_is_whole():
    records = [r for r in study(0.8) if r.trial.phase != "untuned"]
    records += [record("untuned", arm, 3e-4, 1, 1, float("inf"), status="diverged") for arm in ("lora", "loraplus")]
    _, html = page(records)
    assert html.rstrip().endswith("</html>")


@pytest.mark.parametrize("seeds", [1, 2, 7])
def test_the_page_tells_how_many_seeds_there_were(seeds):
    _, html = page(study(0.8, seeds=seeds))
    assert f"with {seeds} seeds it cannot fall below" in html


@pytest.mark.parametrize("untuned", [None, {}, {"lora": None, "loraplus": None}])
def test_a_summary_may_lack_what_is_optional(untuned):
    summary, _ = page()
    paired = {k: v for k, v in summary["paired"].items() if not k.startswith("loss_p") and k != "diverged_seeds"}
    html = render({**summary, "untuned": untuned, "paired": paired, "config": {}}, study(0.8))
    assert "<h2>Untuned, at a usual rate" not in html
    bare = {k: v for k, v in summary.items() if k not in ("untuned", "config", "cost")}
    assert render(bare, study(0.8)).rstrip().endswith("</html>")


def test_the_page_forbids_itself_to_load_anything():
    _, html = page()
    assert """content="default-src 'none'; script-src 'unsafe-inline';""" in html


def test_class_counts_stand_beside_their_labels_escaped():
    _, html = page(labels=[EVIL, "good"], train_class_counts={EVIL: 7, "good": 3})
    text = without_library(html)
    assert "good (3)" in text
    assert "(7)" in text
    assert "<img" not in text


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "p < 0.001"), (0.0314, "p = 0.031"), (1.0, "p = 1.000"), (None, "p unknown"), (float("nan"), "p unknown")],
)
def test_a_p_value_is_never_told_as_zero(value, words):
    assert p_value(value) == words


def test_no_two_arms_look_the_same_however_many_there_are():
    assert len({look(place) for place in range(36)}) == 36
