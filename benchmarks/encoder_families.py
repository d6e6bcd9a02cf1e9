"""The same rows for checkpoints of several families, against transformers one by one and in padded batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder_baselines import PlainLoop
from encoder_rows import LAST, least_cosine
from family_checkpoints import FamilyShape, write_family_checkpoint
from pictures import examples, text
from racing import race

from qwen_vl_classifier import Backbone, Example

TARGETS = {"shared": 5.0}
"""By row, how many times faster the encoder is to be than the faster way of running transformers."""

ONE_BY_ONE, BATCHES, ENCODER = CONTENDERS = ("one by one", "batches", "encoder")


@dataclass(frozen=True, slots=True)
class FamilySizes:
    """How much work the rows do.

    Attributes:
        pictures: Distinct pictures of a row; a quarter of them where each has eight texts.
        side: Of the pictures, in pixels.
        texts: Rows without pictures.
        batch_size: Examples in a padded batch.
        repeats: Rounds that are counted.
    """

    pictures: int
    side: int
    texts: int
    batch_size: int
    repeats: int


@dataclass(frozen=True, slots=True)
class FamilyMeasured:
    """What a row came to.

    Attributes:
        family: The `model_type`.
        published: The checkpoint whose widths the measured one has.
        row: The name of the row.
        dtype: What all contenders computed in.
        tokens: Of all examples, each counted whole.
        seconds: By contender, the median of the rounds.
        least_cosine: Between the features of the encoder and those of transformers.
    """

    family: str
    published: str
    row: str
    dtype: str
    tokens: int
    seconds: Mapping[str, float]
    least_cosine: float

    def ratio(self, baseline: str) -> float:
        """How many times faster the encoder is."""
        return self.seconds[baseline] / self.seconds[ENCODER]

    @property
    def met(self) -> bool | None:
        """Whether the encoder reaches the row's target against both; `None` without one."""
        target = TARGETS.get(self.row)
        return None if target is None else min(self.ratio(ONE_BY_ONE), self.ratio(BATCHES)) >= target


def _shared(sizes: FamilySizes) -> list[Example]:
    return examples(max(1, sizes.pictures // 4), [(sizes.side, sizes.side)], (12, 20), texts_each=8)


def _texts(sizes: FamilySizes) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(None, text(rng, int(rng.integers(8, 65)))) for _ in range(sizes.texts)]


def _unique(sizes: FamilySizes) -> list[Example]:
    return examples(sizes.pictures, [(sizes.side, sizes.side)], (16, 16))


FAMILY_ROWS: dict[str, tuple[str, Callable[[FamilySizes], list[Example]]]] = {
    "shared": ("8 texts for each picture", _shared),
    "texts": ("texts of 8 to 64 tokens", _texts),
    "unique": ("unique pictures", _unique),
}
"""By name, what a row does and what makes its examples."""


def measure_family(
    shape: FamilyShape, rows: Sequence[str], dtypes: Sequence[str], sizes: FamilySizes
) -> Iterator[FamilyMeasured]:
    """Measure rows on a random checkpoint of a shape, on the CPU.

    Args:
        shape: Of the checkpoint, which is made for it.
        rows: Names out of `FAMILY_ROWS`.
        dtypes: What to compute in.
        sizes: How much work to do.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = write_family_checkpoint(shape, Path(place) / "checkpoint")
        for dtype in dtypes:
            backbone = Backbone.load(folder, device="cpu", dtype=dtype)  # type: ignore[arg-type]
            plain = PlainLoop(
                folder,
                backbone.processor,
                dtype=backbone.dtype,
                device=torch.device("cpu"),
                batch_size=sizes.batch_size,
            )
            for row in rows:
                yield _measured(shape, row, dtype, backbone, plain, FAMILY_ROWS[row][1](sizes), sizes.repeats)


def _measured(
    shape: FamilyShape,
    row: str,
    dtype: str,
    backbone: Backbone,
    plain: PlainLoop,
    rows: Sequence[Example],
    repeats: int,
) -> FamilyMeasured:
    features: dict[str, Any] = {}

    def keep(contender: str, encoded: Any) -> None:
        features[contender] = encoded

    times = race(
        {
            ONE_BY_ONE: lambda: keep(ONE_BY_ONE, plain.encode(rows, batch_size=1)),
            BATCHES: lambda: keep(BATCHES, plain.encode(rows)),
            ENCODER: lambda: keep(ENCODER, backbone.encode(rows, [LAST])[:, 0]),
        },
        repeats=repeats,
    )
    return FamilyMeasured(
        family=shape.family,
        published=shape.published,
        row=row,
        dtype=dtype,
        tokens=int(backbone.processor(rows)["attention_mask"].sum()),
        seconds={contender: times[contender].median for contender in CONTENDERS},
        least_cosine=min(least_cosine(features[ENCODER], features[other]) for other in (ONE_BY_ONE, BATCHES)),
    )


def family_table(done: Sequence[FamilyMeasured], machine: Mapping[str, Any]) -> list[str]:
    """Lay the rows of all families out beside each other, the same work in consecutive lines."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        "| work | dtype | family | widths of | one by one, ratio | batches, ratio | target | met "
        "| encoder, s | tokens a second |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, (work, _) in FAMILY_ROWS.items():
        for one in sorted((one for one in done if one.row == row), key=lambda one: one.dtype, reverse=True):
            target = f"≥ {TARGETS[row]:g}" if row in TARGETS else ""
            met = {True: "yes", False: "no", None: ""}[one.met]
            lines.append(
                f"| {work} | {one.dtype} | `{one.family}` | {one.published} | {one.ratio(ONE_BY_ONE):.2f} "
                f"| {one.ratio(BATCHES):.2f} | {target} | {met} | {one.seconds[ENCODER]:.2f} "
                f"| {one.tokens / one.seconds[ENCODER]:,.0f} |"
            )
    return lines
