"""What can go wrong, in a real browser: hostile words, refusals, servers that come and go, keys."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from qwen_vl_classifier.config.serve import API_KEY_VARIABLE
from tests.serving.page.actions import RED, THREE, answers, classify, explain, upload
from tests.serving.page.stub import MILLISECONDS, model
from tests.waiting import until

HOSTILE = "</option></script><img src=x onerror=document.title=1>\u202e{{7*7}}<b>&amp;"


def test_hostile_names_and_texts_are_shown_as_text(open_page, server):
    server.models = [model(HOSTILE, labels=(HOSTILE, HOSTILE)), model("other")]
    page = open_page()
    upload(page, (HOSTILE.replace("/", "_") + ".png", RED, "image/png"))
    classify(page, HOSTILE, which=HOSTILE)
    explain(page)
    classify(page, HOSTILE + " bad item", which="")
    assert HOSTILE in page.text_content("#answers")
    server.refuse("/v1/classify", 400, "invalid", HOSTILE)
    page = open_page(fails=[400])
    classify(page, HOSTILE)
    assert HOSTILE in page.text_content("#problem")
    for opened in page.context.browser.contexts:
        (shown,) = opened.pages
        assert shown.title() == "qwen-vl-classifier"
        assert shown.evaluate("document.querySelectorAll('script').length") == 1
        strange = "iframe, base, object, embed, img[src=x], b:not(.value b, .about b)"
        assert shown.evaluate("(s) => document.querySelectorAll(s).length", strange) == 0
        names = "[...document.querySelectorAll('*')].flatMap((element) => element.getAttributeNames())"
        assert [name for name in shown.evaluate(names) if name.startswith("on")] == []


def test_the_policy_stops_what_would_slip_through(browser, server, address):
    context = browser.new_context()
    context.set_default_timeout(MILLISECONDS)
    page = context.new_page()
    page.goto(address)
    page.evaluate("""() => {
      window.stopped = [];
      document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
    }""")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"document.title=1\">')")
    page.evaluate("""() => {
      document.body.append(Object.assign(document.createElement("script"), { textContent: "document.title = 2" }));
    }""")
    page.wait_for_function("stopped.includes('script-src-attr') && stopped.includes('script-src-elem')")
    assert page.title() == "qwen-vl-classifier"
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', (error) => error.name)") == "TypeError"
    context.close()


def test_an_error_of_the_example_stands_in_its_place(open_page, server):
    server.models = THREE[:2]
    page = open_page()
    classify(page, "a bad item", which="")
    assert answers(page) == [f"{name} version 0123456789ab cannot be read" for name in ("claims", "receipts")]
    assert page.inner_text(".compared") == "2 classifiers: 2 without an answer."
    assert "2 without an answer" in page.inner_text("#history")


def test_overload_is_reported_and_tried_again(open_page, server):
    server.refuse("/v1/classify", 429, "queue_full", "too much waits", Retry_After="2")
    page = open_page(fails=[429])
    classify(page, "kept")
    assert "overloaded (429) and asks to wait 2 seconds" in page.inner_text("#problem")
    assert page.input_value("#text") == "kept"
    page.click("#problem button")
    expect(page.locator(".answer")).to_have_count(1)
    assert not page.is_visible("#problem")


def test_problems_are_said_in_words(open_page, server):
    page = open_page(fails=[400, 413, 500, 502, 504])
    for status, content, shown in (
        (400, {"detail": "input.0.text is blank; expected words"}, "refused the request (400): input.0.text is blank"),
        (413, {"detail": "the body has too many bytes"}, "refused the request (413): the body has too many bytes"),
        (500, "not an object", "answered with an error (500)"),
        (502, ["<html>"], "answered with an error (502)"),
        (504, {"detail": "late"}, "did not answer in time"),
        (200, "none", "does not understand the answer"),
        (200, {"data": [{"model": "unknown", "score": 1}]}, "does not understand the answer"),
        (200, {"nothing": 1}, "does not understand the answer"),
        (200, {"data": []}, "does not understand the answer"),
    ):
        server.refusals["/v1/classify"] = [(status, content, {})]
        classify(page)
        assert shown in page.inner_text("#problem")
    page.click("#problem button")
    expect(page.locator(".answer")).to_have_count(1)


def test_loading_is_said_and_the_page_goes_on_by_itself(open_page, server):
    server.refuse("/v1/models", 503, "loading", "the server is loading", Retry_After="1")
    page = open_page(state="loading", fails=[503], still=True)
    assert "loading its classifiers" in page.inner_text("#notice")
    page.clock.run_for(2000)
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier")
    assert not page.is_visible("#notice")


def test_a_request_that_is_too_early_is_explained_or_served(open_page, server):
    server.refusals["/v1/models"] = [(503, {"error": {"code": "loading"}}, {})] * 2
    page = open_page(state="loading", fails=[503], still=True)
    page.fill("#text", "early")
    page.click("#classify")
    until(lambda: page.clock.run_for(50) or "loading its classifiers" in page.text_content("#announcer"))
    assert "classify" not in server.requests
    page.click("#classify")
    expect(page.locator(".answer")).to_have_count(1)


def test_shutting_down_and_a_server_that_failed_are_reported(open_page, server):
    page = open_page(fails=[503], still=True)
    server.refuse("/v1/classify", 503, "draining", "the server is shutting down")
    classify(page)
    assert page.inner_text("#state") == "Shutting down"
    assert "finishes the requests that it has accepted" in page.inner_text("#notice")
    server.refuse("/v1/models", 503, "failed", "no classifiers")
    page.click("#notice button")
    expect(page.locator("#state")).to_have_text("Failed")
    assert "its log says why" in page.inner_text("#notice")
    page.click("#notice button")
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier")


def test_a_server_that_is_gone_is_said_and_comes_back(open_page):
    page = open_page(fails=["ERR_"], still=True)
    page.context.set_offline(True)
    classify(page, "kept")
    assert "cannot be reached" in page.inner_text("#problem")
    assert page.inner_text("#state") == "Not reachable"
    page.context.set_offline(False)
    page.clock.run_for(5000)
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier")
    page.click("#problem button")
    expect(page.locator(".answer")).to_have_count(1)


def test_a_request_can_be_given_up(open_page, server):
    server.gate.clear()
    page = open_page()
    page.fill("#text", "slow")
    page.click("#classify")
    expect(page.locator("#cancel")).to_be_visible()
    page.keyboard.press("Control+Enter")
    page.click("#cancel")
    expect(page.locator("#busy")).to_be_hidden()
    server.gate.set()
    assert page.evaluate("document.activeElement.id") == "classify"
    assert len(server.requests["classify"]) == 1
    assert not page.is_visible("#problem")
    classify(page)
    assert len(answers(page)) == 1


def test_an_explanation_that_is_refused_can_be_tried_again(open_page, server):
    server.refuse("/v1/explain", 429, "queue_full", "too much waits", Retry_After="3")
    page = open_page(fails=[429])
    classify(page)
    page.click(".answer button")
    expect(page.locator(".answer .notice")).to_contain_text("asks to wait 3 seconds")
    server.refusals["/v1/explain"] = [(200, {"words": 1}, {})]
    page.click(".answer button")
    expect(page.locator(".answer .notice")).to_contain_text("does not understand the answer")
    explain(page)
    assert not page.is_visible(".answer .notice")
    assert "There is no picture" in page.inner_text(".reasons")


def test_a_key_opens_the_page_and_a_lost_one_is_reported(open_page, server, address):
    server.key = "open sesame"
    credentials = {"username": "anyone", "password": server.key}
    page = open_page(http_credentials=credentials, fails=[401])
    classify(page)
    assert len(answers(page)) == 1
    server.refuse("/v1/classify", 401, "invalid_api_key", "no valid key")
    classify(page)
    assert page.inner_text("#state") == "Key needed"
    assert "asks for a key" in page.inner_text("#notice")
    page.click("#notice button")
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier")


def test_an_address_that_holds_the_key_works_and_is_not_copied(open_page, stub, server, address):
    app, server.key = stub[2], "sesame"
    app.state.locked = True
    page = open_page(at=address.replace("http://", "http://anyone:sesame@"))
    app.state.locked = False
    classify(page)
    assert len(answers(page)) == 1
    for snippet in ("#curl", "#python"):
        assert "sesame" not in page.text_content(snippet)
        assert API_KEY_VARIABLE in page.text_content(snippet)
