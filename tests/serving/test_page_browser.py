"""The page in a real browser, against a stand-in for the routes that it calls."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.config import API_KEY_VARIABLE
from tests.serving.client import picture
from tests.serving.page_server import StandIn, make_app, model, running

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

CHROMIUM = Path("/usr/bin/chromium")
PHONE = {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}
CONFIG = ServeConfig(classifiers=("claims",), max_image_bytes=50_000, max_body_bytes=120_000, max_text_chars=200)
HOSTILE = "</option></script><img src=x onerror=document.title=1>\u202e{{7*7}}<b>&amp;"
THREE = [
    model("claims", abstention=[0.42, 0.61]),
    model("receipts", labels=("no receipt", "a receipt"), threshold=0.35),
    model("plain", labels=("0", "1")),
]
SCORES = {"claims": 0.55, "receipts": 0.12, "plain": 0.9997}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no browser: {CHROMIUM} is missing (Debian's package chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[StandIn, str]]:
    stand_in = StandIn()
    with running(make_app(stand_in, CONFIG)) as address:
        yield stand_in, address


@pytest.fixture
def server(served) -> StandIn:
    served[0].__init__()
    return served[0]


@pytest.fixture
def address(served) -> str:
    return served[1]


@pytest.fixture
def visit(browser, server, address):
    """Open the page; afterwards, make sure that nothing went elsewhere and that nothing was logged or thrown.

    A browser logs by itself that a request failed; a test that wants one to fail says how: `fails=[429]`.
    """
    contexts, outside, said, wanted = [], [], [], []

    def opened(path="", *, at=address, state="ready", fails=(), **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        wanted.extend(map(str, fails))
        page = context.new_page()
        page.on("request", lambda request: outside.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(f"{at}/{path}")
        if state:
            expect(page.locator("#state")).to_have_attribute("data-state", state)
        return page

    yield opened
    for context in contexts:
        context.close()
    own = (address, f"blob:{address}", "data:image/")
    assert [url for url in outside if not re.sub("//.*@", "//", url).startswith(own)] == []
    failed = re.compile(r"Failed to load resource: .*(\d{3}|ERR_\w+)")
    assert [line for line in said if not (failed.match(line) and any(word in line for word in wanted))] == []


def upload(page, *files: tuple[str, bytes, str]) -> None:
    page.set_input_files("#files", [{"name": name, "buffer": data, "mimeType": kind} for name, data, kind in files])


def ask(page, text="There is a tower.", *, which=None) -> None:
    page.fill("#text", text)
    if which is not None:
        page.select_option("#model", which)
    page.click("#classify")
    expect(page.locator("#busy")).to_be_hidden()


def answers(page) -> list[str]:
    return [re.sub(r"\s+", " ", text) for text in page.locator(".answer").all_inner_texts()]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


RED, BLUE = picture("red"), picture("blue", "JPEG")
TRANSFER = """([files, words]) => {
  const transfer = new DataTransfer();
  for (const [name, type, data] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  }
  if (words) transfer.setData("text/plain", words);
  return transfer;
}"""
PASTE = """(target, clipboardData) => target.dispatchEvent(
  new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }))"""


def transfer(page, *files: tuple[str, str, bytes], words: str = "") -> Any:
    encoded = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
    return page.evaluate_handle(TRANSFER, [encoded, words])


def test_a_picture_and_a_text_get_a_decision_in_words(visit, server):
    server.models = [model("claims", abstention=[0.4, 0.6])]
    page = visit()
    upload(page, ("red.png", RED, "image/png"), ("blue.jpg", BLUE, "image/jpeg"))
    ask(page, "Line one\nline two ")
    (answer,) = answers(page)
    assert "Yes approved Probability of approved 0.873 threshold 0.500" in answer
    assert "“Yes” begins at the threshold, 0.500. From 0.400 to 0.600 the classifier abstains." in answer
    # The very files and the very text, in their order.
    assert server.asked["classify"] == [
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


def test_numbers_never_contradict_the_decision(visit, server):
    page = visit()
    for score, words in (
        (0.49996, "No denied Probability of approved 0.49996 threshold 0.50000"),
        (0.5, "Yes approved Probability of approved 0.500 threshold 0.500"),
        (0.99999, "Yes approved Probability of approved > 0.999"),
        (0.00001, "No denied Probability of approved < 0.001"),
        (1.0, "Yes approved Probability of approved 1.000"),
    ):
        server.scores = {"claims": score}
        ask(page)
        assert words in answers(page)[0]


def test_all_classifiers_are_compared_in_one_call(visit, server):
    server.models, server.scores = THREE, SCORES
    page = visit()
    ask(page, which="")
    assert [entry["model"] for entry in server.asked["classify"]] == [["claims", "receipts", "plain"]]
    first, second, third = answers(page)
    assert "Undecided too close to the threshold Probability of approved 0.550" in first
    assert "No no receipt Probability of a receipt 0.120 threshold 0.350" in second
    assert "Yes class 1 Probability of class 1 > 0.999" in third
    assert page.inner_text(".compared") == "3 classifiers: 1 yes, 1 no, 1 undecided."
    ask(page, which="receipts")
    assert len(answers(page)) == 1
    assert server.asked["classify"][-1]["model"] == ["receipts"]


def test_pictures_come_by_drop_and_paste_anywhere(visit, server):
    page = visit()
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer(page, ("red.png", "image/png", RED))})
    pasted = transfer(page, ("image.jpg", "image/jpeg", BLUE))
    page.locator("body").evaluate(PASTE, pasted)
    expect(page.locator("#chosen li")).to_have_count(2)
    expect(page.locator("#announcer")).to_have_text("1 picture added.")
    ask(page)
    assert server.asked["classify"][0]["images"] == [digest(RED), digest(BLUE)]


def test_words_pasted_with_a_picture_of_them_stay_words(visit):
    page = visit()
    both = transfer(page, ("image.png", "image/png", RED), words="from an office program")
    assert page.locator("#text").evaluate(PASTE, both), "the browser goes on and pastes the words"
    assert page.locator("#chosen li").count() == 0
    assert not page.locator("h1").evaluate(PASTE, both)
    expect(page.locator("#chosen li")).to_have_count(1)


def test_what_is_dropped_and_is_no_file_is_said_so_and_the_page_stays(visit, address):
    page = visit()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer(page, words="https://example.org/picture.png")})
    assert "Only files can be dropped here" in page.inner_text("#picture-warnings")
    page.dispatch_event("main", "drop", {"dataTransfer": transfer(page, ("notes.txt", "text/plain", b"words"))})
    assert "notes.txt is no JPEG, PNG or WebP" in page.inner_text("#picture-warnings")
    assert page.url == f"{address}/"
    assert page.locator("#chosen li").count() == 0


def test_the_place_for_drops_shows_that_it_is_one(visit):
    page = visit()
    held = {"dataTransfer": transfer(page, ("red.png", "image/png", RED))}
    page.dispatch_event("#drop", "dragenter", held)
    assert "over" in page.get_attribute("#drop", "class")
    page.dispatch_event("#drop", "dragleave", held)
    assert "over" not in page.get_attribute("#drop", "class")


def test_what_is_too_large_is_said_before_it_is_sent(visit, server):
    page = visit()
    upload(page, ("huge.png", bytes(50_001), "image/png"))
    assert "huge.png has 50.1 kB; the server takes at most 50 kB for one picture" in page.inner_text(
        "#picture-warnings"
    )
    ask(page)
    assert "This was not sent" in page.inner_text("#problem")
    page.get_by_role("button", name="Take out huge.png").click()
    assert page.inner_text("#picture-warnings") == ""
    upload(page, *((f"{name}.png", bytes(45_000), "image/png") for name in "ab"))
    assert "Together this is about 121.2 kB to send" in page.inner_text("#picture-warnings")
    page.get_by_role("button", name="Take out a.png").click()
    ask(page, "\N{GRINNING FACE}" * 201)
    assert page.inner_text("#text-warning") == "201 characters; the server takes at most 200."
    ask(page, "  \n")
    assert page.inner_text("#text-warning") == "Type the text that goes with the example."
    assert page.get_attribute("#text", "aria-invalid") == "true"
    assert "classify" not in server.asked
    ask(page, "\N{GRINNING FACE}" * 200)
    assert len(server.asked["classify"]) == 1
    assert not page.is_visible("#problem")


def test_everything_works_by_keyboard_alone(visit, server):
    server.models, server.scores = THREE, SCORES
    page = visit()
    upload(page, ("red.png", RED, "image/png"), ("blue.jpg", BLUE, "image/jpeg"))

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
    assert page.evaluate("document.activeElement.ariaLabel") == "Take out blue.jpg"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Take out red.png"
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


def test_controls_have_names_and_answers_are_announced(visit, server):
    server.models = THREE
    page = visit()
    assert page.get_by_role("textbox", name="Text").count() == 1
    assert page.get_by_role("combobox", name="Classifier").count() == 1
    assert page.get_by_role("button", name="Classify").count() == 1
    assert page.get_by_role("region", name="Result").count() == 1
    nameless = """[...document.querySelectorAll("button, input:not([hidden]), select, textarea, a, summary")]
      .filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"""
    upload(page, ("red.png", RED, "image/png"))
    ask(page)
    page.click(".answer button")
    page.wait_for_selector(".words")
    assert page.evaluate(nameless) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    assert page.get_attribute("#announcer", "role") == "status"
    assert page.get_attribute("#problem", "role") == "alert"


def test_the_heat_map_lies_over_the_picture(visit, server):
    page = visit()
    upload(page, ("red.png", RED, "image/png"), ("blue.jpg", BLUE, "image/jpeg"))
    ask(page, "one two three")
    page.get_by_role("button", name="Show what moved it").click()
    page.wait_for_selector(".words")
    (asked,) = server.asked["explain"]
    assert asked["model"] == "claims"
    assert asked["text"] == "one two three"
    sent = [base64.b64decode(uri.partition(",")[2]) for uri in asked["image"]]
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
    assert "speaks for denied (−1.20)" in page.inner_text(".legend")
    assert "speaks for approved (+1.20)" in page.inner_text(".legend")
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
    assert rows[-1] == "Log odds in all +1.930"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as a picture").click()
    assert download.value.suggested_filename == "heat-map.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    page.get_by_role("button", name="Hide what moved it").click()
    assert not page.is_visible(".words")
    page.get_by_role("button", name="Show what moved it").click()
    assert page.is_visible(".words")
    assert len(server.asked["explain"]) == 1


def test_an_explanation_that_is_refused_can_be_asked_for_again(visit, server):
    server.refuse("/v1/explain", 429, "queue_full", "too much waits", Retry_After="3")
    page = visit(fails=[429])
    ask(page)
    page.click(".answer button")
    assert "asks to wait 3 seconds" in page.inner_text(".answer .notice")
    page.click(".answer button")
    page.wait_for_selector(".words")
    assert not page.is_visible(".answer .notice")
    assert "There is no picture" in page.inner_text(".reasons")


def test_the_session_is_kept_brought_back_and_forgotten(visit, server):
    server.models, server.scores = THREE, SCORES
    page = visit()
    upload(page, ("red.png", RED, "image/png"))
    ask(page, "the first", which="")
    page.get_by_role("button", name="Take out red.png").click()
    ask(page, "the second", which="receipts")
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
    assert len(server.asked["classify"]) == 2, "nothing is asked again"
    page.click(".answer button")
    page.wait_for_selector(".words")
    assert base64.b64decode(server.asked["explain"][0]["image"][0].partition(",")[2]) == RED
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
@pytest.mark.parametrize("with_picture", [True, False])
def test_copied_commands_ask_exactly_what_the_page_asked(visit, server, tmp_path, text, with_picture):
    server.models = THREE
    names = ['it\'s; a "pic\\ture", $x.png', "-b.jpg"]
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    if with_picture:
        upload(page, (names[0], RED, "image/png"), (names[1], BLUE, "image/jpeg"))
        (tmp_path / names[0]).write_bytes(RED)
        (tmp_path / names[1]).write_bytes(BLUE)
    ask(page, text, which="")
    page.click("#snippets summary")
    for button, runner in (("#copy-curl", ["bash", "-ec"]), ("#copy-python", [sys.executable, "-c"])):
        page.click(button)
        expect(page.locator(button)).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        done = subprocess.run([*runner, copied], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "'classify-1'" in done.stdout or '"classify-1"' in done.stdout
    by_page, by_curl, by_python = server.asked["classify"]
    assert by_page["images"] == ([digest(RED), digest(BLUE)] if with_picture else [])
    assert by_curl == by_page
    assert by_python == by_page


def test_without_a_clipboard_the_command_is_marked(visit):
    page = visit()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on plain HTTP elsewhere
    ask(page)
    page.click("#snippets summary")
    page.click("#copy-curl")
    expect(page.locator("#copy-curl")).to_have_text("Marked; copy it with your keyboard")
    assert page.evaluate("getSelection().toString()").startswith("curl ")


def test_hostile_names_and_texts_are_shown_as_text(visit, server):
    server.models = [model(HOSTILE, labels=(HOSTILE, HOSTILE)), model("other")]
    page = visit()
    upload(page, (HOSTILE.replace("/", "_") + ".png", RED, "image/png"))
    ask(page, HOSTILE, which=HOSTILE)
    page.click(".answer button")
    page.wait_for_selector(".words")
    ask(page, HOSTILE + " bad item", which="")
    assert HOSTILE in page.text_content("#answers")
    server.refuse("/v1/classify", 400, "invalid", HOSTILE)
    page = visit(fails=[400])
    ask(page, HOSTILE)
    assert HOSTILE in page.text_content("#problem")
    for opened in page.context.browser.contexts:
        (shown,) = opened.pages
        assert shown.title() == "qwen-vl-classifier"
        assert shown.evaluate("document.querySelectorAll('script').length") == 1
        strange = "iframe, base, object, embed, img[src=x], b:not(.value b)"
        assert shown.evaluate("(s) => document.querySelectorAll(s).length", strange) == 0
        names = "[...document.querySelectorAll('*')].flatMap((element) => element.getAttributeNames())"
        assert [name for name in shown.evaluate(names) if name.startswith("on")] == []


def test_the_policy_stops_what_would_slip_through(browser, server, address):
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"document.title=1\">')")
    page.evaluate("""() => {
      document.body.append(Object.assign(document.createElement("script"), { textContent: "document.title = 2" }));
    }""")
    page.wait_for_timeout(200)
    assert page.title() == "qwen-vl-classifier"
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', (error) => error.name)") == "TypeError"
    context.close()


def test_an_error_of_the_example_stands_in_its_place(visit, server):
    server.models = THREE[:2]
    page = visit()
    ask(page, "a bad item", which="")
    assert answers(page) == ["claims cannot be read", "receipts cannot be read"]
    assert page.inner_text(".compared") == "2 classifiers: 2 without an answer."
    assert "2 without an answer" in page.inner_text("#history")


def test_overload_is_said_and_asked_again(visit, server):
    server.refuse("/v1/classify", 429, "queue_full", "too much waits", Retry_After="2")
    page = visit(fails=[429])
    ask(page, "kept")
    assert "too much to do (429) and asks to wait 2 seconds" in page.inner_text("#problem")
    assert page.input_value("#text") == "kept"
    page.click("#problem button")
    expect(page.locator(".answer")).to_have_count(1)
    assert not page.is_visible("#problem")


def test_problems_are_said_in_words(visit, server):
    page = visit(fails=[400, 413, 500, 502, 504])
    for status, content, said in (
        (400, {"detail": "input.0.text is blank; wanted words"}, "refused this (400): input.0.text is blank"),
        (413, {"detail": "the body has too many bytes"}, "refused this (413): the body has too many bytes"),
        (500, "not an object", "answered with an error (500)"),
        (502, ["<html>"], "answered with an error (502)"),
        (504, {"detail": "late"}, "did not answer in time"),
        (200, "none", "none that this page understands"),
        (200, {"data": [{"model": "unknown", "score": 1}]}, "none that this page understands"),
        (200, {"nothing": 1}, "none that this page understands"),
    ):
        server.refusals["/v1/classify"] = [(status, content, {})]
        ask(page)
        assert said in page.inner_text("#problem")
    page.click("#problem button")
    expect(page.locator(".answer")).to_have_count(1)


def test_loading_is_said_and_the_page_goes_on_by_itself(visit, server):
    server.refuse("/v1/models", 503, "loading", "the server is loading", Retry_After="1")
    page = visit(state="loading", fails=[503])
    assert "loading its classifiers" in page.inner_text("#notice")
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier", timeout=20_000)
    assert not page.is_visible("#notice")


def test_shutting_down_and_a_server_that_failed_are_said(visit, server):
    page = visit(fails=[503])
    server.refuse("/v1/classify", 503, "draining", "the server is shutting down")
    ask(page)
    assert page.inner_text("#state") == "Shutting down"
    assert "finishes what it has accepted" in page.inner_text("#notice")
    server.refuse("/v1/models", 503, "failed", "no classifiers")
    page.click("#notice button")
    expect(page.locator("#state")).to_have_text("Failed")
    assert "its log says why" in page.inner_text("#notice")
    page.click("#notice button")
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier")


def test_a_server_that_is_gone_is_said_and_comes_back(visit):
    page = visit(fails=["ERR_"])
    page.context.set_offline(True)
    ask(page, "kept")
    assert "cannot be reached" in page.inner_text("#problem")
    assert page.inner_text("#state") == "Not reached"
    page.context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier", timeout=20_000)
    page.click("#problem button")
    expect(page.locator(".answer")).to_have_count(1)


def test_a_request_can_be_given_up(visit, server):
    server.gate.clear()
    page = visit()
    page.fill("#text", "slow")
    page.click("#classify")
    expect(page.locator("#cancel")).to_be_visible()
    page.keyboard.press("Control+Enter")
    page.click("#cancel")
    expect(page.locator("#busy")).to_be_hidden()
    server.gate.set()
    assert page.evaluate("document.activeElement.id") == "classify"
    assert len(server.asked["classify"]) == 1
    assert not page.is_visible("#problem")
    ask(page)
    assert len(answers(page)) == 1


def test_a_key_opens_the_page_and_a_lost_one_is_said(visit, server, address):
    server.key = "open sesame"
    credentials = {"username": "anyone", "password": server.key}
    page = visit(http_credentials=credentials, fails=[401])
    ask(page)
    assert len(answers(page)) == 1
    server.refuse("/v1/classify", 401, "invalid_api_key", "no valid key")
    ask(page)
    assert page.inner_text("#state") == "Key needed"
    assert "asks for a key" in page.inner_text("#notice")
    page.click("#notice button")
    expect(page.locator("#state")).to_have_text("Ready: 1 classifier")


def test_an_address_that_holds_the_key_works_and_is_not_copied(visit, server, address, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame")
    server.key = "sesame"
    page = visit(at=address.replace("http://", "http://anyone:sesame@"))
    ask(page)
    assert len(answers(page)) == 1
    for snippet in ("#curl", "#python"):
        assert "sesame" not in page.text_content(snippet)
        assert API_KEY_VARIABLE in page.text_content(snippet)


def test_a_phone_shows_everything_without_scrolling_sideways(visit, server):
    server.models, server.scores = [*THREE, model("x" * 200, labels=("y" * 200, "z" * 200))], SCORES
    page = visit(**PHONE)
    assert page.is_visible("#photograph")
    assert page.get_attribute("#camera", "capture") == "environment"
    upload(page, ("n" * 200 + ".png", RED, "image/png"), ("blue.jpg", BLUE, "image/jpeg"))
    ask(page, "w" * 150, which="")
    page.click(".answer button")
    page.wait_for_selector(".words")
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    heights = "[...document.querySelectorAll('button, select')].map((e) => e.offsetParent ? e.offsetHeight : 44)"
    assert min(page.evaluate(heights)) >= 44
    page.goto(page.url + "docs")
    assert page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize(("scheme", "lightness"), [("light", range(240, 256)), ("dark", range(40))])
def test_it_follows_the_colour_scheme(visit, scheme, lightness):
    page = visit(color_scheme=scheme)
    for selector in ("body", ".panel", "textarea"):
        colour = page.evaluate("(s) => getComputedStyle(document.querySelector(s)).backgroundColor", selector)
        assert all(int(part) in lightness for part in re.findall(r"\d+", colour)[:3]), selector


def test_nothing_moves_where_motion_is_not_wanted(visit, server):
    server.refusals["/v1/models"] = [(503, {"error": {"code": "loading"}}, {})] * 50
    animation = "getComputedStyle(document.querySelector('#state'), '::before').animationName"
    assert visit(state="loading", fails=[503]).evaluate(animation) == "turn"
    assert visit(state="loading", fails=[503], reduced_motion="reduce").evaluate(animation) == "none"


def test_paper_shows_the_result_and_no_controls(visit):
    page = visit(color_scheme="dark")
    upload(page, ("red.png", RED, "image/png"))
    ask(page)
    page.click(".answer button")
    page.wait_for_selector(".words")
    page.emulate_media(media="print")
    assert page.is_visible(".verdict")
    assert page.is_visible(".map")
    for hidden in ("#example", "#past", ".buttons", ".strength", "#snippets"):
        assert not page.locator(hidden).first.is_visible(), hidden
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_the_page_says_what_else_there_is(visit):
    page = visit(state=None, java_script_enabled=False)
    assert "This page needs JavaScript" in page.inner_text("noscript")


def test_the_page_of_the_interface_needs_no_script(visit):
    page = visit("docs", state=None, java_script_enabled=False)
    page.get_by_role("link", name="POST /v1/classify").click()
    assert page.url.endswith("#post-v1-classify")
    assert page.locator("section[aria-labelledby=post-v1-classify]").is_visible()
    assert page.evaluate("1 + 1") == 2
