"""The page in a real browser by keyboard, on a phone, in the dark, at rest, on paper and without scripts."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.serving.page.actions import BLUE, RED, SCORES, THREE, classify, digest, explain, upload, upload_two
from tests.serving.page.stub import model
from tests.waiting import until

PHONE = {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}


def test_everything_works_by_keyboard_alone(open_page, server):
    server.models, server.scores = THREE, SCORES
    page = open_page()
    upload_two(page)

    def go_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"{selector} shows no focus"
                return
        raise AssertionError(f"{selector} cannot be reached")

    go_to(".earlier")
    page.keyboard.press("Enter")
    assert page.locator(".file bdi").all_inner_texts() == ["blue.jpg", "red.png"]
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove blue.jpg"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove red.png"
    with page.expect_file_chooser():
        go_to("#choose")
        page.keyboard.press("Enter")
    go_to("#text")
    page.keyboard.type("There is a tower.")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".answer")).to_have_count(1)
    go_to("#model")
    page.keyboard.press("End")
    go_to("#classify")
    page.keyboard.press("Space")
    expect(page.locator(".answer")).to_have_count(3)
    assert page.evaluate("document.activeElement.id") == "classify"
    go_to(".answer button")
    page.keyboard.press("Enter")
    expect(page.locator(".words")).to_be_visible()
    go_to(".strength input")
    page.keyboard.press("Home")
    assert page.evaluate("getComputedStyle(document.querySelector('.map canvas')).opacity") == "0"
    go_to("#snippets summary")
    page.keyboard.press("Enter")
    go_to("#copy-python")
    go_to("#history li:last-child button")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_count(1)
    assert page.evaluate("document.activeElement.id") == "result"
    go_to("#clear")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "model", "nothing holds the focus"


def test_controls_have_names_and_answers_are_announced(open_page, server):
    server.models = THREE
    page = open_page()
    assert page.get_by_role("textbox", name="Text").count() == 1
    assert page.get_by_role("combobox", name="Classifier").count() == 1
    assert page.get_by_role("button", name="Classify").count() == 1
    assert page.get_by_role("region", name="Result").count() == 1
    nameless = """[...document.querySelectorAll("button, input:not([hidden]), select, textarea, a, summary")]
      .filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"""
    upload(page, ("red.png", RED, "image/png"))
    classify(page)
    explain(page)
    assert page.evaluate(nameless) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    assert page.get_attribute("#announcer", "role") == "status"
    assert page.get_attribute("#problem", "role") == "alert"


def test_a_phone_shows_everything_without_scrolling_sideways(open_page, server):
    server.models, server.scores = [*THREE, model("x" * 200, labels=("y" * 200, "z" * 200))], SCORES
    page = open_page(**PHONE)
    assert page.is_visible("#photograph")
    assert page.get_attribute("#camera", "capture") == "environment"
    upload(page, ("n" * 200 + ".png", RED, "image/png"), ("blue.jpg", BLUE, "image/jpeg"))
    classify(page, "w" * 150, which="")
    explain(page)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    heights = "[...document.querySelectorAll('button, select')].map((e) => e.offsetParent ? e.offsetHeight : 44)"
    assert min(page.evaluate(heights)) >= 44
    page.goto(page.url + "docs")
    assert page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize(("scheme", "lightness"), [("light", range(240, 256)), ("dark", range(40))])
def test_it_follows_the_colour_scheme(open_page, scheme, lightness):
    page = open_page(color_scheme=scheme)
    for selector in ("body", ".panel", "textarea"):
        colour = page.evaluate("(s) => getComputedStyle(document.querySelector(s)).backgroundColor", selector)
        assert all(int(part) in lightness for part in re.findall(r"\d+", colour)[:3]), selector


def test_nothing_moves_where_motion_is_not_wanted(open_page, server):
    server.refusals["/v1/models"] = [(503, {"error": {"code": "loading"}}, {})] * 50
    animation = "getComputedStyle(document.querySelector('#state'), '::before').animationName"
    assert open_page(state="loading", fails=[503]).evaluate(animation) == "turn"
    assert open_page(state="loading", fails=[503], reduced_motion="reduce").evaluate(animation) == "none"


def test_paper_shows_the_result_and_no_controls(open_page):
    page = open_page(color_scheme="dark")
    upload(page, ("red.png", RED, "image/png"))
    classify(page)
    explain(page)
    page.emulate_media(media="print")
    assert page.is_visible(".verdict")
    assert page.is_visible(".map")
    for hidden in ("#example", "#past", ".buttons", ".strength", "#snippets"):
        assert not page.locator(hidden).first.is_visible(), hidden
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_the_page_says_what_else_there_is(open_page):
    page = open_page(state=None, java_script_enabled=False)
    assert "This page needs JavaScript" in page.inner_text("noscript")


def test_requests_can_be_tried_on_the_page_of_the_interface(open_page, server):
    server.models = THREE
    page = open_page("docs", state=None, fails=[401, 404])
    form = page.locator("#try-post-v1-classify")
    expect(form.get_by_label("Body (JSON)")).to_have_value(re.compile('"model": "claims"'))
    server.key = "sesame"
    page.get_by_label("Key").fill("wrong")
    form.get_by_role("button", name="Send this request").click()
    expect(form.get_by_role("status")).to_contain_text("Status 401")
    page.get_by_label("Key").fill("sesame")
    form.get_by_role("button", name="Send this request").click()
    expect(form.get_by_role("status")).to_contain_text("Status 200")
    assert '"score": 0.873' in form.locator("pre").inner_text()
    form.get_by_label("Or a picture").set_input_files({"name": "red.png", "buffer": RED, "mimeType": "image/png"})
    form.get_by_label("Text of that form").fill("<b>It is red.</b>")
    form.get_by_role("button", name="Send this request").click()
    until(lambda: len(server.requests["classify"]) == 2, "the form")
    assert server.requests["classify"][1] == {"model": "claims", "text": "<b>It is red.</b>", "images": [digest(RED)]}
    models = page.locator("#try-get-v1-models-model")
    models.get_by_label("model").fill("a/b ?")
    models.get_by_role("button", name="Send this request").click()
    expect(models.get_by_role("status")).to_contain_text("Status 404")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_the_page_of_the_interface_needs_no_script(open_page):
    page = open_page("docs", state=None, java_script_enabled=False)
    page.get_by_role("link", name="POST /v1/classify").click()
    assert page.url.endswith("#post-v1-classify")
    assert page.locator("section[aria-labelledby=post-v1-classify]").is_visible()
    assert page.evaluate("1 + 1") == 2
