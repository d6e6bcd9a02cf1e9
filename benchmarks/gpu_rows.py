"""The first rows of the GPU benchmark: exactness, the card's own rate, the pass, and the way from files to features."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from encoder_baselines import PlainLoop
from encoder_rows import least_cosine
from flops import attention_flops, linear_flops, products
from gpu_bench import LAST, TEXTS_EACH, Bench
from pictures import texts
from racing import Times, race

from qwen_vl_classifier import Example, Tap
from qwen_vl_classifier.backbone.layers.chosen_operators import VARIABLE, operators_for
from qwen_vl_classifier.backbone.processor import EncodedExample

_TORCH_ALONE = {VARIABLE: "torch"}  # of the environment: layers without own kernels
_ADAPTED_LAYERS = 4
_RANK = 8


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row came to.

    Attributes:
        row: Its name in the table.
        value: What is held against its goal.
        notes: More that was measured; lists and dictionaries are in the JSON line only.
    """

    row: str
    value: float
    notes: dict[str, Any] = field(default_factory=dict)


def product(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Measure the rate of one large product, as fast as the card computes."""
    side = bench.sizes.product
    operands = [torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2)]
    times = 1 if bench.dry else 30

    def multiply() -> None:
        for _ in range(times):
            torch.mm(*operands)

    taken = race({"product": multiply}, 5, within=seconds)["product"]
    bench.product_rate = times * 2 * side**3 / taken.median
    yield Reading("product", bench.product_rate / 1e12)


def exactness(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Compare features with transformers' own forward, with and without sharing, adapters and own kernels."""
    rows = [*bench.rows(bench.sizes.small, 10, texts_each=5), *texts(2, 20)]
    taps = [LAST, Tap(bench.shape.text.layers // 2, "mean"), Tap(-1, "last")]
    exact = bench.load("float32")
    plain = bench.load_plain(exact)
    with _whole_float32():
        theirs = reference(plain, rows, taps)
    bench.float32_features = ours = exact.encode(rows, taps)
    notes = {"rows": len(rows), "taps": len(taps)}
    yield Reading("exact-float32", _of_scale(ours, theirs), notes)
    yield Reading("exact-shared", _of_scale(ours, exact.encode(rows, taps, share_prefixes=False)), notes)
    del exact, plain
    bench.free_memory()
    if bench.backbone.dtype != torch.float32:
        fast = bench.backbone.encode(rows, taps)
        their_error = _error(reference(bench.plain, rows, taps), ours)
        our_error = _error(fast, ours)
        chosen = type(operators_for(bench.device, bench.dtype)).__name__  # Triton's, or torch's where those failed
        yield Reading(
            "exact-dtype", our_error / their_error, {"ours": our_error, "theirs": their_error, "operators": chosen}
        )
        with mock.patch.dict(os.environ, _TORCH_ALONE):
            without = bench.backbone.encode(rows, taps)
        notes = {"ours": _error(without, ours), "kernels against none": _of_scale(fast, without)}
        yield Reading("exact-kernels", notes["ours"] / their_error, notes)
    yield _adapter_round_trip(bench, rows)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Keep cuDNN from rounding the operands of convolutions to TF32: transformers embeds patches by one."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def reference(plain: PlainLoop, rows: Sequence[Example], taps: Sequence[Tap]) -> npt.NDArray[np.float32]:
    """Read features by transformers' forward, one row at a time and pooled by hand, shape (rows, taps, hidden)."""
    features = []
    for row in rows:
        inputs = {name: tensor.to(plain.model.device) for name, tensor in plain.inputs([row]).items()}
        with torch.no_grad():
            states = plain.model(**inputs, output_hidden_states=True).hidden_states
        read = [(states[tap.layer][0].float(), tap.pooling) for tap in taps]
        features.append(torch.stack([state[-1] if pooling == "last" else state.mean(0) for state, pooling in read]))
    return torch.stack(features).cpu().numpy()


def _of_scale(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """Return the largest difference at a tap over the largest value there, of the tap where it is worst."""
    return float((np.abs(ours - theirs).max((0, 2)) / np.abs(theirs).max((0, 2))).max())


def _error(features: npt.NDArray[np.float32], exact: npt.NDArray[np.float32]) -> float:
    """Return the length of the difference over that of the feature, on average."""
    return float((np.linalg.norm(features - exact, axis=2) / np.linalg.norm(exact, axis=2)).mean())


def _adapter_round_trip(bench: Bench, rows: Sequence[Example]) -> Reading:
    """Attach an adapter that changes features, write it, and read it into another backbone.

    Raises:
        MissingExtraError: PEFT is not installed.
    """
    from qwen_vl_classifier.backbone.adapters import add_adapter, read_adapter, write_adapter

    layers = min(_ADAPTED_LAYERS, bench.shape.text.layers)
    tap = Tap(layers - 1, "mean")
    features, folder = [], bench.folder / "adapter"
    backbone = bench.load("float32", num_layers=layers)
    plain_features = backbone.encode(rows, [tap])
    add_adapter(backbone, towers="llm", tap=tap, rank=_RANK, alpha=2 * _RANK)
    trained = [weight for weight in backbone.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.002)  # so that B is not zero
    backbone.mark_changed()
    features.append(backbone.encode(rows, [tap]))
    write_adapter(backbone, folder)
    again = bench.load("float32", num_layers=layers)
    read_adapter(again, folder)
    features.append(again.encode(rows, [tap]))
    return Reading(
        "exact-adapter", _of_scale(features[1], features[0]), {"changed by": _of_scale(features[0], plain_features)}
    )


def large(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Measure pictures of 1,024 tokens."""
    yield from _pictures(bench, seconds, "large", bench.sizes.large)


def small(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Measure pictures of 169 tokens."""
    yield from _pictures(bench, seconds, "small", bench.sizes.small)


def _three_ways(bench: Bench, seconds: float, rows: list[Example], prepared: list[EncodedExample]) -> dict[str, Times]:
    """Race the pass alone, files to features, and the plain loop on a part of the rows."""
    return race(
        {
            "pass": lambda: bench.backbone.encode_prepared(prepared, [LAST]),
            "files": lambda: bench.backbone.encode(rows, [LAST]),
            "plain": lambda: bench.plain.encode(rows[: bench.sizes.part]),
        },
        bench.sizes.repeats,
        within=seconds,
    )


def _pictures(bench: Bench, seconds: float, name: str, side: int) -> Iterator[Reading]:
    """Race the pass alone, files to features, and the plain loop, a text for each picture."""
    backbone, plain = bench.backbone, bench.plain
    rows, prepared = bench.enough_rows(side)
    part = rows[: bench.sizes.part]
    times = _three_ways(bench, seconds, rows, prepared)
    alone, files = times["pass"].median, times["files"].median
    counted = {"rows": len(rows), "rounds": len(times["pass"].seconds)}
    operations = _operations(bench, prepared)
    yield Reading(f"pass-{name}", len(rows) / alone, {**counted, "TFLOP/s": operations / alone / 1e12})
    if name == "large" and bench.product_rate:
        yield Reading("share-large", operations / alone / bench.product_rate)
    yield Reading(f"files-{name}", alone / files, {"rows/s": len(rows) / files, **_spread(times, "pass", "files")})
    cosine = least_cosine(plain.encode(part), backbone.encode(part, [LAST])[:, 0])
    yield Reading(
        f"plain-{name}",
        times["plain"].median / len(part) * len(rows) / files,
        {"plain loop, rows/s": len(part) / times["plain"].median, "least cosine": round(cosine, 5)},
    )
    if name == "large":
        yield Reading("memory-large", bench.peak_memory(lambda: backbone.encode_prepared(prepared, [LAST])))


def shared_texts(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Race eight texts a picture, from files, against the plain loop."""
    rows, prepared = bench.enough_rows(bench.sizes.large, texts_each=TEXTS_EACH)
    part = rows[: bench.sizes.part]
    times = _three_ways(bench, seconds, rows, prepared)
    files = times["files"].median
    ratio = times["plain"].median / len(part) * len(rows) / files
    yield Reading("plain-texts", ratio, {"rows": len(rows), "rows/s": len(rows) / files})
    yield Reading("pass-texts", len(rows) / times["pass"].median)


def budgets(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Compare token budgets on the pass alone, and the default one with torch's operators instead of own kernels."""
    _, prepared = bench.enough_rows(bench.sizes.large)
    prepared = prepared[: max(1, len(prepared) // 3)]  # there are many contenders
    contenders: dict[str, Callable[[], object]] = {
        str(budget): lambda budget=budget: bench.backbone.encode_prepared(prepared, [LAST], token_budget=budget)
        for budget in bench.sizes.budgets
    }
    contenders["default"] = lambda: bench.backbone.encode_prepared(prepared, [LAST])

    def without_kernels() -> None:
        with mock.patch.dict(os.environ, _TORCH_ALONE):
            contenders["default"]()

    times = race({**contenders, "without": without_kernels}, bench.sizes.repeats, within=seconds)
    rates = {name: len(prepared) / taken.median for name, taken in times.items()}
    without = rates.pop("without")
    yield Reading("budget", rates["default"] / max(rates.values()), rates)
    yield Reading("kernels", rates["default"] / without, {"without, a second": without})


def _operations(bench: Bench, prepared: Sequence[Any]) -> int:
    """Count the operations that a pass over rows cannot do without, each row with a picture of its own."""
    grids = [(height, width) for row in prepared for _, height, width in row.pictures.grids]
    lengths = [len(row.ids) for row in prepared]
    linear = linear_flops(products(bench.shape, sum(height * width for height, width in grids), sum(lengths)))
    return linear + attention_flops(bench.shape, grids, lengths)


def _spread(times: dict[str, Times], above: str, below: str) -> dict[str, str]:
    """Return the ratios of single rounds, the least and the most."""
    rounds = [a / b for a, b in zip(times[above].seconds, times[below].seconds, strict=True)]
    return {"rounds": f"{min(rounds):.2f} to {max(rounds):.2f}"}
