"""The plots of a report as picture files, for papers and slides: through matplotlib, which is optional."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

from qwen_vl_classifier.extras import require

_INK, _SOFT, _ZERO, _ONE = "#1c2126", "#59636e", "#1d5fb4", "#b93d0a"
_STYLE = {
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qwen-vl-classifier",  # the same evaluation gives the same file
}


def draw_plots(curves: dict[str, Any], threshold: float) -> dict[str, bytes]:
    """Draw the curves of an evaluation.

    Args:
        curves: As `evaluate` returns them.
        threshold: The classifier's.

    Returns:
        File contents by name: an SVG and a PNG (1000 x 800 pixels) for each curve that there is.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report")
    figure_module = require("matplotlib.figure", extra="report")
    files: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE):
        for name, draw in _DRAWERS.items():
            if curves[name] is None:
                continue
            # A figure of its own, not pyplot's: no window, and no state that belongs to the caller's plots.
            figure = figure_module.Figure(figsize=(5, 4), layout="constrained")
            draw(figure.subplots(), curves[name], threshold)
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
                files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def _square(axes: Any, across: str, up: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=across, ylabel=up)


def _roc(axes: Any, curve: dict[str, Any], threshold: float) -> None:
    axes.plot([0, 1], [0, 1], color=_SOFT, linestyle="--", linewidth=1)
    axes.plot(curve["false_positive_rate"], curve["true_positive_rate"], color=_INK)
    _square(axes, "false positive rate", "true positive rate")


def _pr(axes: Any, curve: dict[str, Any], threshold: float) -> None:
    axes.plot(curve["recall"], curve["precision"], color=_INK)
    _square(axes, "recall", "precision")


def _reliability(axes: Any, bins: dict[str, Any], threshold: float) -> None:
    axes.plot([0, 1], [0, 1], color=_SOFT, linestyle="--", linewidth=1)
    axes.vlines(bins["probability"], bins["low"], bins["high"], color=_SOFT)
    axes.plot(bins["probability"], bins["share"], "o", color=_INK)
    _square(axes, "probability of class 1", "share of class 1 (95 % interval)")


def _histogram(axes: Any, counts: dict[str, Any], threshold: float) -> None:
    edges = counts["edges"]
    widths = [0.9 * (after - before) for before, after in itertools.pairwise(edges)]
    for label, colour, side in ((1, _ONE, 1), (0, _ZERO, -1)):
        heights = [side * count for count in counts[f"class_{label}"]]
        axes.bar(edges[:-1], heights, widths, align="edge", color=colour, label=f"class {label}")
    axes.axhline(0, color=_SOFT, linewidth=1)
    axes.axvline(threshold, color=_SOFT, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set(xlim=(0, 1), xlabel="probability of class 1", ylabel="examples")
    axes.legend()


def _risk_coverage(axes: Any, curve: dict[str, Any], threshold: float) -> None:
    axes.plot(curve["coverage"], curve["risk"], color=_INK)
    stored = curve["stored"]
    if stored is not None and stored["risk"] is not None:
        axes.plot(stored["coverage"], stored["risk"], "o", color=_ONE, label="the stored band")
        axes.legend()
    axes.set(xlim=(0, 1.01), xlabel="share of examples answered", ylabel="share of these wrong")
    axes.set_ylim(bottom=0)


def _cost(axes: Any, curve: dict[str, Any], threshold: float) -> None:
    lines = {
        "stored": ("stored threshold", _INK, "-"),
        "calibrated": ("threshold 1 − w", _ZERO, "-"),
        "best": ("best on these rows", _SOFT, "--"),
        "trivial": ("always or never 1", _ONE, ":"),
    }
    for name, (words, colour, style) in lines.items():
        axes.plot(curve["miss_weight"], curve[name], color=colour, linestyle=style, label=words)
    axes.set(xlim=(0, 1), xlabel="weight w of a missed example", ylabel="mean cost")
    axes.set_ylim(bottom=0)
    axes.legend()


_DRAWERS: dict[str, Callable[[Any, dict[str, Any], float], None]] = {
    "roc": _roc,
    "pr": _pr,
    "reliability": _reliability,
    "histogram": _histogram,
    "risk_coverage": _risk_coverage,
    "cost": _cost,
}
