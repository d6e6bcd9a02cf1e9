"""What tests ask of pages: their tags, attributes and texts, as a browser would read them."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser

DOCUMENT_TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "script"}
DOCUMENT_TAGS |= {"nav", "template", "dialog"}
CONTENT_TAGS = {"h1", "h2", "h3", "p", "a", "b", "i", "br", "bdi", "ol", "li", "table", "tr", "th", "td", "div"}
CONTENT_TAGS |= {"thead", "tbody", "caption", "small", "span", "ul", "dl", "dt", "dd", "details", "summary", "img"}
CONTENT_TAGS |= {"code", "tfoot"}
CONTROL_TAGS = {"label", "input", "select", "option", "button", "output"}
PLOT_TAGS = {"figure", "figcaption", "svg", "title", "path", "text", "rect", "polyline", "circle", "clippath", "g"}


class Page(HTMLParser):
    """A page that was read.

    `texts` has the text inside of each element, by tag ("p") and by tag and class ("p.text").
    """

    VOID = ("meta", "img", "input", "br")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[list[str]] = []
        self.feed(content)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.elements.append((tag, dict(attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            kind = dict(attrs).get("class")
            self._open.append([tag, f"{tag}.{kind}"] if kind else [tag])
            for key in self._open[-1]:
                self.texts.setdefault(key, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for key in set(itertools.chain.from_iterable(self._open)):  # of two lists, one in the other: the inner
            self.texts[key][-1] += data


def check_inert(page: Page, hostile: str) -> None:
    """Make sure that a page has only elements and attributes of its own, and that words are in no attribute."""
    assert set(page.tags) <= DOCUMENT_TAGS | CONTENT_TAGS | CONTROL_TAGS | PLOT_TAGS
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("style", "srcdoc", "action", "xlink:href"), (tag, name)
        assert name != "href" or (tag == "a" and value.startswith("#"))
        assert name != "src" or (tag == "img" and value.startswith("data:image/jpeg;base64,"))
        assert hostile not in value
