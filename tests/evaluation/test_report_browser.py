"""The report in a real browser: from a disk, under its own policy, by keyboard, on a phone, in the dark, on paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vl_classifier.evaluation.report import render_comparison, render_report
from tests.evaluation.sample import HOSTILE, full_evaluation, make_evaluation, pictures, random_evaluation
from tests.evaluation.sample_comparison import make_comparison
from tests.waiting import LIMIT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = LIMIT * 1000  # milliseconds
PHONE = {"viewport": {"width": 360, "height": 740}}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no browser: {CHROMIUM} is missing (Debian's package chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    one_class = make_evaluation([1, 1, 1], [0.1, 0.5, 0.9])
    sliced = random_evaluation(
        texts=[f"A picture of a cat {row}" for row in range(4)],
        ids=[f"«{row}»\n" if row % 3 else None for row in range(200)],
    )
    for row in sliced["predictions"]:
        row["slices"] = [row["row"] % 2]
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    sliced["slices"] = [
        {"name": "parity", "value": value, "rows": 100, "positives": 40, "accuracy": share, "rest": 0.8}
        | {"p_value": 0.5, "worse": False}
        for value in ("even", "odd")
    ]
    evaluations = {
        "sliced": sliced,
        "plain": random_evaluation(threshold=0.42),
        "hostile": full_evaluation(),
        "single": one_class,
    }
    paths = {name: folder / f"{name}.html" for name in evaluations}
    for name, evaluation in evaluations.items():
        page = render_report(evaluation, examples=pictures(len(evaluation["predictions"])))
        paths[name].write_bytes(page.encode("utf-8", "replace"))
    paths["comparison"] = folder / "comparison.html"
    comparison = make_comparison(names=(HOSTILE[0], HOSTILE[2], "three"), texts=HOSTILE)
    paths["comparison"].write_bytes(render_comparison(comparison, examples=pictures(60)).encode("utf-8", "replace"))
    return paths


@pytest.fixture
def visit(browser, reports):
    """Open a report; afterwards, make sure that nothing was asked for, logged or thrown."""
    contexts, outside, said = [], [], []

    def opened(name: str, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        address = reports[name].as_uri()
        page.on("request", lambda request: outside.append(request.url) if request.url != address else None)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in outside if not url.startswith(("data:image/jpeg;base64,", "blob:null/"))] == []
    assert said == []


def counts(page) -> dict[str, int]:
    return {name: int(page.text_content(f"#{name}").replace(",", "")) for name in ("tp", "fp", "fn", "tn")}


def test_the_slider_starts_where_the_classifier_decides(visit):
    page, evaluation = visit("plain"), random_evaluation(threshold=0.42)
    assert page.is_visible("#threshold")
    assert page.text_content("#threshold-now") == "0.420"
    (row,) = [row for row in evaluation["thresholds"] if row["threshold"] == 0.42]
    assert counts(page) == {name: row[name] for name in ("tp", "fp", "fn", "tn")}


def test_the_script_starts_with_the_numbers_that_the_page_already_shows(visit):
    names = ("tp", "fp", "fn", "tn", "accuracy", "precision", "recall", "f1", "cost", "threshold-now")
    with_script, without = visit("plain"), visit("plain", java_script_enabled=False)
    for name in names:
        assert without.text_content(f"#{name}") == with_script.text_content(f"#{name}"), name
    for selector in ("#threshold", "#filters", "#show-more", "#viewer"):
        assert not without.is_visible(selector), selector
    assert without.locator("#cards img").first.is_visible()


def test_keys_move_the_slider_and_all_numbers_follow(visit):
    page, table = visit("plain"), random_evaluation(threshold=0.42)["thresholds"]
    page.focus("#threshold")
    start = [row["threshold"] for row in table].index(0.42)
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    row = table[start + 30]
    assert counts(page) == {name: row[name] for name in ("tp", "fp", "fn", "tn")}
    assert page.text_content("#accuracy") == f"{100 * (row['tp'] + row['tn']) / 200:.1f} %"
    assert page.text_content("#precision") == f"{100 * row['tp'] / (row['tp'] + row['fp']):.1f} %"
    assert page.text_content("#recall") == f"{100 * row['tp'] / (row['tp'] + row['fn']):.1f} %"
    assert page.text_content("#f1") == f"{2 * row['tp'] / (2 * row['tp'] + row['fp'] + row['fn']):.3f}"
    assert page.get_attribute("#threshold", "aria-valuetext") == f"{row['threshold']:.3f}"
    assert f"{row['fn']} missed, {row['fp']} false alarms" in page.text_content("#told")
    across = float(page.get_attribute("#on-roc", "cx"))
    assert across == pytest.approx(62 + 284 * row["fp"] / (row["fp"] + row["tn"]))
    assert page.get_attribute("#on-reliability", "transform") == f"translate({284 * row['threshold']:g} 0)"


def test_the_slider_lies_on_the_axis_of_the_histogram(visit):
    page = visit("plain")
    edges = random_evaluation(threshold=0.42)["curves"]["histogram"]["edges"]
    for share in (0.25, 0.8):
        slider = page.locator("#threshold")
        slider.click(position={"x": 8 + share * (slider.bounding_box()["width"] - 16), "y": 10})
        box = slider.bounding_box()
        threshold = float(page.text_content("#threshold-now"))
        assert threshold == pytest.approx(edges[0] + share * (edges[-1] - edges[0]), abs=0.01)
        line = page.locator("#on-histogram").bounding_box()
        assert line["x"] == pytest.approx(box["x"] + 8 + share * (box["width"] - 16), abs=4)


@pytest.mark.parametrize(("key", "answers"), [("Home", {"fn": 0, "tn": 0}), ("End", {"tp": 0, "fp": 0})])
def test_the_ends_of_the_slider_are_all_and_none(visit, key, answers):
    page = visit("plain")
    page.focus("#threshold")
    page.keyboard.press(key)
    assert {name: counts(page)[name] for name in answers} == answers
    assert not re.search(r"NaN|Infinity|undefined", page.inner_text("main"))


def test_costs_are_the_readers_and_the_lowest_is_found(visit):
    page, table = visit("plain"), random_evaluation(threshold=0.42)["thresholds"]
    page.fill("#cost-fn", "10")
    now = counts(page)
    assert page.text_content("#cost") == f"{10 * now['fn'] + now['fp']}"
    page.focus("#to-cheapest")
    page.keyboard.press("Enter")
    assert page.text_content("#cost") == f"{min(10 * row['fn'] + row['fp'] for row in table)}"
    page.focus("#to-stored")
    page.keyboard.press("Enter")
    assert page.text_content("#threshold-now") == "0.420"


@pytest.mark.parametrize("typed", ["", "-3"])
def test_costs_that_are_none_count_as_nothing(visit, typed):
    page = visit("plain")
    page.fill("#cost-fp", typed)
    assert page.text_content("#cost") == f"{counts(page)['fn']}"


def test_every_control_is_reached_by_tab_and_has_a_name(visit):
    page, reached = visit("plain"), []
    page.focus("body")
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"threshold", "cost-fn", "cost-fp", "to-cheapest", "to-stored"} <= set(reached)
    assert {"kind", "sort", "search", "export", "show-more"} <= set(reached)
    assert page.get_by_role("slider", name="Threshold").count() == 1
    assert page.get_by_role("spinbutton", name="Cost of a miss").count() == 1
    assert page.get_by_role("navigation", name="Contents").get_by_role("link").count() == 9
    assert page.get_by_role("img", name="ROC curve").count() == 1


def test_hostile_words_are_inert(visit):
    page = visit("hostile")
    assert page.title().endswith(" · evaluation report")
    assert page.evaluate("document.querySelectorAll('script').length") == 4
    page.select_option("#kind", "")
    while page.is_visible("#show-more"):
        page.click("#show-more")
    page.locator("button.pictures").first.click()
    assert page.evaluate("document.querySelectorAll('iframe, base, link, object, embed, form').length") == 0
    foreign = (
        "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => /^on/i.test(a.name)).length"
    )
    assert page.evaluate(foreign) == 0
    assert page.text_content(".lead") == "</script><img src=x onerror=document.title=1>"
    assert "49" not in page.text_content("h1")


# Put a picture that cannot be read in the page, and say what part of its policy was hurt.
SLIP_THROUGH = """() => new Promise((resolve) => {
  let hurt = "nothing";
  document.addEventListener("securitypolicyviolation", (event) => { hurt = event.effectiveDirective; });
  document.body.insertAdjacentHTML("beforeend", '<img src=data:, onerror="document.title=1">');
  document.body.lastElementChild.addEventListener("error", () => setTimeout(() => resolve(hurt)));
})"""


def test_the_policy_stops_what_would_slip_through(browser, reports):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(reports["plain"].as_uri())
    title = page.title()
    assert page.evaluate(SLIP_THROUGH) == "script-src-attr"
    assert page.title() == title != "1"
    page.close()


@pytest.mark.parametrize("name", ["plain", "hostile", "single", "comparison"])
def test_a_phone_shows_it_without_scrolling_sideways(visit, name):
    page = visit(name, **PHONE)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("button.pictures").first.click()
    assert page.evaluate("document.getElementById('viewer').scrollWidth") <= 360


@pytest.mark.parametrize(("scheme", "lightness"), [("light", range(240, 256)), ("dark", range(30))])
def test_it_follows_the_colour_scheme_with_enough_contrast(visit, scheme, lightness):
    page = visit("plain", color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(int(part) in lightness for part in re.findall(r"\d+", background))
    for selector in (
        "body",
        ".note",
        ".pair label",
        ".badge",
        ".tag",
        ".tiles dt",
        "td.right",
        "td.wrong",
        "thead th",
        "small",
    ):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    for selector in ("rect.one", "rect.zero", ".curve", ".axis"):
        assert page.evaluate(CONTRAST, selector) >= 3, selector


# Contrast of an element and what is behind it (Web Content Accessibility Guidelines 2.2, 1.4.3 and 1.4.11).
CONTRAST = """(selector) => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = parts(colour).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector), style = getComputedStyle(element);
  const drawn = element.ownerSVGElement ? (style.fill !== "none" ? style.fill : style.stroke) : style.color;
  let behind = element;
  const clear = (colour) => parts(colour)[3] === 0;
  while (clear(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const [low, high] = [luminance(drawn), luminance(getComputedStyle(behind).backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


def test_paper_shows_what_is_folded_and_no_controls(visit):
    page = visit("plain")
    folded = page.locator("details:not([open]) td").first
    assert not folded.is_visible()
    page.emulate_media(media="print")
    assert folded.is_visible()
    for selector in ("#threshold", "#filters", "#show-more", "nav"):
        assert not page.is_visible(selector), selector
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_pictures_are_decoded(visit):
    page = visit("plain")
    images = "[...document.querySelectorAll('#cards img')]"
    page.evaluate(f"Promise.all({images}.map((image) => image.decode()))")
    shown = page.evaluate(f"{images}.map((image) => image.naturalWidth)")
    assert len(shown) == 8
    assert set(shown) == {48}


def rows_of(page) -> list[int]:
    """Return the numbers of the rows that the gallery shows, after all of them were asked for."""
    while page.is_visible("#show-more"):
        page.click("#show-more")
    names = page.locator("#cards .named").all_text_contents()
    return [int(re.match(r"row (\d+)", name)[1]) for name in names]


def test_the_gallery_is_filtered_and_sorted(visit):
    page, evaluation = visit("plain"), random_evaluation(threshold=0.42)
    predictions = evaluation["predictions"]
    missed = [row["row"] for row in predictions if row["label"] and row["probability"] < 0.42]
    alarms = [row["row"] for row in predictions if not row["label"] and row["probability"] >= 0.42]
    found = rows_of(page)
    assert sorted(found) == sorted(missed + alarms)
    sure = [abs(predictions[row]["probability"] - predictions[row]["label"]) for row in found]
    assert sure == sorted(sure, reverse=True)
    page.select_option("#kind", "missed")
    page.select_option("#sort", "probability")
    assert rows_of(page) == sorted(missed, key=lambda row: predictions[row]["probability"])
    assert page.text_content("#found") == f"{len(missed)} rows"
    page.select_option("#sort", "row")
    assert rows_of(page) == sorted(missed)


def test_texts_and_slices_are_searched(visit):
    page = visit("sliced")
    page.select_option("#kind", "")
    every = rows_of(page)
    page.fill("#search", "  Picture of a CAT 1 ")
    assert rows_of(page) == [row for row in every if row % 4 == 1]
    page.fill("#search", "")
    page.select_option("#part", "slice-1")
    assert rows_of(page) == [row for row in every if row % 2]
    page.fill("#search", "nowhere")
    assert page.text_content("#found") == "No row matches."
    assert page.is_disabled("#export")


def test_row_ids_are_saved_as_filtered(visit):
    page = visit("sliced")
    page.select_option("#part", "slice-1")
    page.select_option("#sort", "row")
    rows = rows_of(page)
    with page.expect_download() as saved:
        page.click("#export")
    assert saved.value.suggested_filename == "rows.jsonl"
    lines = saved.value.path().read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"id": f"«{row}»\n"} if row % 3 else {"row": row} for row in rows]


def test_a_picture_is_enlarged_by_keyboard(visit):
    page = visit("plain")
    first, second = page.locator("#cards button.pictures").all()[:2]
    first.focus()
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog", name=re.compile(r"^Row \d+, 1 of \d+$"))
    assert viewer.is_visible()
    assert viewer.locator("img").bounding_box()["width"] > 1.5 * first.locator("img").bounding_box()["width"]
    page.keyboard.press("ArrowRight")
    assert page.text_content("#stage .named") == second.locator("xpath=..").locator(".named").text_content()
    page.get_by_role("button", name="Previous").click()
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    assert first.evaluate("(button) => document.activeElement === button")


def test_rows_that_differ_are_chosen_by_who_is_correct(visit):
    page = visit("comparison")
    differing = make_comparison(names=(HOSTILE[0], HOSTILE[2], "three"), texts=HOSTILE)["differing"]
    assert rows_of(page) == [row["row"] for row in differing]
    page.select_option("#correct", "correct-0")
    page.select_option("#wrong", "wrong-2")
    page.select_option("#label", "label-1")
    chosen = [row for row in differing if row["label"] == row["labels"][0] == 1 != row["labels"][2]]
    assert rows_of(page) == [row["row"] for row in chosen]
    assert page.locator("#cards .answers").first.locator("li").count() == 3
    assert page.evaluate("document.querySelectorAll('iframe, base, link, object, embed, form').length") == 0


def test_links_of_the_contents_lead_to_their_sections(visit):
    page = visit("plain")
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    page.get_by_role("link", name="Plots").click()
    assert page.locator("#plots").bounding_box()["y"] < 100
    assert page.locator("nav").bounding_box()["y"] >= 0  # it stays in sight
