"""Messages, help, pages, documents and first lines of docstrings are in plain English, as far as patterns can tell."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HISTORY, RUSSIAN = "CHANGELOG.md", "README.ru.md"
NOUN_FOLLOWS = r"(?!longer|more|less|better|such|need|other|reason|difference|error|evidence|proof|work)\w"

BANNED = {
    r"\b(?:amid|anew|thereof|therein|whereof|hereby|culprits?|lodgers?)\b": ("load it anew", "load it again"),
    r"\bother than loopback\b": ("addresses other than loopback", "addresses that others can reach"),
    r"\b(?:of|most|holds?) so many\b": ("a GPU of so many GB", "a GPU with this much memory"),
    r"\b(?:it is|as) said\b": ("the start is kept, and it is said", "the start is kept, and a note says so"),
    r"\bwanted\b": ("saw 3, wanted 2", "saw 3, expected 2"),
    r"\bis asked decides\b": ("What is asked decides.", "You get the type that you request."),
    r"\bSaved is loaded\b": ("Saved is loaded.", "Saving and loading round-trip exactly."),
    r"(?:^|[.!?:;] )[Ww]ho(?:ever)? [^.?!]*\b\w+s [^.?!]*[.](?=\s|$)": (
        "Who can reach it runs code.",
        "Who may call it?",
    ),
    rf"(?<!here )\bis no {NOUN_FOLLOWS}": ("it is no UTF-8 text", "it is no longer text, and there is no text"),
    r"\bin silence\b|\bwithout a word\b": ("nothing is lost in silence", "nothing is lost silently"),
    r"\b(?:does not|gets?|getting) on(?=[.,;)]|$)": ("a worker that gets on.", "a worker that makes progress"),
    r"\b(?:if|where) that is so\b": ("put it back, if that is so", "put it back if it was killed"),
    r"\bfor ever\b": ("it waits for ever", "it waits forever"),
}
"""Patterns, each with a text that it finds and one that it leaves."""


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield texts of a file that people read, with their lines."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".js":
        for match in re.finditer(r'"([^"\n]*)"|`([^`]*)`', source):
            yield source.count("\n", 0, match.start()) + 1, match[1] or match[2] or ""
        return
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    docstrings = set()
    for node in ast.walk(ast.parse(source)):  # a docstring comes after what it describes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.add(node.body[0].value)
                yield node.body[0].lineno, docstring.split("\n")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.lineno, node.value


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """All texts that people read, with the place of each."""
    files = [path for path in ROOT.glob("*.md") if path.name not in (HISTORY, RUSSIAN)]
    for folder in ("qwen_vl_classifier", "docs", ".github"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".html", ".js", ".md", ".py", ".yml")]
    return [(f"{path.relative_to(ROOT)}:{line}", text) for path in sorted(files) for line, text in texts_of(path)]


def test_texts_are_found(texts):
    assert {"README.md", "docs/index.md", "qwen_vl_classifier/errors.py"} <= {place.split(":")[0] for place, _ in texts}
    assert ("qwen_vl_classifier/errors.py:1", "Every error that this package raises on purpose.") in texts


def test_no_text_has_a_banned_phrase(texts):
    banned = re.compile("|".join(BANNED))
    found = [(place, text, banned.search(text)) for place, text in texts]
    assert [f"{place}: {match[0]!r} in {text[:300]!r}" for place, text, match in found if match] == []


@pytest.mark.parametrize("pattern", BANNED)
def test_a_pattern_finds_what_it_is_for(pattern):
    found, left = BANNED[pattern]
    assert re.search(pattern, found)
    assert not re.search(pattern, left)
