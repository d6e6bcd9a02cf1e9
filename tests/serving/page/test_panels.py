"""Panels in a real browser: a bar for each label, the classes in order, and many rows of both."""

from __future__ import annotations

import csv
import io
import json

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.serving.page.actions import classify
from tests.serving.page.stub import model, panel
from tests.serving.page.test_many import choose, column, download, finish, start

PARTS = panel("parts", ("defect", "scratch", "dirty"))
ANIMALS = panel("animals", ("cat", "dog", "other"), one_of=True)
SCORES = {"parts/scratch": 0.82, "parts/defect": 0.2, "animals/dog": 0.7, "animals/other": 0.25, "animals/cat": 0.05}
PHONE = {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}


def test_every_label_has_a_bar_and_opens_to_its_own_answer(open_page, server):
    server.models, server.scores = [model("claims"), PARTS], SCORES
    page = open_page()
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier, 1 panel")
    page.select_option("#model", "parts")
    expect(page.locator("#about")).to_contain_text("3 labels, each answered for itself: defect, scratch, dirty")
    classify(page)
    assert server.requests["classify"][-1]["model"] == ["parts"]
    expect(page.locator(".answer .verdict").first).to_have_text("1 of 3 labels applies")
    lines = page.locator(".label-line")
    assert lines.all_inner_texts() == ["defect\n0.200\nNo", "scratch\n0.820\nYes", "dirty\n0.100\nNo"]
    bars = [bar.bounding_box()["width"] for bar in page.locator(".label-line .fill").all()]
    assert bars[1] > 3 * bars[0] > 3 * bars[2] > 0
    expect(page.locator("#history .outcome")).to_have_text("scratch")
    lines.nth(1).click()
    page.get_by_role("button", name="Explain this answer").click()
    expect(page.locator(".words")).to_be_visible()
    assert server.requests["explain"][-1]["model"] == "parts/scratch"
    page.get_by_role("button", name="Wrong: it is class 0").click()
    (line,) = download(page, "#save-corrections").splitlines()
    record = json.loads(line)
    assert (record["scratch"], record["classifier"]) == (0, "parts/scratch")
    assert "label" not in record


@pytest.mark.soak
def test_classes_stand_in_the_order_of_their_probabilities(open_page, server):
    server.models, server.scores = [ANIMALS], SCORES
    page = open_page(**PHONE)
    expect(page.locator("#about")).to_contain_text("one of 3 classes: cat, dog, other")
    classify(page)
    assert page.locator(".headline").inner_text().split() == ["dog", "Probability", "0.700"]
    assert page.locator(".label-line").all_inner_texts() == ["dog\n0.700", "other\n0.250", "cat\n0.050"]
    page.locator(".label-line").nth(2).click()
    page.get_by_role("button", name="Wrong: it is cat").click()
    (line,) = download(page, "#save-corrections").splitlines()
    assert json.loads(line)["label"] == "cat"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the phone"


@pytest.mark.soak
def test_many_labels_show_those_that_apply_first(open_page, server):
    server.models = [panel("hundred", [f"label {number}" for number in range(100)])]
    server.scores = {"hundred/label 70": 0.9, "hundred/label 90": 0.6}
    page = open_page()
    classify(page)
    names = page.locator(".label-name")
    assert names.first.inner_text() == "label 70"
    assert page.locator(".label-line:visible").count() == 12
    page.get_by_text("Show 88 more").click()
    assert page.locator(".label-line:visible").count() == 100


def test_a_table_shows_all_labels_or_one_and_downloads_a_column_for_each(open_page, server):
    server.models, server.scores = [PARTS, ANIMALS], SCORES
    page = open_page()
    choose(page, "rows.csv", "text,note\nfirst,x\nbad item,y\n")
    start(page)
    finish(page)
    expect(page.locator("#many-counts")).to_have_text("0 defect, 1 scratch, 0 dirty, 1 without an answer")
    assert column(page, 5)[0] == "scratch"
    page.select_option("#many-label", "defect")
    assert (column(page, 4)[0], column(page, 5)[0]) == ("0.200", "No")
    expect(page.locator("#many-counts")).to_contain_text("0 yes, 1 no")
    first, bad = csv.DictReader(io.StringIO(download(page, "#many-download")))
    assert [first[f"probability_{name}"] for name in ("defect", "scratch", "dirty")] == ["0.2", "0.82", "0.1"]
    assert (first["decision_scratch"], first["label_dirty"], bad["decision_scratch"]) == ("yes", "0", "")
    page.click("#many-again")
    page.select_option("#many-model", "animals")
    expect(page.locator("#many-labels")).to_be_hidden()
    start(page)
    finish(page)
    expect(page.locator("#many-counts")).to_have_text("0 cat, 1 dog, 0 other, 1 without an answer")
    page.select_option("#row-filter", label="dog")
    assert (column(page, 4), column(page, 5)) == (["0.700"], ["dog"])
    first, _ = csv.DictReader(io.StringIO(download(page, "#many-download")))
    assert (first["class"], first["class_probability"], first["probability_cat"]) == ("dog", "0.7", "0.05")
