"""The page of the interface: everything that the OpenAPI document says, and commands that can be run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from tests.serving.page.stub import StubServer, description, make_app


class Page(HTMLParser):
    """What is looked at: ids, links within the page, the text of each section and of each command."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.sections: dict[str, str] = {}
        self.commands: list[str] = []
        self._section, self._in_command = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag != "script" or given == {"type": "module", "src": "page/docs/tryit.js"}
        assert "style" not in given
        if given.get("id"):
            self.ids.append(given["id"] or "")
        if (given.get("href") or "").startswith("#"):
            self.links.add((given["href"] or "")[1:])
        if tag == "section":
            self._section = given["aria-labelledby"] or ""
            self.sections[self._section] = ""
        if tag == "pre":
            self._in_command = True
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._in_command = False

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data
        if self._in_command:
            self.commands[-1] += data


def page_of(*, locked: bool = False) -> Page:
    app = make_app(StubServer(), ServeConfig(classifiers=("claims",)), locked=locked)
    return Page(TestClient(app, base_url="http://localhost:8000").get("/docs").text)


def operations() -> Iterator[tuple[str, str, Any]]:
    for path, methods in description(False)["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


@pytest.fixture(scope="module")
def page() -> Page:
    return page_of()


def test_every_route_says_what_it_answers(page: Page) -> None:
    for method, path, operation in operations():
        text = page.sections[f"{method}{re.sub('[{}]', '', path).replace('/', '-')}"]
        assert f"{method.upper()} {path}" in text
        assert operation["description"].replace("`", "") in text
        assert re.findall(r"^([1-5]\d\d)$", text, re.MULTILINE) == list(operation["responses"])


def test_every_shape_says_its_fields(page: Page) -> None:
    for name, shape in description(False)["components"]["schemas"].items():
        text = page.sections[f"shape-{name}"]
        for field, schema in shape["properties"].items():
            assert field in text
            assert schema.get("description", "").replace("`", "") in text


def test_types_are_said_in_words(page: Page) -> None:
    text = page.sections["shape-ClassifyResult"]
    assert re.search(r"^index required\n+integer\n", text, re.MULTILINE)
    assert re.search(r"^label\n+0 or 1 or null\n", text, re.MULTILINE)
    assert re.search(r"^probs\n+list of number or null\n", text, re.MULTILINE)
    assert re.search(r"^error\n+ErrorOfItem or null\n", text, re.MULTILINE)
    assert re.search(r"^image\n+list of file\n", page.sections["shape-ClassifyForm"], re.MULTILINE)


def test_links_lead_somewhere(page: Page) -> None:
    assert page.links <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("locked", [False, True])
def test_commands_are_what_a_shell_needs(locked: bool) -> None:
    commands = [shlex.split(command.replace("\\\n", " ")) for command in page_of(locked=locked).commands]
    bodies = [json.loads(words[words.index("-d") + 1]) for words in commands if "-d" in words]
    assert bodies == [
        example["value"]
        for _, _, operation in operations()
        if "requestBody" in operation
        for example in operation["requestBody"]["content"]["application/json"]["examples"].values()
    ]
    key, admin_key = (f"Authorization: Bearer ${name}" for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE))
    changes = 0
    for words in commands:
        assert words[0] == "curl"
        deletes = words[1:3] == ["-X", "DELETE"]
        path = words[3 if deletes else 1].removeprefix("http://localhost:8000")
        assert path in description(False)["paths"]
        is_change = deletes or (path == "/v1/models" and "-d" in words)
        assert (admin_key in words) == is_change
        assert (key in words) == (locked and not is_change and path not in ("/livez", "/readyz"))
        changes += is_change
    assert changes == 2


def test_hostile_words_are_shown_as_text() -> None:
    app = make_app(StubServer(), ServeConfig(classifiers=("claims",)))
    hostile = "<script>alert(1)</script>'\""
    document = json.loads(json.dumps(description(False)).replace("It is red.", json.dumps(hostile)[1:-1]))
    app.openapi = lambda: document  # type: ignore[method-assign]
    html = TestClient(app, base_url="http://localhost").get("/docs").text
    assert html.count("<script") == 1
    command = next(command for command in Page(html).commands if "classify" in command)
    words = shlex.split(command.replace("\\\n", " "))
    assert json.loads(words[-1]) == {"input": [{"text": hostile}]}
