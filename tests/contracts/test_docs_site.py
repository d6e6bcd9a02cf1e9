"""The documentation site builds without a warning, names everything public, and opens without a network."""

from __future__ import annotations

import functools
import logging
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from playwright.sync_api import sync_playwright

import qwen_vl_classifier
from qwen_vl_classifier.cli.main import VERBS, build_parser
from tests.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]


class Warned(logging.Handler):
    """Keeps the warnings of MkDocs and its plugins."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once, as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    warned = Warned()
    log = logging.getLogger("mkdocs")
    log.addHandler(warned)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)  # where mkdocstrings looks for the package
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
    finally:
        log.removeHandler(warned)
    assert not warned.messages
    return folder


def page(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


def test_every_public_name_is_described(site):
    anchors = set(re.findall(r' id="qwen_vl_classifier\.([\w.]+)"', page(site, "reference/python.html")))
    assert set(qwen_vl_classifier.__all__) - {"__version__"} <= anchors


def test_every_option_of_every_verb_is_described(site):
    commands = page(site, "reference/commands.html")
    shared, *parts = re.split(f'<h2 id="({"|".join(VERBS)})"', commands)
    described = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(described) == list(VERBS)
    for verb, text in described.items():
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(verb))) - {"--help", "--help-all"}
        assert not {flag for flag in flags if flag not in shared + text}, verb


def help_of(verb: str) -> str:
    usage = re.compile(r"^usage: .*?\n\n", re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        verbs = next(action for action in build_parser(full_help=True)._actions if action.dest == "verb")
        return usage.sub("", verbs.choices[verb].format_help())


def test_every_route_is_described(site):
    routes = page(site, "reference/http.html")
    app = qwen_vl_classifier.create_app(qwen_vl_classifier.ServeConfig(classifiers=("claims",)))
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in routes


def test_nothing_is_loaded_from_elsewhere(site):
    """Links may lead to other sites; what a page loads by itself may not."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loads = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    for file in pages:
        assert not loads.findall(file.read_text(encoding="utf-8")), file
    for file in site.rglob("*.css"):
        assert not re.findall(r"""url\(["']?(?:https?:)?//""", file.read_text(encoding="utf-8")), file


@pytest.mark.soak
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_and_search_works_without_a_network(site, scheme):
    """In Debian's chromium, on a phone and on a desk."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on this machine")
    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(color_scheme=scheme)
        context.set_default_timeout(LIMIT * 1000)
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        for width in (390, 1280):
            opened = context.new_page()
            opened.set_viewport_size({"width": width, "height": 900})
            for name in ("index.html", "tutorial.html", "models.html", "reference/commands.html"):
                opened.goto(address + name)
                assert not opened.evaluate("document.documentElement.scrollWidth > window.innerWidth"), name
        opened.click("input.md-search__input")
        opened.keyboard.type("threshold")
        opened.wait_for_selector(".md-search-result__item")
        browser.close()
        server.shutdown()
    assert asked
    assert not [url for url in asked if not url.startswith(address)]


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, *_: object) -> None:
        pass
