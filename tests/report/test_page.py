"""The report: one offline file, escaped, whole."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import asdict, replace
from html import unescape
from xml.etree import ElementTree

import pytest
from study.test_summary import record, study

from loraplus.report import render
from loraplus.report.chart import Axis, Chart, Series
from loraplus.report.plots import differences, look
from loraplus.report.svg import draw
from loraplus.study.summary import summarise
from loraplus.study.wording import in_seeds, p_value
from loraplus.tasks.config import CompareConfig

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


def test_the_page_tells_verdict_rates_intervals_and_every_run():
    summary, html = page()
    text = html
    assert summary["verdict"].replace("'", "&#39;").replace("+", "+") in text
    assert "3e-3" in text
    assert "1.6e-2" in text
    assert "3 texts removed" in text
    assert text.count("<tr><td>tuning") == 6
    assert "diverged" in text


def test_nothing_is_loaded_from_elsewhere():
    _, text = page()
    assert len(text) < 200_000
    assert not re.search(r"(src|href)\s*=", text)
    assert "@import" not in text
    assert "url(" not in text


def test_text_from_data_cannot_become_markup():
    _, html = page(source=EVIL, labels=[EVIL, "good"], text_column=EVIL)
    text = html
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text


def table_of(html, name):
    """Rows of the table of a chart or part of the page, heads first, as text."""
    table = html.split(f'data-name="{name}"', 1)[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    return [[unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]


def test_charts_have_a_label_and_a_table_of_all_that_they_show():
    _, html = page()
    assert re.findall(r'role="img" aria-label="([^"]*?):', html) == [
        "Differences to LoRA, seed by seed", "Learning curves", "Learning curves", "Rates tried",
    ]  # fmt: skip
    rates = table_of(html, "Rates tried")
    assert rates[0] == ["arm", "seed", "η_A", "η_B", "λ", "validation loss"]
    assert [row[0] for row in rates[1:]] == ["LoRA"] * 3 + ["LoRA+"] * 3 and "diverged" in [row[-1] for row in rates]
    curves = table_of(html, "Learning curves")
    assert {row[0] for row in curves[1:]} == {"LoRA", "LoRA+", "LoRA, untuned", "LoRA+, untuned"}
    assert curves[0][2:4] == ["step", "seconds"]


def test_a_circle_a_seed_stands_below_each_mean():
    summary, _ = page(study(0.9, seeds=4))
    pairs = {"LoRA+": ("loraplus", summary["paired"]), "LoRA+, untuned": ("loraplus", summary["untuned"])}
    chart = differences(pairs, "accuracy")
    of_seeds = [one for one in chart.series if one.hollow]
    assert [one.name for one in of_seeds] == ["LoRA+, untuned", "LoRA+"]
    values = [100 * seed["accuracy_difference"] for seed in summary["paired"]["by_seed"]]
    assert of_seeds[1].x == pytest.approx(values)
    assert [told.split(":")[0] for told in of_seeds[1].told] == [f"LoRA+, seed {seed}" for seed in (1, 2, 3, 4)]
    mean, difference = chart.series[-1], summary["paired"]["accuracy_difference"]
    assert mean.x == pytest.approx([100 * difference["mean"]])
    assert mean.bars == [pytest.approx((100 * difference["low"], 100 * difference["high"]))]


def test_one_seed_has_a_circle_and_no_interval():
    summary, html = page(study(0.9, seeds=1))
    chart = differences({"LoRA+": ("loraplus", summary["paired"])}, "accuracy")
    assert not any(one.bars for one in chart.series) and "<h1>No verdict with so few seeds</h1>" in html
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


def test_what_a_chart_says_cannot_become_markup():
    series = [Series(EVIL, [1, 2], [1, 2], marker="star", told=[EVIL] * 2, labels=[EVIL] * 2)] * 2
    text = draw(Chart(EVIL, Axis(EVIL), Axis(EVIL, names={1: EVIL}), series, [EVIL], [[EVIL]]))
    assert "<script" not in text and "<img" not in text and text.count("&lt;script&gt;") > 5
    assert ElementTree.fromstring(text).get("aria-label", "").startswith(EVIL)


def test_a_chart_leaves_out_what_no_place_is_for():
    series = Series("a", [1, 0, -1, 10, math.nan], [1, 1, 1, math.inf, 1], marker="circle", told=list("abcde"))
    text = draw(Chart("t", Axis("x", log=True), Axis("y"), [series], [], []))
    assert re.findall('data-tip="(.)"', text) == ["a"]


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [1e-12, 1e12], [-3.0, 4.0]])
@pytest.mark.parametrize("log", [False, True])
def test_a_chart_of_any_numbers_is_drawn(values, log):
    series = Series("a", values, values, marker="diamond", line="solid", low=values, high=values)
    text = draw(Chart("t", Axis("x", log=log), Axis("y", log=log), [series], [], []))
    assert "nan" not in text and "inf" not in text and ElementTree.fromstring(text) is not None


def test_the_headline_is_a_few_words():
    assert "<h1>LoRA+ ahead by 10.1 points</h1>" in page(study(0.9, seeds=5))[1]
    assert "<h1>No difference found</h1>" in page(study(0.8))[1]


def test_the_command_that_made_it_can_be_copied_and_gives_the_same_settings():
    config = CompareConfig(model="a model; rm", data=f"{EVIL}\x1b[31m.csv", output="o", seeds=3, speed_up=False)
    summary, _ = page()
    html = render({**summary, "config": asdict(config)}, study(0.8))
    (line,) = re.findall("<pre><code>(.*?)</code></pre>", html)
    words = shlex.split(unescape(line))
    assert words[:4] == ["loraplus", "compare", "--model", "a model; rm"]
    assert words[-2:] == ["--seeds", "3"] and "--no-speed-up" in words and "\x1b" not in html


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
    assert f"with {in_seeds(seeds)} it cannot fall below" in html


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
    text = html
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


def test_where_nothing_was_learnt_no_difference_is_drawn():
    by_chance = {"chance_p": 0.6, "macro_f1": 0.4, "majority_share": 0.7}
    _, told = page()
    summary, html = page([replace(record, values=by_chance) for record in study(0.8)])
    assert "loraplus" in summary["learning"]["nothing"] and "<h1>Nothing was learnt</h1>" in html
    for words in ("Seed by seed", "Student's t over one difference", "The p beside a difference"):
        assert words in told and words not in html
