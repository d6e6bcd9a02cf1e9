"""The rows of the encoder's speed table: each does the same work in two ways, in turn, and gives their ratio."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from checkpoints import Shape
from encoder_baselines import PlainLoop, SentenceTransformers
from flops import attention_flops, linear_flops, products, runner
from pictures import examples, texts
from racing import Times, race, timed

from qwen_vl_classifier import Backbone, Example, FeatureStore, Tap, TrainConfig, train
from qwen_vl_classifier.backbone.devices import choose_token_budget
from qwen_vl_classifier.backbone.planning import plan
from qwen_vl_classifier.backbone.taps import POOLINGS
from qwen_vl_classifier.classifier.head import HeadSpec

LAST = Tap(-1, "mean")
_EPOCHS = 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work a row does.

    Attributes:
        pictures: Distinct pictures.
        texts: Rows without pictures.
        training: Rows of the training set.
        repeats: Rounds that are counted.
    """

    pictures: int
    texts: int
    training: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a row of the table came to.

    Attributes:
        row: Its name.
        dtype: What the work was to be done in, "auto" where the encoder chose.
        ratio: What is held against the target.
        baseline: Seconds of what it is measured against.
        ours: Seconds of the encoder.
        notes: More that was measured.
    """

    row: str
    dtype: str
    ratio: float
    baseline: float
    ours: float
    notes: Mapping[str, Any]


class Workshop:
    """A checkpoint, and everything that runs it, loaded when first asked for.

    Args:
        folder: The checkpoint.
        shape: Its sizes.
        batch_size: Of the baselines.
        sizes: How much work to do.
    """

    def __init__(self, folder: Path, shape: Shape, *, batch_size: int, sizes: Sizes) -> None:
        self.folder = folder
        self.shape = shape
        self.device = torch.device("cpu")
        self.batch_size = batch_size
        self.sizes = sizes
        self.backbone = cache(self._load_backbone)
        self.plain = cache(self._load_plain)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return self.shape.picture, self.shape.picture

    def encode(self, dtype: str, rows: Sequence[Example], taps: Sequence[Tap] = (LAST,)) -> npt.NDArray[np.float32]:
        """Encode rows with this project's encoder."""
        return self.backbone(dtype).encode(rows, taps)

    def _load_backbone(self, dtype: str) -> Backbone:
        return Backbone.load(self.folder, device=str(self.device), dtype=dtype)  # type: ignore[arg-type]

    def _load_plain(self, dtype: str) -> PlainLoop:
        backbone = self.backbone(dtype)
        return PlainLoop(
            self.folder,
            backbone.processor,
            dtype=backbone.dtype,
            device=self.device,
            batch_size=self.batch_size,
        )


def against(
    shop: Workshop, row: str, dtype: str, rows: Sequence[Example], baseline: PlainLoop | SentenceTransformers
) -> Measured:
    """Encode rows by a baseline and by the encoder."""
    times = race(
        {"baseline": lambda: baseline.encode(rows), "ours": lambda: shop.encode(dtype, rows)},
        repeats=shop.sizes.repeats,
    )
    notes = {"rows": len(rows), "least_cosine": least_cosine(baseline.encode(rows), shop.encode(dtype, rows)[:, 0])}
    return measured(row, dtype, times["baseline"], times["ours"], notes)


def measured(
    row: str, dtype: str, baseline: Times, ours: Times, notes: Mapping[str, Any], *, cost: bool = False
) -> Measured:
    """Take the ratio of medians, and note those of single rounds.

    Args:
        row: Its name.
        dtype: What the work was to be done in.
        baseline: Times of what it is measured against.
        ours: Times of the encoder.
        notes: More that was measured.
        cost: Divide our time by the baseline's, where the target is a cost instead of a speed-up.
    """
    above, below = (ours, baseline) if cost else (baseline, ours)
    rounds = [a / b for a, b in zip(above.seconds, below.seconds, strict=True)]
    return Measured(
        row,
        dtype,
        above.median / below.median,
        baseline.median,
        ours.median,
        {**notes, "rounds": [round(value, 3) for value in rounds]},
    )


def least_cosine(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    """Return the least cosine between features of the same row: both did the same work if it is near 1."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / norms).min())


def unique(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Encode pictures that come once each; hold the operations a second against those of matrix products alone."""
    rows = examples(shop.sizes.pictures, [shop.picture_size], (16, 16))
    plain = shop.plain(dtype)
    inputs = shop.backbone(dtype).processor(rows)
    grids = [(height, width) for _, height, width in inputs["image_grid_thw"].tolist()]
    lengths = inputs["attention_mask"].sum(1).tolist()
    patches = sum(height * width for height, width in grids)
    share = shop.batch_size / len(rows)
    alone = products(shop.shape, round(patches * share), round(sum(lengths) * share))
    times = race(
        {
            "plain": lambda: plain.encode(rows),
            "ours": lambda: shop.encode(dtype, rows),
            "products": runner(alone, getattr(torch, dtype), shop.device),
        },
        repeats=shop.sizes.repeats,
    )
    notes = {"rows": len(rows), "least_cosine": least_cosine(plain.encode(rows), shop.encode(dtype, rows)[:, 0])}
    yield measured("unique", dtype, times["plain"], times["ours"], notes)
    operations = linear_flops(products(shop.shape, patches, sum(lengths))) + attention_flops(shop.shape, grids, lengths)
    rate = linear_flops(alone) / times["products"].median
    for row, taken in (("products", times["ours"].median), ("products-plain", times["plain"].median)):
        notes = {"operations": operations, "gigaflops": operations / taken / 1e9, "products_gigaflops": rate / 1e9}
        yield Measured(row, dtype, operations / taken / rate, operations / rate, taken, notes)


def auto(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Encode in the dtype that is chosen here, against the plain loop in float32."""
    rows = examples(shop.sizes.pictures, [shop.picture_size], (16, 16))
    yield against(shop, "auto", dtype, rows, shop.plain("float32"))


def shared(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Encode eight texts about each picture."""
    count = max(1, shop.sizes.pictures // 4)
    rows = examples(count, [shop.picture_size], (12, 20), texts_each=8)
    yield against(shop, "shared", dtype, rows, shop.plain(dtype))


def mixed(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Encode pictures of three sizes with texts of 8 to 400 tokens, in no order, twice as many."""
    side = shop.shape.picture
    sizes = [(side, side), (side // 2, side // 2), (side * 3 // 2, side)]
    rows = examples(2 * shop.sizes.pictures, sizes, (8, 400))
    done = against(shop, "mixed", dtype, rows, shop.plain(dtype))
    yield replace(done, notes={**done.notes, **padding(shop.backbone(dtype), rows, shop.batch_size)})


def padding(backbone: Backbone, rows: Sequence[Example], batch_size: int) -> dict[str, float]:
    """Return how many tokens the decoder passes for each that is no padding: the encoder, and the plain loop."""
    prepared = backbone.prepare(rows)
    lengths = [len(row.ids) for row in prepared]
    budget = choose_token_budget(backbone.model.config, backbone.devices, backbone.dtype)
    batches = plan(prepared, token_budget=budget, share_prefixes=False, hidden_size=backbone.hidden_size)
    planned = sum(len(batch) * max(lengths[index] for row in batch for index in row) for batch in batches)
    in_order = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    plain = sum(len(batch) * max(batch) for batch in in_order)
    return {"padding": planned / sum(lengths), "padding_of_plain": plain / sum(lengths)}


def training(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Train a head for 20 epochs on a frozen backbone, without features and with features that were kept.

    The plain loop passes over the backbone once an epoch. Its epoch is measured on a part of the rows and multiplied.
    """
    rows = examples(shop.sizes.training, [shop.picture_size], (12, 20))
    part = rows[: shop.sizes.pictures]
    plain, backbone = shop.plain(dtype), shop.backbone(dtype)
    config = TrainConfig(taps=str(LAST), heads="mlp", epochs=_EPOCHS, patience=_EPOCHS)
    head = HeadSpec("mlp", backbone.hidden_size, config.units, config.dropout).build().to(shop.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)

    def fit(store: Path) -> None:
        train(rows, backbone=backbone, config=config, store=FeatureStore(store), progress=False)

    fit_part = race({"epoch": lambda: plain.train_epoch(part, head, optimizer)}, repeats=shop.sizes.repeats)["epoch"]
    whole = Times(tuple(_EPOCHS * len(rows) / len(part) * seconds for seconds in fit_part.seconds))
    with tempfile.TemporaryDirectory() as folder:
        first = timed(lambda: fit(Path(folder)))
        kept = race({"kept": lambda: fit(Path(folder))}, repeats=shop.sizes.repeats)["kept"]
    notes = {"rows": len(rows), "epochs": _EPOCHS, "rows_of_measured_epoch": len(part)}
    yield Measured("training-first", dtype, whole.median / first, whole.median, first, notes)
    yield Measured("training-kept", dtype, whole.median / kept.median, whole.median, kept.median, notes)


def taps(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Read every layer with every pooling, against one tap."""
    rows = examples(shop.sizes.pictures, [shop.picture_size], (16, 16))
    every = [Tap(layer, pooling) for layer in range(1, shop.shape.text.layers + 1) for pooling in POOLINGS]
    times = race(
        {"one": lambda: shop.encode(dtype, rows), "every": lambda: shop.encode(dtype, rows, every)},
        repeats=shop.sizes.repeats,
    )
    yield measured("taps", dtype, times["one"], times["every"], {"rows": len(rows), "taps": len(every)}, cost=True)


def half(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Read the middle layer, against the last one: rows without pictures, so that the decoder is all there is."""
    rows = texts(shop.sizes.texts, 200)
    middle = Tap(shop.shape.text.layers // 2, "mean")
    times = race(
        {"last": lambda: shop.encode(dtype, rows), "middle": lambda: shop.encode(dtype, rows, [middle])},
        repeats=shop.sizes.repeats,
    )
    yield measured("half", dtype, times["last"], times["middle"], {"rows": len(rows)}, cost=True)


def sentence_transformers(shop: Workshop, dtype: str) -> Iterator[Measured]:
    """Encode pictures that come once each, against sentence-transformers.

    Raises:
        ImportError: It cannot be used here.
    """
    baseline = SentenceTransformers(
        shop.folder, dtype=getattr(torch, dtype), device=shop.device, batch_size=shop.batch_size
    )
    rows = examples(shop.sizes.pictures, [shop.picture_size], (16, 16))
    yield against(shop, "sentence-transformers", dtype, rows, baseline)


ROWS: dict[str, Callable[[Workshop, str], Iterator[Measured]]] = {
    "unique": unique,
    "auto": auto,
    "shared": shared,
    "mixed": mixed,
    "training": training,
    "taps": taps,
    "half": half,
    "sentence-transformers": sentence_transformers,
}
"""What measures rows, by the names that the command line takes; some measure several rows at once."""

CHOSEN_DTYPE = ("auto", "training")
"""Those that are measured once, in the dtype that "auto" stands for."""
