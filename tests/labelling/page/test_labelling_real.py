"""The labelling page before the real command with the built-in backbone: fifty answers, a kill, two people, the end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from qwen_vl_classifier.scenes.colour_match import write_task
from tests.labelling.page.labelling_actions import ready

pytestmark = pytest.mark.soak

ROWS = 64
WORDS = ("--text", "All shapes have one colour.", "--class-names", "mixed,matching", "--quiet", "--no-open-browser")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures whose names say what is right, in one folder."""
    folder = tmp_path_factory.mktemp("scenes")
    write_task(folder / "data", train=ROWS, test=4, new=1)
    (folder / "photos").mkdir()
    for number, picture in enumerate(sorted((folder / "data" / "train").rglob("*.png"))):
        shutil.copy(picture, folder / "photos" / f"{picture.parent.name}-{number}.png")
    return folder / "photos"


@contextmanager
def labelling(photos: Path, out: Path, *words: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """Run the command; gives the process, what follows the address of the page, and the port."""
    command = [sys.executable, "-m", "qwen_vl_classifier", "label", str(photos), "--out", str(out), *WORDS, *words]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)/(\?token=\S+)", process.stdout.readline())
            assert found is not None
            yield process, found[2], int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


def answer(page, count: int) -> list[str]:
    """Give the right answers by keyboard; return the names of the rows."""
    names = []
    for _ in range(count):
        ready(page)
        names.append(page.inner_text("#name"))
        page.keyboard.press("1" if names[-1].startswith("matching") else "0")
    ready(page)
    return names


def saved(out: Path) -> dict[str, int]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {Path(row["image"]).name: row["label"] for row in rows}


def test_fifty_answers_survive_undo_reload_and_kill(open_page, photos, tmp_path):
    out = tmp_path / "rows.jsonl"
    with labelling(photos, out) as (process, token, port):
        at = f"http://127.0.0.1:{port}"
        page = open_page(
            token, at=at, fails=["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", 401]
        )
        names = answer(page, 20)
        page.keyboard.press("u")
        expect(page.locator("#before")).to_contain_text("Taken back")
        assert page.inner_text("#name") == names.pop()
        names += answer(page, 6)
        shown = page.inner_text("#name")
        page.reload()
        ready(page)
        assert page.inner_text("#name") == shown
        expect(page.locator("#count")).to_have_text(f"25 of {ROWS} rows answered")
        process.kill()
        process.wait()
        names.append(shown)
        page.keyboard.press("1" if shown.startswith("matching") else "0")
        expect(page.locator("#notice")).to_contain_text("is not saved yet")
    with labelling(photos, out, port=port) as (_, token, _):
        expect(page.locator("#notice")).to_contain_text("Open the address that it printed")
        expect(page.locator("#name")).to_have_text(shown)
        other = page.context.new_page()
        other.goto(f"{at}/{token}")
        expect(page.locator("#state")).to_have_text("Saved")
        other.close()
        names += answer(page, 24)
        assert len({*names}) == len(names) == 50
        expect(page.locator("#count")).to_have_text(f"50 of {ROWS} rows answered")
        expect(page.locator("#refit")).to_contain_text("Learned from 50 labels")
        page.context.close()
    assert saved(out) == {name: int(name.startswith("matching")) for name in names}


def test_two_windows_and_two_people_at_once(open_page, photos, tmp_path):
    out = tmp_path / "rows.jsonl"
    with labelling(photos, out, "--annotator", "ann") as (_, token, port), \
            labelling(photos, out, "--annotator", "bob") as (_, other_token, other_port):  # fmt: skip
        pages = [open_page(token, at=f"http://127.0.0.1:{port}") for _ in range(2)]
        pages.append(open_page(other_token, at=f"http://127.0.0.1:{other_port}"))
        names = [answer(page, 2) for _ in range(6) for page in pages]
        mine = {name for turn in (names[0::3], names[1::3]) for pair in turn for name in pair}
        assert len(mine) == 24
        theirs = {name for pair in names[2::3] for name in pair}
        assert theirs - mine  # few are asked of both
        for page in pages:
            expect(page.locator("#annotators")).to_contain_text("ann24 answers")
            expect(page.locator("#annotators")).to_contain_text("bob12 answers")
        for page in pages:
            page.context.close()
    assert saved(out) == {name: int(name.startswith("matching")) for name in mine | theirs}


def test_the_end_is_a_classifier_and_a_report(open_page, photos, tmp_path):
    with labelling(photos, tmp_path / "rows.jsonl") as (_, token, port):
        page = open_page(token, at=f"http://127.0.0.1:{port}")
        ready(page)
        while not page.locator("#end").is_visible():  # more than there are rows: some come back for a second look
            answer(page, 1)
        expect(page.get_by_role("heading", name="All rows are done")).to_be_visible()
        page.locator("#end").get_by_role("button").click()
        page.get_by_role("button", name="Finish and train").click()
        expect(page.locator("#finish-title")).to_have_text("The classifier is ready")
        expect(page.locator("#finish-body")).to_contain_text("qwen-vl-classifier serve")
        with page.context.expect_page() as opened:
            page.get_by_role("link", name="Open the report").click()
        expect(opened.value.locator("h1").first).to_be_visible()
        page.context.close()
    assert (tmp_path / "rows-classifier" / "classifier.json").is_file()
