"""The pages as they are served: a fixed table of files under a strict policy, in colours that can be read."""

from __future__ import annotations

import functools
import importlib.resources
import io
import itertools
import posixpath
import re
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.config.serve import API_KEY_VARIABLE
from qwen_vl_classifier.serving.routes.page import ASSETS, EXAMPLES
from tests.serving.page.stub import StubServer, make_app

FOLDER = importlib.resources.files("qwen_vl_classifier.serving").joinpath("page")
TEMPLATES = ("index.html", "docs/docs.html")
CONFIG = ServeConfig(classifiers=("claims",))
RAW_TEMPLATES = [f"/page/{name}" for name in TEMPLATES]
PATHS = ["/", "/docs", *(f"/page/{name}" for name in ASSETS)]
DRAWN = ["/page/examples.json", *(f"/page/examples/{name}" for name in EXAMPLES)]
DRAWN_TYPES = {".json": "application/json", ".png": "image/png"}
SCRIPTS = ("app.js", "docs/tryit.js")


@functools.cache
def client_of(config: ServeConfig, locked: bool) -> TestClient:
    return TestClient(make_app(StubServer(), config, locked=locked), base_url="http://localhost")


def get(path: str, *, config: ServeConfig = CONFIG, locked: bool = False, **headers: str) -> httpx.Response:
    return client_of(config, locked).get(path, headers=headers)


def read(name: str) -> str:
    return FOLDER.joinpath(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*PATHS, *DRAWN])
def test_a_file_is_served_once_and_then_only_confirmed(path):
    answer = get(path)
    assert answer.status_code == 200
    drawn = DRAWN_TYPES.get(posixpath.splitext(path)[1], "text/html; charset=utf-8")
    assert answer.headers["content-type"] == ASSETS.get(path.removeprefix("/page/"), drawn)
    assert answer.headers["cache-control"] == "private, no-cache"
    again = get(path, **{"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    assert get(path, **{"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", [*PATHS, *DRAWN])
def test_the_policy_lets_in_nothing_from_elsewhere(path):
    policy = dict(part.strip().split(" ", 1) for part in get(path).headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        *(f"/page/{name}" for name in TEMPLATES),
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page/x.js",
        "/page/docs",
        "/page/examples/example-0.png",
        "/page/examples/example-9.png",
    ],
)
def test_what_is_not_in_the_table_is_not_found(path):
    assert get(path).status_code == 404


def test_scripts_import_what_is_served_and_make_no_markup_of_text():
    scripts = {name: read(name) for name in ASSETS if name.endswith(".js")}
    reached, waiting = set(), [*SCRIPTS]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        imported = re.findall(r'from "(\.[\w./]+)"', scripts[name])
        found = [posixpath.normpath(posixpath.join(posixpath.dirname(name), other)) for other in imported]
        waiting += [other for other in found if other not in reached]
    assert reached == scripts.keys()
    for name, script in scripts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script), (
            name
        )
        assert not re.search(r"https?://|localStorage|indexedDB|cookie|sendBeacon", script), name


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_hold_no_script_style_or_handler_of_their_own(name):
    template = read(name)
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://|javascript:", template)
    assert re.findall(r"<script[^>]*>(.*?)</script>", template, re.DOTALL) in ([], [""])


def test_the_page_knows_the_limits_and_whether_a_key_is_needed():
    config = ServeConfig(classifiers=("claims",), max_image_bytes=123, max_body_bytes=456, max_text_chars=7)
    content = get("/", config=config).text
    assert 'data-max-image-bytes="123" data-max-body-bytes="456" data-max-text-chars="7"' in content
    assert 'data-key-variable=""' in content
    assert f'data-key-variable="{API_KEY_VARIABLE}"' in get("/", locked=True).text


def test_pictures_to_try_first_are_small_and_have_texts():
    listed = get("/page/examples.json").json()
    assert [example["name"] for example in listed] == list(EXAMPLES)
    assert len({example["text"] for example in listed}) == 8
    pictures = {get(f"/page/examples/{name}").content for name in EXAMPLES}
    assert len(pictures) == 8
    for content in pictures:
        assert Image.open(io.BytesIO(content)).size == pytest.approx((112, 112), abs=30)


def palettes() -> dict[str, dict[str, str]]:
    """Return the colours of each look; the dark one and paper say only what they change."""
    light, dark, paper = (
        dict(re.findall(r"--([\w-]+): ([^;]+);", block))
        for block in re.findall(r":root \{(.*?)\}", read("base.css") + read("style.css"), re.S)
    )
    return {"light": light, "dark": {**light, **dark}, "paper": {**light, **paper}}


def channels(colour: str) -> list[float]:
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]


def contrast(one: list[float], other: list[float]) -> float:
    """Contrast ratio of two colours (Web Content Accessibility Guidelines 2.2, 1.4.3)."""

    def luminance(colour: list[float]) -> float:
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("look", ["light", "dark", "paper"])
def test_every_text_and_every_sign_stands_out_enough(look):
    colours = palettes()[look]
    texts: list[tuple[str, str]] = [
        *itertools.product(("ink", "soft", "act", "bad"), ("page", "panel", "sunk")),
        ("ink", "warn"),
        ("on-act", "act"),
    ]
    signs = [
        *itertools.product(("edge", "focus", "good", "bad"), ("page", "panel", "sunk")),
        *itertools.product(("one", "zero", "mid"), ("panel", "track")),
        *itertools.product(("ink",), ("track", "panel")),
        ("warn-edge", "panel"),
    ]
    measured: dict[Any, float] = {pair: contrast(*(channels(colours[name]) for name in pair)) for pair in texts}
    assert {pair: ratio for pair, ratio in measured.items() if ratio < 4.5} == {}
    measured = {pair: contrast(*(channels(colours[name]) for name in pair)) for pair in signs}
    assert {pair: ratio for pair, ratio in measured.items() if ratio < 3} == {}


@pytest.mark.parametrize("look", ["light", "dark", "paper"])
@pytest.mark.parametrize("side", ["one", "zero"])
def test_the_most_coloured_word_can_be_read(look, side):
    colours = palettes()[look]
    share = float(colours["word-share"].removesuffix("%")) / 100
    behind = [
        share * mark + (1 - share) * panel
        for mark, panel in zip(channels(colours[side]), channels(colours["panel"]), strict=True)
    ]
    assert contrast(channels(colours["ink"]), behind) >= 4.5


def test_contrast_is_measured_as_the_guidelines_define_it():
    assert contrast(channels("#000"), channels("#fff")) == pytest.approx(21)
    assert contrast(channels("#777777"), channels("#fff")) == pytest.approx(4.48, abs=0.01)
