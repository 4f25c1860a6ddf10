"""Reports as a browser shows them: nothing fails, nothing is asked for or cut off; tables and charts answer."""

from __future__ import annotations

import csv
import threading
from pathlib import Path

import pytest
from report.test_live import tuning
from report.test_page import EVIL
from report.test_page import page as comparison
from report.test_scored import page_of
from report.test_training import METRICS
from study.test_summary import study

from loraplus.files.single import write_csv, write_json, write_yaml
from loraplus.report.live import study_page
from loraplus.report.serve import server
from loraplus.report.training import write_report
from loraplus.reproduce.command import Options, redraw
from loraplus.study.runner import Event

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduce"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    _, html = comparison(study(0.9, seeds=5), source=EVIL, labels=[EVIL, "=cmd|' /C calc'!A0"])
    (folder / "compare.html").write_text(html)
    run = folder / "run"
    run.mkdir()
    config = {"task": "sft", "model": EVIL, "data": "d", "output": "o", "lr": 1e-3, "lr_ratio": 4.0}
    write_yaml(run / "config.yaml", config)
    write_json(run / "metrics.json", METRICS)
    losses = [{"step": step, "train_loss": 3 / step, "eval_loss": 4 / step} for step in range(1, 12)]
    write_csv(run / "curves.csv", losses)
    sample = {"source": "d, line 1", "prompt": EVIL * 3, "reference": EVIL, "base": "a" * 400, "adapted": "=1+1\n" * 9}
    write_json(run / "samples.json", [sample])
    redraw(Options(name="coordinates", output=str(folder / "experiment")), RESULTS / "coordinates")
    (folder / "scored").mkdir()
    mistake = {"text": "=1+1\n" * 9, "truth": EVIL, "prediction": "@SUM(A1)", "probability": 0.9}
    page_of(folder / "scored", "classification", mistakes=[mistake])
    return {
        "compare": folder / "compare.html",
        "train": write_report(run),
        "scored": folder / "scored" / "report.html",
        "experiment": folder / "experiment" / "index.html",
    }


@pytest.mark.parametrize("name", ["compare", "train", "scored", "experiment"])
@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1280, False), (1280, True)])
def test_a_page_is_whole_quiet_and_not_cut_off(pages, visit, name, width, dark):
    seen = visit(pages[name], width, dark=dark)
    seen.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    seen.keep(f"{name} {width} {'dark' if dark else 'light'}")
    assert not seen.errors and not seen.requests and not seen.cut_off()
    assert pages[name].stat().st_size < 1_500_000
    shown = seen.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shown.removeprefix("rgb(").removesuffix(")").split(","))) < 200) is dark
    for chart in seen.page.locator("svg").all():
        assert chart.get_attribute("role") == "img" and chart.get_attribute("aria-label")


def colour(seen, what):
    return seen.page.locator(what).first.evaluate("part => getComputedStyle(part).fill")


def test_charts_have_colours_of_their_own_in_the_dark(pages, visit):
    light, dark = (visit(pages["compare"], dark=dark) for dark in (False, True))
    for part in ("svg .label", "svg [data-tip] polygon"):
        assert colour(light, part) != colour(dark, part)


def column(seen, table, place):
    return seen.page.locator(f"{table} tbody tr:visible td:nth-child({place})").all_inner_texts()


def test_a_table_sorts_by_what_is_clicked_numbers_as_numbers(pages, visit):
    seen = visit(pages["compare"])
    seen.page.get_by_text("All runs").click()
    table = '[data-name="Runs"]'
    head = seen.page.locator(f"{table} th").nth(2)
    head.click()
    rates = [float(text) for text in column(seen, table, 3)]
    assert rates == sorted(rates) and rates[0] != rates[-1] and head.get_attribute("aria-sort") == "ascending"
    seen.page.locator(f"{table} th button").nth(2).press("Enter")
    assert [float(text) for text in column(seen, table, 3)] == sorted(rates, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    seen.page.locator(f"{table} th").nth(6).click()
    assert column(seen, table, 7)[-1] in ("diverged", "–")


def test_a_table_is_filtered_and_what_is_shown_is_downloaded(pages, visit, tmp_path):
    seen = visit(pages["compare"])
    seen.page.get_by_text("All runs").click()
    table = seen.page.locator('[data-name="Runs"]')
    every = len(column(seen, '[data-name="Runs"]', 1))
    table.get_by_role("searchbox").fill("final LoRA+")
    left = column(seen, '[data-name="Runs"]', 2)
    assert left == ["LoRA+"] * 5 and every > 5 and f"5 of {every}" in table.inner_text()
    with seen.page.expect_download() as download:
        table.get_by_role("button", name="CSV").click()
    assert download.value.suggested_filename == "runs.csv"
    download.value.save_as(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["phase", "arm"] and len(rows) == 6 and {len(row) for row in rows} == {9}
    assert not seen.errors and not seen.requests


def test_a_download_holds_no_formula(pages, visit, tmp_path):
    seen = visit(pages["scored"])
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Download as CSV: Mistakes").click()
    download.value.save_as(tmp_path / "mistakes.csv")
    with (tmp_path / "mistakes.csv").open(newline="", encoding="utf-8-sig") as file:
        (_, row) = csv.reader(file)
    assert row[0].startswith("'=1+1") and row[1] == EVIL and row[2] == "'@SUM(A1)"


def test_a_sample_is_a_list_of_who_says_what(pages, visit):
    sample = visit(pages["train"]).page.locator(".sample")
    assert sample.locator("dt").all_inner_texts() == ["prompt", "the data says", "base model", "adapted"]
    said = sample.locator("dd").all_inner_texts()
    assert said[1] == EVIL and said[2] == "a" * 400 and said[3].startswith("=1+1")


def ends(chart):
    """First and last label of the x axis."""
    values = [float(text) for text in chart.locator(".ticks-x text").all_text_contents()]
    return values[0], values[-1]


def test_a_chart_is_zoomed_by_dragging_and_shows_all_again(pages, visit):
    seen = visit(pages["train"])
    chart = seen.page.locator("svg.chart").first
    left, top, width, height = map(float, chart.get_attribute("data-box").split())
    box, whole = chart.bounding_box(), ends(chart)
    scale, drawn = box["width"] / 480, chart.locator(".ticks-x").inner_html()

    def point(across, down):
        return box["x"] + scale * (left + across * width), box["y"] + scale * (top + down * height)

    def size():
        return chart.locator(".mark").nth(5).locator("circle").first.bounding_box()["width"]

    mark = size()
    seen.page.mouse.move(*point(0.25, 0.5))
    seen.page.mouse.down()
    seen.page.mouse.move(*point(0.5, 0.502), steps=4)
    assert chart.locator(".brush").count() == 1
    seen.page.mouse.up()
    shown = ends(chart)
    assert whole[0] < shown[0] < shown[1] < (whole[0] + whole[1]) * 0.6 and chart.locator(".brush").count() == 0
    assert size() == pytest.approx(mark, rel=0.02)
    # A point that the zoom has moved still tells what it is, where it is now.
    middle = chart.locator("[data-tip*='at step 4']").first.bounding_box()
    seen.page.mouse.move(middle["x"] + middle["width"] / 2, middle["y"] + middle["height"] / 2)
    assert "loss" in seen.page.locator(".tip").inner_text() and "at step 4" in seen.page.locator(".tip").inner_text()
    seen.keep("zoomed")
    seen.page.mouse.dblclick(*point(0.9, 0.2))
    assert chart.locator(".ticks-x").inner_html() == drawn
    assert not seen.errors and not seen.requests


def test_a_chart_is_zoomed_by_keys_and_buttons_and_names_stand_still(pages, visit):
    seen = visit(pages["compare"])
    charts = seen.page.locator("svg.chart")
    for place in range(charts.count()):
        chart, bar = charts.nth(place), seen.page.locator(".bar.zoom").nth(place)
        drawn = [chart.locator(f".ticks-{axis}").inner_html() for axis in "xy"]
        back = bar.get_by_role("button", name="Show all")
        assert back.is_hidden()
        bar.get_by_role("button", name="Zoom in").click()
        zoomed = [chart.locator(f".ticks-{axis}").inner_html() for axis in "xy"]
        assert zoomed[0] != drawn[0] and (zoomed[1] == drawn[1]) == ("names" in chart.get_attribute("data-y"))
        chart.press("ArrowRight")
        assert chart.locator(".ticks-x").inner_html() != zoomed[0]
        chart.press("Escape")
        assert [chart.locator(f".ticks-{axis}").inner_html() for axis in "xy"] == drawn and back.is_hidden()
        for _ in range(30):
            chart.press("+")
        assert all(word not in chart.inner_html() for word in ("NaN", "Infinity"))
        back.click()
        chart.press("-")  # there is no more to see
        assert [chart.locator(f".ticks-{axis}").inner_html() for axis in "xy"] == drawn
    assert not seen.errors


def test_a_chart_tells_what_is_pointed_at_and_its_table_has_it_all(pages, visit):
    seen = visit(pages["compare"])
    seen.page.locator("svg").nth(1).locator("[data-tip]").first.hover(force=True)
    told = seen.page.locator(".tip").inner_text().splitlines()
    assert len(told) > 1 and all("validation loss" in line for line in told)
    seen.page.mouse.move(1, 1)
    assert seen.page.locator(".tip").is_hidden()
    for name in ("Learning curves", "Rates tried", "Differences to LoRA, seed by seed"):
        seen.page.get_by_text(f"{name}: the numbers").click()
        assert seen.page.locator(f'[data-name="{name}"] tbody tr').count() > 1


def test_no_flag_or_rate_in_a_sentence_is_broken_at_a_hyphen(pages, tmp_path, visit):
    assert "1e-3" in visit(pages["train"]).page.locator(".verdict .whole").all_inner_texts()
    _, html = comparison(study(0.9, seeds=2))
    (tmp_path / "few.html").write_text(html)
    seen = visit(tmp_path / "few.html", 375)
    verdict = seen.page.locator(".verdict")
    assert verdict.locator(".whole").all_inner_texts() == ["--seeds"]
    seen.page.evaluate("document.querySelector('.verdict').style.width = '8rem'")
    assert verdict.locator(".whole").evaluate("part => part.getClientRects().length") == 1
    assert verdict.inner_text() in " ".join(html.split()).replace("&#39;", "'")


def test_the_command_is_copied(pages, visit):
    seen = visit(pages["train"])
    seen.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    seen.page.get_by_role("button", name="Copy").click()
    seen.page.get_by_text("Copied").wait_for()
    copied = seen.page.evaluate("() => navigator.clipboard.readText()")
    assert copied == seen.page.locator(".command code").inner_text() and copied.startswith("loraplus train --task sft")


def test_without_scripts_everything_is_there(pages, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["compare"].as_uri())
    assert page.locator("svg").count() == 4 and page.locator('[data-name="Arms"] tbody tr').count() == 2
    context.close()


def test_a_page_that_is_watched_works_as_the_file_does(pages, visit):
    with server(pages["experiment"].parent, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        seen = visit(f"http://127.0.0.1:{serving.server_address[1]}/")
        assert seen.page.locator("svg").count() > 0 and seen.page.get_by_role("searchbox").count() > 0
        with seen.page.expect_download():
            seen.page.get_by_role("button", name="CSV").first.click()
        assert not seen.errors and not seen.requests
        serving.shutdown()


def test_a_live_page_reloads_until_someone_works_on_it(tmp_path, visit):
    runs = [tuning(1e-4, 20, 0.7), tuning(1e-3, 20, 0.6)]
    settings = {"task": "classification", "data": "d", "model": "m", "output": "o"}
    path = tmp_path / "report.html"
    path.write_text(study_page("tune", settings)(Event("finished", 0.5, 4, records={r.trial.key: r for r in runs})))
    page = visit(path, 1280).page
    page.clock.install()
    page.reload()
    marked = "() => document.body.dataset.marked"
    page.evaluate("document.body.dataset.marked = 'yes'")
    with page.expect_event("load"):
        page.clock.run_for(6_000)
    assert page.evaluate(marked) is None and page.locator("#paused").is_hidden()
    page.evaluate("document.body.dataset.marked = 'yes'")
    page.locator("svg").first.click()
    page.clock.run_for(20_000)
    assert page.evaluate(marked) == "yes" and page.locator("#paused").is_visible()
