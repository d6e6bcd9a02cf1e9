"""Measure the built-in backbone without training: is it right about scenes it never saw?

    python benchmarks/builtin.py            # prints the table, one JSON object a line before it
    python benchmarks/builtin.py --write    # and puts it into docs/builtin.md

Scenes come from the split "evaluation", which pre-training never draws from.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen_vl_classifier import Backbone, Classifier, Example
from qwen_vl_classifier.data.drawing import draw, sample_scene
from qwen_vl_classifier.data.scenes import KINDS, UNSEEN_PAIRS, Kind, scene_rng, statements

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "builtin.md"
BEGIN, END = "<!-- table begins -->\n", "<!-- table ends -->\n"


def balanced_rows(
    kind: Kind, count: int, *, seed: int, size: tuple[int, int] | None = None, unseen: bool = False
) -> Iterator[Example]:
    """Yield as many true as false statements of one kind, each about a scene of its own.

    Args:
        kind: Kind of the statements.
        count: How many, an even number.
        seed: Of the scenes.
        size: Of the pictures; `None` takes those of pre-training.
        unseen: Only statements that name a pair which pre-training never drew.
    """
    names = tuple(f"{colour} {shape}" for colour, shape in UNSEEN_PAIRS)
    room = {0: count // 2, 1: count // 2}
    index = 0
    while any(room.values()):
        rng = scene_rng("evaluation", seed, index)
        index += 1
        scene = sample_scene(rng, size=size, exclude=frozenset() if unseen else UNSEEN_PAIRS)
        lines = statements(scene, rng, 6, kinds=(kind,), exclude=frozenset() if unseen else UNSEEN_PAIRS)
        fitting = [s for s in lines if room[s.label] and (not unseen or any(name in s.text for name in names))]
        if fitting:
            room[fitting[0].label] -= 1
            yield Example(draw(scene), fitting[0].text, fitting[0].label)


def accuracy(classifier: Classifier, rows: list[Example]) -> float:
    """Return the share of right answers."""
    return float(np.mean(classifier.predict(rows) == [row.label for row in rows]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=600, help="statements of each kind (default: %(default)s)")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/builtin.md")
    options = parser.parse_args()
    classifier = Classifier.zero_shot(Backbone.load(options.model))
    wanted: list[tuple[str, Kind, tuple[int, int] | None, bool]] = [(kind, kind, None, False) for kind in KINDS]
    wanted.append(("existence, pairs never seen", "existence", None, True))
    wanted += [(f"{kind}, 196 x 196 pixels", kind, (196, 196), False) for kind in ("existence", "exactly")]
    lines = ["| statements | rows | accuracy ± s.e. |", "|---|---|---|"]
    for seed, (name, kind, size, unseen) in enumerate(wanted):
        rows = list(balanced_rows(kind, options.rows, seed=seed, size=size, unseen=unseen))
        value = accuracy(classifier, rows)
        print(json.dumps({"statements": name, "rows": len(rows), "accuracy": value}), flush=True)
        error = math.sqrt(value * (1 - value) / len(rows))
        lines.append(f"| {name} | {len(rows)} | {value:.3f} ± {error:.3f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table + text[text.index(END) :], encoding="utf-8")


if __name__ == "__main__":
    main()
