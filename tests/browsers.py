"""A browser and pages that are watched, for the tests of all pages.

A `conftest.py` imports the fixtures, and adds `address`, where its page is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.page.stub import MILLISECONDS

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")  # no longer: its event loop would be in the way of tests that run their own
def browser() -> Iterator:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no browser: {CHROMIUM} is missing (Debian's package chromium)")
    driver.expect.set_options(timeout=MILLISECONDS)
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=MILLISECONDS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page; afterwards, make sure that nothing went elsewhere and that nothing was logged or thrown.

    A browser logs by itself that a request failed; a test that wants one to fail says how: `fails=[429]`. With
    `still=True`, the page's timers wait until the test moves its clock: `page.clock.run_for(milliseconds)`.
    """
    contexts, urls, messages, expected, origins = [], [], [], [], {"data:image/"}

    def opened(path="", *, at=address, state="ready", fails=(), still=False, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(MILLISECONDS)
        contexts.append(context)
        expected.extend(map(str, fails))
        origins.update((_bare(at), f"blob:{_bare(at)}"))
        page = context.new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        if still:
            page.clock.install(time=0)
            page.clock.pause_at(1000)
        page.goto(f"{at}/{path}")
        if state:
            page.locator(f"#state[data-state={state}]").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in urls if not _bare(url).startswith(tuple(origins))] == []
    failed = re.compile(r"Failed to load resource: .*(\d{3}|ERR_\w+)")
    assert [line for line in messages if not (failed.match(line) and any(word in line for word in expected))] == []


def _bare(url: str) -> str:
    """Return an address without the name and password in it."""
    return re.sub("^(http://)[^/]*@", r"\1", url)
