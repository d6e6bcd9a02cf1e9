"""What the benchmark of scoring scores: scenes with statements, some of them damaged, and a classifier."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_vl_classifier import Backbone, Classifier
from qwen_vl_classifier.scenes.statements import write_dataset

STATEMENTS = 4  # about each picture; further rows repeat them with a number


def make_classifier(folder: Path) -> Path:
    """Save the zero-shot classifier of the built-in backbone."""
    return Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu", dtype="float32")).save(folder)


def write_rows(folder: Path, rows: int, *, per_picture: int, bad_every: int = 0) -> Path:
    """Write rows about drawn scenes.

    Args:
        folder: Where rows and pictures go.
        rows: How many.
        per_picture: Rows about each picture, one after the other.
        bad_every: One row in so many has a picture that cannot be used; 0 has none.

    Returns:
        The JSONL file.
    """
    pictures = -(-rows // per_picture)
    source = write_dataset(folder, split="evaluation", scenes=pictures, per_scene=STATEMENTS, name="scenes")
    drawn = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    about = [list(group) for _, group in itertools.groupby(drawn, key=lambda row: row["image"])]
    bad = itertools.cycle(_bad_pictures(folder))
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            statements = about[number // per_picture]
            position = number % per_picture
            row: dict[str, Any] = statements[position % len(statements)]
            text = row["text"] if position < len(statements) else f"{row['text']} ({position})"
            is_bad = bad_every and number % bad_every == bad_every - 1
            image = next(bad) if is_bad else row["image"]
            file.write(json.dumps({"image": image, "text": text, "id": f"row-{number}"}) + "\n")
    return path


def write_texts(path: Path, rows: int) -> Path:
    """Write rows without pictures."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"image": None, "text": f"There are {number} shapes.", "id": f"row-{number}"}) + "\n"
            for number in range(rows)
        )
    return path


def _bad_pictures(folder: Path) -> Iterator[str]:
    """Make pictures that are missing, cut off, no picture, and far too large for memory, and yield their paths."""
    whole = next((folder / "images").glob("*.png")).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("This is no picture.\n")
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    yield from ("gone.png", "cut.png", "words.png", "bomb.png")
