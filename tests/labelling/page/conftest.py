"""A stub of the labelling session behind the real page, for a browser whose pages are watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browsers import browser, open_page
from tests.labelling.page.page_stub import StubSession, make_page_app
from tests.serving.page.stub import running

__all__ = ["browser", "open_page"]


@pytest.fixture(scope="module")
def stub() -> Iterator[tuple[StubSession, str]]:
    behind = StubSession()
    with running(make_page_app(behind)) as address:
        yield behind, address


@pytest.fixture
def session(stub) -> StubSession:
    """The stub, as new."""
    stub[0].__init__()
    return stub[0]


@pytest.fixture
def address(stub, session) -> str:
    return stub[1]
