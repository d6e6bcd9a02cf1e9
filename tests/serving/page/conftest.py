"""A server with the page, for a browser whose pages are watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from qwen_vl_classifier import ServeConfig
from tests.browsers import browser, open_page
from tests.serving.page.stub import StubServer, make_app, running

__all__ = ["browser", "open_page"]

CONFIG = ServeConfig(classifiers=("claims",), max_image_bytes=50_000, max_body_bytes=120_000, max_text_chars=200)


@pytest.fixture(scope="module")
def stub() -> Iterator[tuple[StubServer, str, FastAPI]]:
    behind = StubServer()
    app = make_app(behind, CONFIG)
    with running(app) as address:
        yield behind, address, app


@pytest.fixture
def server(stub) -> StubServer:
    """The stub, as new."""
    stub[0].__init__()
    return stub[0]


@pytest.fixture
def address(stub, server) -> str:
    return stub[1]
