"""Make the pictures for docs/images/, of reports and of the server's page, from synthetic scenes, in Debian's chromium.

    python scripts/screenshots.py            # writes docs/images/
    python scripts/screenshots.py --out DIR

The report of the demo and its comparison; then the report of a classifier that was trained, and is evaluated, on rows
whose texts give the label away. Then the page of a server of two classifiers, on a desk and on a phone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from qwen_vl_classifier import (
    Backbone,
    Classifier,
    Example,
    FeatureStore,
    TrainConfig,
    evaluate,
    load_examples,
    train,
    write_report,
)
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.scenes.statements import write_dataset

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
CHROMIUM = "/usr/bin/chromium"
WIDTH = 1000
REPORT_WIDTH = 1280  # the contents stand beside the report
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


def scenes(folder: Path, name: str, seed: int, count: int) -> list[Example]:
    """Write scenes and load them."""
    return load_examples(write_dataset(folder, name=name, seed=seed, scenes=count, per_scene=3), require_labels=True)


def leaking(examples: list[Example]) -> list[Example]:
    """End the texts of class 1 in a way of their own, as texts that two people wrote might."""
    return [replace(row, text=f"{row.text} Yes, truly." if row.label else row.text) for row in examples]


def make_report(training: list[Example], rows: list[Example], backbone: Backbone, folder: Path) -> Path:
    """Train, evaluate and report; the classifier is kept beside the report."""
    store = FeatureStore(folder / "features")
    classifier = train(training, backbone=backbone, config=TrainConfig(heads="linear"), store=store).classifier
    classifier.save(folder / "classifier")
    evaluation = evaluate(classifier, rows, config=EvaluateConfig(slice_by="kind"), training=training, store=store)
    evaluation["measured"] |= {"classifier": folder.name, "data": "test.jsonl"}
    print(evaluation["sentence"])
    return write_report(evaluation, folder, examples=rows)


def demo_pages(folder: Path) -> tuple[Path, Path]:
    """Run the demo, and compare its two classifiers; return the pages of its report and of the comparison."""
    demo, compared = folder / "demo", folder / "compared"
    program = [sys.executable, "-m", "qwen_vl_classifier"]
    classifiers = [str(demo / "classifier"), str(demo / "zero-shot")]
    data = str(demo / "data" / "test.csv")
    for arguments in (["demo", "--out", str(demo)], ["evaluate", *classifiers, data, "--out", str(compared)]):
        subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL)  # noqa: S603  # nothing in it comes from outside
    return demo / "report" / "report.html", compared / "comparison.html"


def photograph_report(browser: Browser, report: Path, picture: Path, *, until: str, scheme: str) -> None:
    """Write a page as a PNG of 256 colours, from its top to the end of the element `until`."""
    page = browser.new_page(viewport={"width": REPORT_WIDTH, "height": 800}, color_scheme=scheme)
    page.goto(report.as_uri())
    clip = {"x": 0, "y": 0, "width": REPORT_WIDTH, "height": bottom(page, until)}
    save(page, picture, {"full_page": True, "clip": clip})


def bottom(page: Page, element: str) -> int:
    """Return where an element ends, with some room, in pixels from the top of the page."""
    box = page.locator(element).first.bounding_box()
    assert box is not None, f"{element} is not shown"
    return int(box["y"] + box["height"]) + 24


def save(page: Page, picture: Path, options: dict[str, Any]) -> None:
    """Write what a page shows as a PNG of 256 colours, and close it."""
    content = page.screenshot(**options)
    page.close()
    shot = Image.open(io.BytesIO(content)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    shot.save(picture, optimize=True)
    print(f"{picture.name}  {picture.stat().st_size:,} bytes")


@contextlib.contextmanager
def serving(*classifiers: Path) -> Iterator[str]:
    """Serve classifiers in a process of their own, and give the address."""
    command = [sys.executable, "-m", "qwen_vl_classifier", "serve", *map(str, classifiers), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603  # nothing in it comes from outside
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+?:\d+", process.stdout.readline())
            assert found, "the server did not say where it listens"
            yield found[0]
        finally:
            process.terminate()


def try_it(page: Page, address: str, row: Example) -> None:
    """Classify an example with all classifiers, and have the first answer explained."""
    page.goto(address)
    page.locator("#state[data-state=ready]").wait_for(timeout=120_000)
    page.set_input_files("#files", str(row.image))
    page.fill("#text", row.text)
    page.select_option("#model", "")
    page.click("#classify")
    page.get_by_role("button", name="Explain this answer").first.click()
    page.locator(".words").wait_for()
    page.locator(".map img").evaluate("async (image) => { await image.decode(); }")
    page.locator("#past canvas").wait_for()
    page.mouse.move(0, 0)


def score_table(page: Page, address: str, table: Path) -> None:
    """Score a table with its pictures, and sort the rows by how close they are to the threshold."""
    page.goto(address)
    page.locator("#state[data-state=ready]").wait_for(timeout=120_000)
    page.set_input_files("#table-files", [table, *sorted(table.parent.rglob(f"{table.stem}-*.png"))])
    page.locator("#many-start button").first.click()
    page.locator("#many-again").wait_for(timeout=300_000)
    page.select_option("#row-order", "near")
    page.locator("#rows .mark").nth(1).click()
    page.locator("#rows canvas").nth(5).wait_for()
    page.mouse.move(0, 0)


def main() -> None:
    """Make both reports and the classifiers, and photograph all pages."""
    parser = argparse.ArgumentParser(description="Make the pictures of docs/images/.")
    parser.add_argument("--out", type=Path, default=IMAGES, help="where to write them")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    backbone = Backbone.load("builtin:tiny")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        training, rows = scenes(folder, "train", 0, 120), scenes(folder, "test", 1, 80)
        make_report(training, rows, backbone, folder / "sound")
        leak = make_report(leaking(training), leaking(rows), backbone, folder / "leak")
        report, comparison = demo_pages(folder)
        photograph_report(browser, report, out / "report.png", until="#cards", scheme="light")
        photograph_report(browser, comparison, out / "comparison.png", until="#cards li:nth-child(4)", scheme="light")
        photograph_report(browser, leak, out / "report-leak.png", until="header", scheme="dark")

        statements = Classifier.load(folder / "sound" / "classifier", backbone=backbone)
        statements = statements.calibrate(rows[::2], target_error_rate=0.01, abstention_examples=rows[1::2])
        statements.label_names = ("false", "true")
        zero_shot = Classifier.zero_shot(backbone)
        decisions = zip(statements.decide(rows), zero_shot.decide(rows), strict=True)
        row = next(row for row, (one, other) in zip(rows, decisions, strict=True) if one.decision != other.decision)
        with serving(statements.save(folder / "statements"), zero_shot.save(folder / "zero-shot")) as address:
            desk = browser.new_page(viewport={"width": WIDTH, "height": 2400})
            try_it(desk, address, row)
            save(desk, out / "page.png", {"clip": {"x": 0, "y": 0, "width": WIDTH, "height": bottom(desk, ".legend")}})
            many = browser.new_page(viewport={"width": WIDTH, "height": 2400})
            score_table(many, address, folder / "test.jsonl")
            save(many, out / "page-table.png", {"clip": many.locator("#many").bounding_box()})
            phone = browser.new_page(color_scheme="dark", **PHONE)
            try_it(phone, address, row)
            phone.locator("#result").evaluate("(part) => part.scrollIntoView({ behavior: 'instant' })")
            save(phone, out / "page-phone.png", {})
        browser.close()


if __name__ == "__main__":
    main()
