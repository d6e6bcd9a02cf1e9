"""Make the pictures of docs/evaluation.md: two reports on synthetic scenes, in Debian's chromium.

    python scripts/screenshots.py            # writes docs/images/
    python scripts/screenshots.py --out DIR

The first classifier is sound. The second was trained, and is evaluated, on rows whose texts give the label away.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from qwen_vl_classifier import (
    Backbone,
    Example,
    FeatureStore,
    TrainConfig,
    evaluate,
    load_examples,
    train,
    write_report,
)
from qwen_vl_classifier.config import EvaluateConfig
from qwen_vl_classifier.data.scenes import write_dataset

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
CHROMIUM = "/usr/bin/chromium"
WIDTH = 1000


def scenes(folder: Path, name: str, seed: int, count: int) -> list[Example]:
    """Write scenes and load them."""
    return load_examples(write_dataset(folder, name=name, seed=seed, scenes=count, per_scene=3), require_labels=True)


def leaking(examples: list[Example]) -> list[Example]:
    """End the texts of class 1 in a way of their own, as texts that two people wrote might."""
    return [replace(row, text=f"{row.text} Yes, truly." if row.label else row.text) for row in examples]


def make_report(training: list[Example], rows: list[Example], backbone: Backbone, folder: Path) -> Path:
    """Train, evaluate and report."""
    store = FeatureStore(folder / "features")
    classifier = train(training, backbone=backbone, config=TrainConfig(heads="linear"), store=store).classifier
    evaluation = evaluate(classifier, rows, config=EvaluateConfig(slice_by="kind"), training=training, store=store)
    print(evaluation["sentence"])
    return write_report(evaluation, folder, examples=rows)


def photograph(report: Path, picture: Path, *, until: str, scheme: str) -> None:
    """Write a page as a PNG of 256 colours, from its top to the end of the element `until`."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme=scheme)
        page.goto(report.as_uri())
        end = page.locator(until).first.bounding_box()
        height = int(end["y"] + end["height"]) + 24
        content = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        browser.close()
    shot = Image.open(io.BytesIO(content)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    shot.save(picture, optimize=True)
    print(f"{picture.name}  {picture.stat().st_size:,} bytes")


def main() -> None:
    """Make both reports and photograph them."""
    parser = argparse.ArgumentParser(description="Make the pictures of docs/evaluation.md.")
    parser.add_argument("--out", type=Path, default=IMAGES, help="where to write them")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    backbone = Backbone.load("builtin:tiny")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training, rows = scenes(folder, "train", 0, 120), scenes(folder, "test", 1, 80)
        sound = make_report(training, rows, backbone, folder / "sound")
        leak = make_report(leaking(training), leaking(rows), backbone, folder / "leak")
        photograph(sound, out / "report.png", until=".plots", scheme="light")
        photograph(leak, out / "report-leak.png", until=".checks:not(.note)", scheme="dark")


if __name__ == "__main__":
    main()
