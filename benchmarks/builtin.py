"""Measure the built-in backbone: zero-shot answers, transfer to concepts it was never asked about, size and speed.

    PYTHONPATH=. python benchmarks/builtin.py                    # prints tables, one JSON object a line before them
    PYTHONPATH=. python benchmarks/builtin.py --write            # and puts them into docs/figures/builtin.md
    PYTHONPATH=. python benchmarks/builtin.py --only zero-shot   # or transfer, or size

Scenes come from the split "evaluation", which pre-training never draws from.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tables import BUILTIN_PAGE, accuracy, put_table, with_error

from qwen_vl_classifier import Backbone, Classifier, Example, Tap, TrainConfig, train
from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN
from qwen_vl_classifier.scenes.drawing import Scene, draw, sample_scene
from qwen_vl_classifier.scenes.statements import KINDS, UNSEEN_PAIRS, Kind, names_any, scene_rng, statements
from tools.tiny.box_statements import BOX_KINDS, BoxKind, box_statements
from tools.tiny.boxes import draw_strip, sample_strip
from tools.tiny.lessons import about_one
from tools.tiny.pretrain import initialise

LARGER = ((252, 252), (280, 196))
"""Picture sizes beyond those of pre-training, whose largest are 224 x 224."""


def balanced(rows: Iterator[Example], count: int) -> list[Example]:
    """Take as many true as false rows from an endless stream."""
    room = {0: count // 2, 1: count // 2}
    taken = []
    for row in rows:
        if room[int(row.label or 0)]:
            room[int(row.label or 0)] -= 1
            taken.append(row)
            if not any(room.values()):
                break
    return taken


def about_scenes(
    kind: Kind, *, seed: int, size: tuple[int, int] | None = None, unseen: bool = False, pictures: int = 1
) -> Iterator[Example]:
    """Yield statements of one kind, each about a scene of its own.

    Args:
        kind: Kind of the statements.
        seed: Of the scenes.
        size: Of the pictures; `None` takes those of pre-training.
        unseen: Only statements that name a pair which pre-training never drew.
        pictures: How many pictures an example has; the statement says which it is about.
    """
    exclude = frozenset() if unseen else UNSEEN_PAIRS
    for index in itertools.count():
        rng = scene_rng("evaluation", seed, index)
        most = 8 if pictures == 1 else 5
        scenes = [sample_scene(rng, size=size or (112, 112), exclude=exclude, max_things=most) for _ in range(pictures)]
        if pictures == 1 and size is None:
            scenes = [sample_scene(rng, exclude=exclude)]
        which = int(rng.integers(pictures))
        lines = statements(scenes[which], rng, 6, kinds=(kind,), exclude=exclude)
        fitting = [line for line in lines if not unseen or names_any(line.text, UNSEEN_PAIRS)]
        if fitting:
            text = fitting[0].text if pictures == 1 else about_one(fitting[0].text, which)
            yield Example([draw(scene) for scene in scenes], text, fitting[0].label)


def about_boxes(kind: BoxKind, *, seed: int) -> Iterator[Example]:
    """Yield statements of one kind about pictures of three boxes, each about a picture of its own."""
    for index in itertools.count():
        rng = scene_rng("evaluation", seed, index)
        strip = sample_strip(rng, exclude=UNSEEN_PAIRS)
        fitting = [line for line in box_statements(strip, rng, 6, exclude=UNSEEN_PAIRS) if line.kind == kind]
        if fitting:
            yield Example(draw_strip(strip), fitting[0].text, fitting[0].label)


def as_jpeg(row: Example, quality: int) -> Example:
    """Return an example whose pictures went through JPEG."""
    pictures = []
    for picture in row.images:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)  # type: ignore[union-attr]
        pictures.append(buffer.getvalue())
    return Example(pictures, row.text, row.label)


def measure_zero_shot(model: str, count: int) -> list[str]:
    """Ask without training; return the lines of a table."""
    classifier = Classifier.zero_shot(Backbone.load(model))
    seeds = itertools.count()
    streams: list[tuple[str, Iterator[Example]]] = [(kind, about_scenes(kind, seed=next(seeds))) for kind in KINDS]
    streams.append(("existence, pairs never seen", about_scenes("existence", seed=next(seeds), unseen=True)))
    streams += [
        (f"{kind}, {size[0]} x {size[1]} pixels", about_scenes(kind, seed=next(seeds), size=size))
        for size in LARGER
        for kind in ("existence", "exactly", "relation")
    ]
    streams += [
        (f"{kind}, {pictures} pictures in one example", about_scenes(kind, seed=next(seeds), pictures=pictures))
        for pictures in (2, 3)
        for kind in ("existence", "exactly")
    ]
    streams += [(f"three boxes: {kind}", about_boxes(kind, seed=next(seeds))) for kind in BOX_KINDS]
    lines = ["| statements | rows | accuracy ± s.e. | after JPEG at quality 40 |", "|---|---|---|---|"]
    drops = []
    for name, stream in streams:
        rows = balanced(stream, count)
        value = accuracy(classifier, rows)
        coded = accuracy(classifier, [as_jpeg(row, 40) for row in rows])
        drops.append(value - coded)
        print(json.dumps({"statements": name, "rows": len(rows), "accuracy": value, "jpeg40": coded}), flush=True)
        lines.append(f"| {name} | {len(rows)} | {with_error(value, len(rows))} | {coded:.3f} |")
    lines.append(f"| mean loss by JPEG |  |  | {np.mean(drops):.3f} |")
    return lines


def _largest(scene: Scene) -> float:
    return max(scene.things, key=lambda thing: thing.radius).x


CONCEPTS: dict[str, Callable[[Scene], bool]] = {
    "more triangles than circles": lambda scene: (
        sum(t.shape == "triangle" for t in scene.things) > sum(t.shape == "circle" for t in scene.things)
    ),
    "all things share one colour": lambda scene: len({t.colour for t in scene.things}) == 1,
    "three or more colours": lambda scene: len({t.colour for t in scene.things}) >= 3,
    "the largest thing is on the left": lambda scene: _largest(scene) < scene.width / 2,
    "more large than small things": lambda scene: 2 * sum(t.large for t in scene.things) > len(scene.things),
    "two things are alike": lambda scene: max(Counter((t.colour, t.shape) for t in scene.things).values()) >= 2,
    "the topmost thing is red or blue": lambda scene: min(scene.things, key=lambda t: t.y).colour in ("red", "blue"),
    "something is in a corner": lambda scene: any(
        scene.cell(t) in ((0, 0), (0, 2), (2, 0), (2, 2)) for t in scene.things
    ),
}
"""Concepts that pre-training never names."""


def with_concept(concept: Callable[[Scene], bool], *, seed: int) -> Iterator[Example]:
    """Yield pictures labelled by a concept; the text says nothing."""
    for index in itertools.count():
        scene = sample_scene(scene_rng("evaluation", seed, index), size=(112, 112))
        yield Example(draw(scene), "Look at the picture.", int(concept(scene)))


def measure_transfer(model: str, labels: int) -> list[str]:
    """Train probes on frozen features, pre-trained and untrained; return the lines of a table."""
    lines = ["| concept | untrained | pre-trained | gain |", "|---|---|---|---|"]
    gains = []
    with tempfile.TemporaryDirectory() as folder:
        initialise(Path(folder), seed=0)
        backbones = {"untrained": Backbone.load(folder), "pre-trained": Backbone.load(model)}
        for number, (name, concept) in enumerate(CONCEPTS.items()):
            rows = balanced(with_concept(concept, seed=100 + number), labels)
            tests = balanced(with_concept(concept, seed=200 + number), 600)
            reached = {}
            for kind, backbone in backbones.items():
                result = train(rows, backbone=backbone, config=TrainConfig(), progress=False)
                reached[kind] = accuracy(result.classifier, tests)
            gains.append(reached["pre-trained"] - reached["untrained"])
            print(json.dumps({"concept": name, **reached}), flush=True)
            lines.append(f"| {name} | {reached['untrained']:.3f} | {reached['pre-trained']:.3f} | {gains[-1]:+.3f} |")
    lines.append(f"| mean |  |  | {np.mean(gains):+.3f} |")
    return lines


def measure_size(model: str, count: int) -> list[str]:
    """Measure bytes, loading and encoding; return the lines of a table."""
    started = time.perf_counter()
    backbone = Backbone.load(model)
    loading = time.perf_counter() - started
    folder = BUILTIN.get(model, Path(model))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    # 112 x 112 pixels are 64 patches; PNG bytes, as they come from a file.
    rows = []
    for row in itertools.islice(about_scenes("existence", seed=300, size=(112, 112)), count):
        buffer = io.BytesIO()
        picture = row.images[0]
        assert isinstance(picture, Image.Image)
        picture.save(buffer, "PNG")
        rows.append(Example(buffer.getvalue(), row.text))
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        backbone.encode(rows, [Tap(-1, "mean")])
        rates.append(count / (time.perf_counter() - started))
    values = {
        "checkpoint, MB": round(size, 1),
        "loading, seconds": round(loading, 2),
        "64-patch examples encoded a second, median of 3": round(float(np.median(rates))),
    }
    print(json.dumps(values), flush=True)
    return ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=600, help="statements of each kind (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=500, help="labelled scenes of a probe (default: %(default)s)")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    parser.add_argument("--only", choices=("zero-shot", "transfer", "size"), help="measure this part alone")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/figures/builtin.md")
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[str]]] = {
        "size": lambda: measure_size(options.model, 600),
        "zero-shot": lambda: measure_zero_shot(options.model, options.rows),
        "transfer": lambda: measure_transfer(options.model, options.labels),
    }
    for part, measure in parts.items():
        if options.only in (None, part):
            lines = measure()
            print("\n".join(lines), end="\n\n", flush=True)
            if options.write:
                put_table(BUILTIN_PAGE, part, lines)


if __name__ == "__main__":
    main()
