"""The labelling page in a real browser before a stub: keys, buttons, fingers, labels and classes, figures, the end."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.labelling.page.labelling_actions import press, ready, swipe
from tests.labelling.page.page_stub import CURVE, ESTIMATE, label, picture
from tests.waiting import until

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def words(session) -> list[str]:
    """Return the answers that stand, in their order."""
    return [answer for *_, answer in session.answers]


def test_rows_are_answered_by_keyboard_and_shown_when_saved(open_page, session):
    page = open_page()
    expect(page.locator("#text")).to_have_text("Is the cup number 0 broken?")
    session.gate.clear()
    press_one = page.keyboard
    ready(page)
    press_one.down("1")
    press_one.down("1")  # the key repeats while it is held
    until(lambda: session.bodies.get("answers"), "the answer")
    press_one.press("0")  # too early: the row after it is not in view
    expect(page.locator("#text")).to_have_text("Is the cup number 0 broken?")
    session.gate.set()
    expect(page.locator("#text")).to_have_text("Is the cup number 1 broken?")
    ready(page)
    press_one.down("1")
    press_one.up("1")
    for other in ("Control+1", "Alt+1", "Meta+1", "x"):
        press_one.press(other)
    press(page, "0", "ArrowRight", "ArrowLeft", "s", "?", "Numpad1")
    assert words(session) == ["yes", "no", "yes", "no", "skip", "unsure", "yes"]
    press(page, "u")
    expect(page.locator("#before")).to_have_text("Taken back: you had answered “yes”.")
    expect(page.locator("#text")).to_have_text("Is the cup number 6 broken?")
    press(page, "0")
    assert words(session)[-1] == "no"
    expect(page.locator("#count")).to_have_text("5 of 60 rows answered")
    expect(page.locator("#left-out")).to_have_text("1 skipped, 1 unsure")
    expect(page.locator("#announcer")).to_have_text("Saved: no. Which answer is right? Is the cup number 7 broken?")
    assert all(0 <= body["seconds"] < 600 for body in session.bodies["answers"])


@pytest.mark.soak
def test_the_next_picture_is_there_when_the_answer_is_saved(open_page, session, record_property):
    session.content = picture((1600, 1200))
    page = open_page(viewport={"width": 1280, "height": 800})
    press(page, *("1", "0") * 25)
    for name in ("answer to confirmation", "answer to next row"):
        took = page.evaluate("(name) => performance.getEntriesByName(name).map(({ duration }) => duration)", name)
        assert len(took) == 50
        ordered = sorted(took)
        line = f"{name}, ms: median {ordered[25]:.1f}, 95 % {ordered[47]:.1f}, most {ordered[-1]:.1f}"
        record_property(name, line)
        print(line)


@pytest.mark.soak
def test_buttons_answer_and_keep_the_focus(open_page, session):
    session.labels = [label("label", "intact", "1")]
    page = open_page()
    ready(page)
    yes, no = page.get_by_role("button", name="class 1"), page.get_by_role("button", name="intact")
    yes.click()
    ready(page)
    no.focus()
    page.keyboard.press("Enter")
    ready(page)
    page.keyboard.press("Space")
    ready(page)
    assert words(session) == ["yes", "no", "no"]
    assert no.evaluate("(element) => element === document.activeElement")
    for name in ("Skip", "Unsure"):
        page.get_by_role("button", name=name).click()
        ready(page)
    page.get_by_role("button", name="Undo").click()
    ready(page)
    assert words(session) == ["yes", "no", "no", "skip"]


@pytest.mark.soak
def test_everything_can_be_reached_by_tab(open_page):
    page = open_page()
    ready(page)
    reached = set()
    page.keyboard.press("Tab")
    while (name := page.evaluate("document.activeElement.id || document.activeElement.className")) not in {
        "",
        *reached,
    }:
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", name
        reached.add(name)
        page.keyboard.press("Tab")
    controls = {"answer no", "answer yes", "undo", "unsure", "skip"}
    assert controls | {"count", "help-open", "figures", "finish-open"} <= reached


@pytest.mark.soak
def test_help_opens_by_key_and_takes_no_answers(open_page, session):
    page = open_page()
    ready(page)
    page.keyboard.press("h")
    expect(page.get_by_role("dialog")).to_contain_text("skip the row")
    page.keyboard.press("1")
    page.keyboard.press("h")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    press(page, "1")
    assert words(session) == ["yes"]


@pytest.mark.soak
def test_all_labels_of_a_row_are_asked_in_steps(open_page, session):
    session.labels = [label("defect"), label("scratch", "clean", "scratched")]
    page = open_page()
    expect(page.get_by_role("heading", name="defect?")).to_be_visible()
    press(page, "1")
    expect(page.get_by_role("heading", name="scratch?")).to_be_visible()
    expect(page.locator("#steps")).to_have_text("defect yesscratch")
    expect(page.locator("#steps .current")).to_have_text("scratch")
    expect(page.locator("#text")).to_contain_text("number 0")
    page.get_by_role("button", name="scratched").click()
    ready(page)
    expect(page.locator("#text")).to_contain_text("number 1")
    expect(page.locator("#steps .done")).to_have_count(0)
    assert [(key, name) for _, key, name, _ in session.answers] == [("r0", "defect"), ("r0", "scratch")]
    expect(page.locator("#classes li").first).to_have_text("defect1 yes, 0 no")


@pytest.mark.soak
def test_classes_have_numbers(open_page, session):
    session.one_of, session.labels = True, [label(name) for name in ("tower", "bridge", "church")]
    page = open_page()
    press(page, "2", "9", "3")
    page.get_by_role("button", name="tower").click()
    ready(page)
    assert [(name, answer) for _, _, name, answer in session.answers] == [
        (None, "bridge"),
        (None, "church"),
        (None, "tower"),
    ]
    expect(page.locator("#classes")).to_have_text("tower1bridge1church1")


@pytest.mark.soak
def test_many_classes_are_found_by_name(open_page, session):
    names = [f"kind {number}" for number in range(30)] + ["a pear", "pear tree"]
    session.one_of, session.labels = True, [label(name) for name in names]
    page = open_page()
    press(page, "1")
    page.keyboard.press("f")
    page.keyboard.type("pear")
    expect(page.locator("#filter-note")).to_have_text("2 classes")
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_contain_text("number 2")
    expect(page.locator("#filter")).to_have_value("")
    ready(page)
    page.keyboard.type("kind 2")  # digits are letters in the field
    expect(page.locator("#filter-note")).to_have_text("11 classes")
    page.keyboard.press("Escape")
    press(page, "s")
    assert words(session) == ["kind 0", "pear tree", "skip"]


@pytest.mark.soak
def test_several_pictures_are_turned_and_enlarged(open_page, session):
    session.images = 3
    page = open_page()
    ready(page)
    shown = page.locator("#picture img")
    assert shown.get_attribute("alt") == "Picture 1 of 3 of row cup-000.jpg"
    page.keyboard.press("p")
    expect(shown).to_have_attribute("alt", "Picture 2 of 3 of row cup-000.jpg")
    page.get_by_role("button", name="Show picture 3 large").click()
    expect(shown).to_have_attribute("src", "/api/rows/r0/images/2")
    width = shown.bounding_box()["width"]
    shown.click()
    expect(page.locator("#picture.enlarged")).to_be_visible()
    assert shown.bounding_box()["width"] > 1.5 * width or page.locator("#picture").evaluate(
        "(box) => box.scrollHeight > box.clientHeight"
    )
    page.keyboard.press("z")
    expect(page.locator("#picture.enlarged")).to_have_count(0)
    page.keyboard.press("z")
    press(page, "1")
    expect(page.locator("#picture.enlarged")).to_have_count(0)
    assert shown.get_attribute("alt") == "Picture 1 of 3 of row cup-001.jpg"


@pytest.mark.soak
def test_rows_without_pictures_or_with_ones_that_cannot_be_shown(open_page, session):
    session.images = 0
    page = open_page(fails=[422])
    press(page, "1")
    expect(page.locator("#picture")).to_be_hidden()
    session.images, session.content = 1, b"broken"
    page.reload()
    expect(page.locator("#picture")).to_contain_text("This picture cannot be shown.")
    expect(page.locator("#picture")).to_contain_text("the picture is damaged")
    press(page, "s")
    assert words(session) == ["yes", "skip"]


@pytest.mark.soak
def test_a_second_look_is_marked_and_the_source_is_told(open_page, session):
    session.before = {"r1": "yes"}
    page = open_page()
    expect(page.locator("#source")).to_have_text(" · drawn at random")
    expect(page.locator("#before")).to_be_hidden()
    press(page, "0")
    expect(page.locator("#before")).to_have_text("Second look: you answered “yes” before. Is that still right?")


@pytest.mark.soak
def test_figures_and_the_suggestion_to_stop(open_page, session):
    sentence = "Within half a point of where it will level off: you can stop."
    session.estimate, session.curve = ESTIMATE, {**CURVE, "stop": True, "sentence": sentence}
    session.more = {
        "annotators": {"ann": 20, "bob": 10},
        "agreement": {"rows": 12, "kappa": [0.81, -0.1, 0.97], "ties": 1},
        "notes": ["3 rows are left out"],
    }
    page = open_page()
    figures = page.locator("#figures")
    for text in (
        "From 24 rows drawn at random",
        "83 % (66 % to 93 %)",
        "0.91 (0.78 to 0.98)",
        "Probabilities are off by 6 % on average (2 % to 14 %).",
        "Cohen’s kappa 0.81 (−0.10 to 0.97) from 12 rows",
        "1 row with as many yes as no is left out",
        "3 rows are left out",
        sentence,
    ):
        expect(figures).to_contain_text(text)
    expect(page.get_by_role("img", name=re.compile("Learning curve: accuracy by number of labels"))).to_be_visible()
    assert page.locator("#curve .point").count() == len(CURVE["points"])
    expect(page.locator("#stop")).to_contain_text(sentence)
    page.locator("#stop").get_by_role("button", name="Continue labelling").click()
    press(page, "1")
    expect(page.locator("#stop")).to_be_hidden()


@pytest.mark.soak
def test_the_end_and_training(open_page, session):
    session.rows = 2
    page = open_page()
    press(page, "1", "0")
    expect(page.get_by_role("heading", name="All rows are done")).to_be_visible()
    page.locator("#end").get_by_role("button").click()
    page.get_by_role("button", name="Finish and train").click()
    expect(page.get_by_role("dialog")).to_contain_text("fold 2 of 5")
    done = {"state": "done", "message": "", "classifier": "out-classifier", "report": True}
    session.more["finish"] = {**done, "command": "serve out-classifier", "train": "train out.jsonl"}
    expect(page.get_by_role("dialog")).to_contain_text("It was saved in out-classifier.")
    assert page.get_by_role("link", name="Open the report").get_attribute("href") == "report/"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").first.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "serve out-classifier"
    page.get_by_role("dialog").get_by_role("button", name="Continue labelling").click()
    expect(page.locator("#outcome")).to_contain_text("The classifier is ready")
    press(page, "u")
    expect(page.locator("#text")).to_contain_text("number 1")


@pytest.mark.soak
def test_a_failed_training_says_why_and_can_be_repeated(open_page, session):
    page = open_page(fails=[409])
    press(page, "1", "0")
    page.locator("#finish-open").click()
    session.refusals["/api/finish"] = [(409, "finishing", "training runs already")]
    page.get_by_role("button", name="Finish and train").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("training runs already")
    page.get_by_role("button", name="Finish and train").click()
    session.more["finish"] = {"state": "failed", "message": "all rows are alike", "report": False}
    expect(page.get_by_role("dialog")).to_contain_text("all rows are alike")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("dialog")).to_contain_text("fold 2 of 5")


@pytest.mark.soak
def test_a_phone_has_large_buttons_and_no_scrolling_across(open_page, session):
    session.estimate, session.curve = ESTIMATE, CURVE
    session.text = "Averylongwordthatdoesnotfit" * 9 + " {row}"
    page = open_page(**PHONE)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for button in page.locator("#controls button").all():
        box = button.bounding_box()
        assert box["height"] >= 44
        assert box["y"] + box["height"] <= 844
    page.get_by_role("button", name="yes").tap()
    ready(page)
    assert words(session) == ["yes"]
    page.locator("#count").tap()
    expect(page.locator("#progress-title")).to_be_in_viewport()


@pytest.mark.soak
def test_swipes_answer(open_page, session):
    page = open_page(**PHONE)
    ready(page)
    swipe(page, (0.3, 0.4), (0.5, 0.4), (0.9, 0.42))
    expect(page.locator("#text")).to_contain_text("number 1")
    ready(page)
    swipe(page, (0.8, 0.4), (0.5, 0.4), (0.1, 0.4))
    expect(page.locator("#text")).to_contain_text("number 2")
    ready(page)
    swipe(page, (0.4, 0.4), (0.5, 0.4), (0.55, 0.4))  # too short
    swipe(page, (0.4, 0.3), (0.4, 0.5), (0.9, 0.8))  # scrolls
    swipe(page, (0.2, 0.4), (0.5, 0.4), (0.8, 0.4), fingers=2)  # zooms
    page.locator("#picture").tap()
    expect(page.locator("#picture.enlarged")).to_be_visible()
    swipe(page, (0.2, 0.4), (0.5, 0.4), (0.9, 0.4))  # moves the enlarged picture
    page.keyboard.press("z")
    press(page, "s")
    assert words(session) == ["yes", "no", "skip"]


@pytest.mark.soak
def test_a_duplicated_window_is_another_browser(open_page, session):
    page = open_page()
    press(page, "1")
    page.reload()
    press(page, "1")
    with page.context.expect_page() as opened:
        page.evaluate("window.open(location.href)")
    copy = opened.value
    press(copy, "1")
    first, again, other = (browser for browser, *_ in session.answers)
    assert first == again != other
