"""Asking in a real browser: pictures, text, answers, heat maps, history, and the same from a program."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.serving.page.actions import (
    BLUE,
    PASTE,
    RED,
    SCORES,
    THREE,
    answers,
    classify,
    digest,
    explain,
    transfer,
    upload,
    upload_two,
)
from tests.serving.page.stub import model
from tests.waiting import LIMIT


def test_a_picture_and_a_text_get_a_decision_in_words(open_page, server):
    server.models = [model("claims", abstention=[0.4, 0.6])]
    page = open_page()
    upload_two(page)
    classify(page, "Line one\nline two ")
    (answer,) = answers(page)
    assert "Yes, approved Probability of approved 0.873 threshold 0.500" in answer
    assert "“Yes” begins at the threshold, 0.500. From 0.400 to 0.600 the classifier abstains." in answer
    # The very files and the very text, in their order.
    assert server.requests["classify"] == [
        {"model": ["claims"], "text": "Line one\nline two ", "images": [digest(RED), digest(BLUE)]}
    ]
    scale = page.get_by_role(
        "img", name="Probability 0.873 on a scale from 0 to 1; threshold 0.500; abstains from 0.400"
    )
    box, track, fill = scale.bounding_box(), page.locator(".track").bounding_box(), page.locator(".fill").bounding_box()
    band, line = page.locator(".band").bounding_box(), page.locator(".track .threshold").bounding_box()
    assert box["width"] == pytest.approx(track["width"], abs=1)
    assert fill["width"] / track["width"] == pytest.approx(0.873, abs=0.01)
    assert (band["x"] - track["x"]) / track["width"] == pytest.approx(0.4, abs=0.01)
    assert band["width"] / track["width"] == pytest.approx(0.2, abs=0.01)
    assert (line["x"] + line["width"] / 2 - track["x"]) / track["width"] == pytest.approx(0.5, abs=0.01)
    expect(page.locator("#announcer")).to_have_text("claims: Yes, approved, probability 0.873.")


def test_numbers_never_contradict_the_decision(open_page, server):
    page = open_page()
    for score, words in (
        (0.49996, "No, denied Probability of approved 0.49996 threshold 0.50000"),
        (0.5, "Yes, approved Probability of approved 0.500 threshold 0.500"),
        (0.99999, "Yes, approved Probability of approved > 0.999"),
        (0.00001, "No, denied Probability of approved < 0.001"),
        (1.0, "Yes, approved Probability of approved 1.000"),
    ):
        server.scores = {"claims": score}
        classify(page)
        assert words in answers(page)[0]


def test_all_classifiers_are_compared_in_one_call(open_page, server):
    server.models, server.scores = THREE, SCORES
    page = open_page()
    classify(page, which="")
    assert [entry["model"] for entry in server.requests["classify"]] == [["claims", "receipts", "plain"]]
    first, second, third = answers(page)
    assert "Undecided, too close to the threshold Probability of approved 0.550" in first
    assert "No, no receipt Probability of a receipt 0.120 threshold 0.350" in second
    assert "Yes, class 1 Probability of class 1 > 0.999" in third
    assert page.inner_text(".compared") == "3 classifiers: 1 yes, 1 no, 1 undecided."
    classify(page, which="receipts")
    assert len(answers(page)) == 1
    assert server.requests["classify"][-1]["model"] == ["receipts"]


def test_pictures_come_by_drop_and_paste_anywhere(open_page, server):
    page = open_page()
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer(page, ("red.png", "image/png", RED))})
    pasted = transfer(page, ("image.jpg", "image/jpeg", BLUE))
    page.locator("body").evaluate(PASTE, pasted)
    expect(page.locator("#chosen li")).to_have_count(2)
    expect(page.locator("#announcer")).to_have_text("1 picture added.")
    classify(page)
    assert server.requests["classify"][0]["images"] == [digest(RED), digest(BLUE)]


def test_words_pasted_with_a_picture_of_them_stay_words(open_page):
    page = open_page()
    both = transfer(page, ("image.png", "image/png", RED), words="from an office program")
    assert page.locator("#text").evaluate(PASTE, both), "the browser goes on and pastes the words"
    assert page.locator("#chosen li").count() == 0
    assert not page.locator("h1").evaluate(PASTE, both)
    expect(page.locator("#chosen li")).to_have_count(1)


def test_what_is_dropped_and_is_no_file_is_said_so_and_the_page_stays(open_page, address):
    page = open_page()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer(page, words="https://example.org/picture.png")})
    expect(page.locator("#picture-warnings")).to_contain_text("Only files can be dropped here")
    page.dispatch_event("main", "drop", {"dataTransfer": transfer(page, ("notes.txt", "text/plain", b"words"))})
    expect(page.locator("#picture-warnings")).to_contain_text("notes.txt is not a JPEG, PNG or WebP file")
    assert page.url == f"{address}/"
    assert page.locator("#chosen li").count() == 0


def test_the_place_for_drops_shows_that_it_is_one(open_page):
    page = open_page()
    held = {"dataTransfer": transfer(page, ("red.png", "image/png", RED))}
    page.dispatch_event("#drop", "dragenter", held)
    assert "over" in page.get_attribute("#drop", "class")
    page.dispatch_event("#drop", "dragleave", held)
    assert "over" not in page.get_attribute("#drop", "class")


def test_what_is_too_large_is_said_before_it_is_sent(open_page, server):
    page = open_page()
    upload(page, ("huge.png", bytes(50_001), "image/png"))
    assert "huge.png has 50.1 kB; the server accepts at most 50 kB for one picture" in page.inner_text(
        "#picture-warnings"
    )
    classify(page)
    assert "The request was not sent" in page.inner_text("#problem")
    page.get_by_role("button", name="Remove huge.png").click()
    assert page.inner_text("#picture-warnings") == ""
    upload(page, *((f"{name}.png", bytes(45_000), "image/png") for name in "ab"))
    assert "Together this is about 121.2 kB to send" in page.inner_text("#picture-warnings")
    page.get_by_role("button", name="Remove a.png").click()
    classify(page, "\N{GRINNING FACE}" * 201)
    assert page.inner_text("#text-warning") == "201 characters; the server accepts at most 200."
    classify(page, "  \n")
    assert page.inner_text("#text-warning") == "Type the text that goes with the example."
    assert page.get_attribute("#text", "aria-invalid") == "true"
    assert "classify" not in server.requests
    classify(page, "\N{GRINNING FACE}" * 200)
    assert len(server.requests["classify"]) == 1
    assert not page.is_visible("#problem")


def test_the_heat_map_lies_over_the_picture(open_page, server):
    page = open_page()
    upload_two(page)
    classify(page, "one two three")
    explain(page)
    (request,) = server.requests["explain"]
    assert request["model"] == "claims"
    assert request["text"] == "one two three"
    sent = [base64.b64decode(uri.partition(",")[2]) for uri in request["image"]]
    assert sent == [RED, BLUE]
    for number in range(2):
        image, canvas = page.locator(".map img").nth(number), page.locator(".map canvas").nth(number)
        assert image.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") == 90
        assert image.bounding_box() == canvas.bounding_box()
    # Rows and columns as the grid has them: towards class 0 on the left, nothing in the third column, class 1 beyond.
    pixels = """(canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 3, 6, 1);
      return [0, 2, 5].map((column) => [...data.slice(4 * column, 4 * column + 4)]);
    }"""
    left, middle, right = page.locator(".map canvas").first.evaluate(pixels)
    assert left[2] > left[0]
    assert left[3] == pytest.approx(255 * 2 / 3, abs=1)
    assert middle[3] == 0
    assert right == [194, 65, 12, 255]
    assert page.get_by_text("squares explain the difference from the average training picture").is_visible()
    assert "towards denied (−1.20)" in page.inner_text(".legend")
    assert "towards approved (+1.20)" in page.inner_text(".legend")
    assert page.inner_text(".words") == "one two three"
    colours = page.locator(".word").evaluate_all("(words) => words.map((w) => getComputedStyle(w).backgroundColor)")
    assert len(set(colours)) == 3
    assert page.locator(".word").evaluate_all("(words) => words.map((word) => word.title)") == [
        "+0.50 log odds",
        "−0.25 log odds",
        "+0.17 log odds",
    ]
    page.get_by_text("As numbers").click()
    rows = [re.sub(r"\s+", " ", row) for row in page.locator("table").first.locator("tr").all_inner_texts()]
    assert rows[:2] == ["Picture 1 +3.000", "Picture 2 +3.000"]
    assert rows[-1] == "Log odds in total +1.930"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as a picture").click()
    assert download.value.suggested_filename == "heat-map.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    page.get_by_role("button", name="Hide the explanation").click()
    assert not page.is_visible(".words")
    page.get_by_role("button", name="Explain this answer").click()
    assert page.is_visible(".words")
    assert len(server.requests["explain"]) == 1


def test_the_session_is_kept_brought_back_and_forgotten(open_page, server):
    server.models, server.scores = THREE, SCORES
    page = open_page()
    upload(page, ("red.png", RED, "image/png"))
    classify(page, "the first", which="")
    page.get_by_role("button", name="Remove red.png").click()
    classify(page, "the second", which="receipts")
    entries = page.locator("#history button")
    assert entries.count() == 2
    assert "the second" in entries.first.inner_text()
    assert "1 yes, 1 no, 1 undecided" in entries.last.inner_text()
    assert entries.last.locator("canvas").count() == 1
    entries.last.click()
    assert page.input_value("#text") == "the first"
    assert page.input_value("#model") == ""
    expect(page.locator("#chosen li")).to_have_count(1)
    assert len(answers(page)) == 3
    assert len(server.requests["classify"]) == 2, "nothing is sent again"
    explain(page)
    assert base64.b64decode(server.requests["explain"][0]["image"][0].partition(",")[2]) == RED
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.click("#clear")
    assert not page.is_visible("#past")
    page.reload()
    assert not page.is_visible("#past")


@pytest.mark.parametrize(
    "text",
    [
        '@it\'s "5 %" $HOME `x` \\n;type=a/b\nlines\n\nä 漢 \N{GRINNING FACE}',
        pytest.param("@/etc/hostname", marks=pytest.mark.soak),
        pytest.param("<x;type=text/html", marks=pytest.mark.soak),
        pytest.param("-F '' \\\n!!", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("with_picture", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_copied_commands_send_exactly_what_the_page_sent(open_page, server, tmp_path, text, with_picture):
    server.models = THREE
    names = ['it\'s; a "pic\\ture", $x.png', "-b.jpg"]
    page = open_page(permissions=["clipboard-read", "clipboard-write"], still=True)  # "Copied" would go away
    if with_picture:
        upload(page, (names[0], RED, "image/png"), (names[1], BLUE, "image/jpeg"))
        (tmp_path / names[0]).write_bytes(RED)
        (tmp_path / names[1]).write_bytes(BLUE)
    classify(page, text, which="")
    page.click("#snippets summary")
    for button, runner in (("#copy-curl", ["bash", "-ec"]), ("#copy-python", [sys.executable, "-c"])):
        page.click(button)
        expect(page.locator(button)).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        command = [*runner, copied]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=LIMIT, check=False)
        assert done.returncode == 0, done.stderr
        assert "'classify-1'" in done.stdout or '"classify-1"' in done.stdout
    by_page, by_curl, by_python = server.requests["classify"]
    assert by_page["images"] == ([digest(RED), digest(BLUE)] if with_picture else [])
    assert by_curl == by_page
    assert by_python == by_page


def test_without_a_clipboard_the_command_is_marked(open_page):
    page = open_page(still=True)  # "Selected" would go away
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on plain HTTP elsewhere
    classify(page)
    page.click("#snippets summary")
    page.click("#copy-curl")
    expect(page.locator("#copy-curl")).to_have_text("Selected; copy it with your keyboard")
    assert page.evaluate("getSelection().toString()").startswith("curl ")
