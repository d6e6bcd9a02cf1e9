"""The report in a real browser: from a disk, under its own policy, by keyboard, on a phone, in the dark, on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vl_classifier.evaluation.report import write_report
from tests.evaluation.sample import full_evaluation, make_evaluation, pictures, random_evaluation
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
    evaluations = {"plain": random_evaluation(threshold=0.42), "hostile": full_evaluation(), "single": one_class}
    return {
        name: write_report(evaluation, folder / name, examples=pictures(len(evaluation["predictions"])))
        for name, evaluation in evaluations.items()
    }


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
    assert [url for url in outside if not url.startswith("data:image/jpeg;base64,")] == []
    assert said == []


def counts(page) -> dict[str, int]:
    return {name: int(page.text_content(f"#{name}").replace(",", "")) for name in ("tp", "fp", "fn", "tn")}


def test_the_slider_starts_where_the_classifier_decides(visit):
    page, evaluation = visit("plain"), random_evaluation(threshold=0.42)
    assert page.is_visible("#controls")
    assert page.text_content("#threshold-now") == "0.420"
    (row,) = [row for row in evaluation["thresholds"] if row["threshold"] == 0.42]
    assert counts(page) == {name: row[name] for name in ("tp", "fp", "fn", "tn")}


def test_the_script_starts_with_the_numbers_that_the_page_already_shows(visit):
    names = ("tp", "fp", "fn", "tn", "accuracy", "precision", "recall", "f1", "cost", "threshold-now")
    with_script, without = visit("plain"), visit("plain", java_script_enabled=False)
    for name in names:
        assert without.text_content(f"#{name}") == with_script.text_content(f"#{name}"), name
    assert not without.is_visible("#controls")


def test_keys_move_the_slider_and_all_numbers_follow(visit):
    page, table = visit("plain"), random_evaluation(threshold=0.42)["thresholds"]
    page.focus("#threshold")
    start = int(page.input_value("#threshold"))
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    row = table[start + 30]
    assert counts(page) == {name: row[name] for name in ("tp", "fp", "fn", "tn")}
    assert page.text_content("#accuracy") == f"{100 * (row['tp'] + row['tn']) / 200:.1f} %"
    assert page.text_content("#precision") == f"{100 * row['tp'] / (row['tp'] + row['fp']):.1f} %"
    assert page.text_content("#recall") == f"{100 * row['tp'] / (row['tp'] + row['fn']):.1f} %"
    assert page.text_content("#f1") == f"{2 * row['tp'] / (2 * row['tp'] + row['fp'] + row['fn']):.3f}"
    assert page.get_attribute("#threshold", "aria-valuetext") == f"{row['threshold']:.3f}"
    assert f"{row['fn']} of class 1 missed, {row['fp']} false alarms" in page.text_content("#told")
    across = float(page.get_attribute("#on-roc", "cx"))
    assert across == pytest.approx(62 + 284 * row["fp"] / (row["fp"] + row["tn"]))


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
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"threshold", "cost-fn", "cost-fp", "to-cheapest", "to-stored"} <= set(reached)
    assert page.get_by_role("slider", name="Threshold").count() == 1
    assert page.get_by_role("spinbutton", name="Cost of a missed example").count() == 1
    assert page.get_by_role("img", name="ROC curve").count() == 1


def test_hostile_words_are_inert(visit):
    page = visit("hostile")
    assert page.title() == "Evaluation report"
    assert page.evaluate("document.querySelectorAll('script').length") == 2
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
    assert page.evaluate(SLIP_THROUGH) == "script-src-attr"
    assert page.title() == "Evaluation report"
    page.close()


@pytest.mark.parametrize("name", ["plain", "hostile", "single"])
def test_a_phone_shows_it_without_scrolling_sideways(visit, name):
    page = visit(name, **PHONE)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize(("scheme", "lightness"), [("light", range(240, 256)), ("dark", range(30))])
def test_it_follows_the_colour_scheme_with_enough_contrast(visit, scheme, lightness):
    page = visit("plain", color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(int(part) in lightness for part in re.findall(r"\d+", background))
    for selector in ("body", ".note", ".controls label", "td.right", "td.wrong", "thead th", "small"):
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
    assert not page.is_visible("#controls")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_pictures_are_decoded(visit):
    page = visit("plain")
    images = "[...document.querySelectorAll('details[open] img')]"
    page.evaluate(f"Promise.all({images}.map((image) => image.decode()))")
    shown = page.evaluate(f"{images}.map((image) => image.naturalWidth)")
    assert len(shown) == 20
    assert set(shown) == {48}
