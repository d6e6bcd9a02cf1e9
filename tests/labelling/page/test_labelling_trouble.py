"""The labelling page when something is wrong: a full disk, a server that is gone or another one, unknown rows."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.labelling.page.labelling_actions import press, ready

pytestmark = pytest.mark.soak

NOT_SAVED = "Your last answer, “yes”, is not saved yet. This page sends it again by itself."


def test_an_answer_that_could_not_be_written_is_sent_again(open_page, session):
    page = open_page(fails=[507])
    full = (507, "not_saved", "The disk is full; make room.")
    session.refusals["/api/answers"] = [full, full, full]
    ready(page)
    page.keyboard.press("1")
    expect(page.locator("#notice")).to_have_text(f"The disk is full; make room. {NOT_SAVED}Try again")
    expect(page.locator("#state")).to_have_text("Not saved")
    page.keyboard.press("0")  # not an answer: the one before it is not saved
    page.keyboard.press("u")
    expect(page.locator("#text")).to_contain_text("number 1")
    assert session.refusals["/api/answers"] == []
    assert [(key, answer) for _, key, _, answer in session.answers] == [("r0", "yes")]
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#announcer")).to_have_text("Connected again. Your answer is saved.")
    session.refusals["/api/answers"] = [full]
    ready(page)
    page.keyboard.press("0")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#text")).to_contain_text("number 2")


def test_a_server_that_is_gone_gets_the_answer_when_it_is_back(open_page, session):
    page = open_page(fails=["ERR_INTERNET_DISCONNECTED"])
    press(page, "1")
    page.context.set_offline(True)
    page.keyboard.press("1")
    expect(page.locator("#notice")).to_contain_text("start the same command again")
    expect(page.locator("#notice")).to_contain_text(NOT_SAVED)
    expect(page.locator("#state")).to_have_text("Not reachable")
    page.context.set_offline(False)
    expect(page.locator("#text")).to_contain_text("number 2")
    press(page, "0")
    assert [(key, answer) for _, key, _, answer in session.answers] == [("r0", "yes"), ("r1", "yes"), ("r2", "no")]


def test_an_undo_is_not_repeated(open_page, session):
    page = open_page(fails=["ERR_INTERNET_DISCONNECTED"])
    press(page, "1", "1")
    page.context.set_offline(True)
    page.keyboard.press("u")
    expect(page.locator("#notice")).to_contain_text("Check whether your last answer was taken back.")
    page.context.set_offline(False)
    expect(page.locator("#notice")).to_be_hidden()
    press(page, "s")
    assert [answer for *_, answer in session.answers] == ["yes", "yes", "skip"]


def test_a_new_address_is_asked_for(open_page, session):
    page = open_page(fails=[401])
    session.refusals["/api/answers"] = [(401, "invalid_token", "no valid token")]
    ready(page)
    page.keyboard.press("1")
    expect(page.locator("#notice")).to_contain_text("Open the address that it printed")
    expect(page.locator("#text")).to_contain_text("number 1")  # once another window has opened it


def test_another_session_at_the_address_gets_no_answers(open_page, session):
    page = open_page(fails=[503])
    session.refusals["/api/answers"] = [(503, "draining", "The command is ending.")]
    session.data = "other photos"
    ready(page)
    page.keyboard.press("1")
    expect(page.locator("#notice")).to_contain_text("labels other data now")
    page.keyboard.press("1")
    assert session.answers == []
    page.get_by_role("button", name="Reload").click()
    press(page, "1")
    assert [answer for *_, answer in session.answers] == ["yes"]


def test_a_row_that_is_not_known_is_left(open_page, session):
    page = open_page(fails=[409])
    session.refusals["/api/answers"] = [(409, "not_current", "no such question")]
    ready(page)
    page.keyboard.press("1")
    expect(page.locator("#notice")).to_have_text("The server does not know this row. The next one is shown.")
    press(page, "0")
    assert [answer for *_, answer in session.answers] == ["no"]
    expect(page.locator("#notice")).to_be_hidden()


def test_a_request_that_is_refused_says_why(open_page, session):
    page = open_page(fails=[400])
    session.refusals["/api/answers"] = [(400, "invalid_request", "answer is unknown")]
    ready(page)
    page.keyboard.press("1")
    expect(page.locator("#notice")).to_have_text("The server refused the request (400): answer is unknown")
    press(page, "0")
    assert [answer for *_, answer in session.answers] == ["no"]


def test_rows_that_are_open_elsewhere_are_waited_for(open_page, session):
    session.rows = 2
    session.more["left"] = 1
    page = open_page()
    press(page, "1", "0")
    expect(page.locator("#end")).to_contain_text("The last row is open in another window.")
    session.answers.pop()
    expect(page.locator("#text")).to_contain_text("number 1")


def test_a_page_that_opens_too_early_waits(open_page, session):
    session.refusals["/api/setup"] = [(503, "starting", "The rows are being read.")]
    page = open_page(state=None, fails=[503])
    expect(page.locator("#notice")).to_contain_text("The rows are being read. This page tries again by itself.")
    press(page, "1")
    assert len(session.answers) == 1
