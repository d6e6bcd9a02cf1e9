"""The plots of a report as picture files, for papers and slides: through matplotlib, which is optional."""

from __future__ import annotations

import io
import itertools
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_vl_classifier.evaluation.report.words import class_names
from qwen_vl_classifier.evaluation.verdict import percent
from qwen_vl_classifier.extras import require

_NAME_CHARACTERS = 24
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


def draw_plots(evaluation: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the confusion matrix and the curves of an evaluation.

    Args:
        evaluation: As `evaluate` returns it.

    Returns:
        File contents by name: an SVG and a PNG (1000 x 800 pixels) of the matrix and of each curve that there is.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report")
    figure_module = require("matplotlib.figure", extra="report")
    curves, threshold = evaluation["curves"], evaluation["classifier"]["threshold"]
    names = [_name(name) for name in class_names(evaluation["classifier"]["label_names"])]
    files: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Class names may be in any script; the SVG has them as text all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, draw in _DRAWERS.items():
            drawn = evaluation["confusion"] if name == "confusion" else curves[name]
            if drawn is None:
                continue
            # A figure of its own, not pyplot's: no window, and no state that belongs to the caller's plots.
            figure = figure_module.Figure(figsize=(5, 4), layout="constrained")
            draw(figure.subplots(), drawn, threshold, names)
            for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
                text.set_parse_math(False)  # a name may have dollar signs
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
                files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def _name(name: str) -> str:
    """Shorten the name of a class to what an axis has room for; signs that turn the direction of writing go."""
    line = " ".join("".join(sign for sign in name if unicodedata.category(sign) != "Cf").split())
    return textwrap.shorten(line, _NAME_CHARACTERS, placeholder="…") if " " in line else line[:_NAME_CHARACTERS]


def _confusion(axes: Any, counts: dict[str, int], threshold: float, names: Sequence[str]) -> None:
    kinds = (("true_negative", "false_positive"), ("false_negative", "true_positive"))
    words = {"false_positive": "false alarm", "false_negative": "missed"}
    totals = [sum(counts[kind] for kind in row) for row in kinds]
    shares = [
        [counts[kind] / total if total else 0.0 for kind in row] for row, total in zip(kinds, totals, strict=True)
    ]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.6)  # never so dark that black is hard to read
    for row, column in itertools.product((0, 1), (0, 1)):
        kind = kinds[row][column]
        share = percent(shares[row][column]) if totals[row] else "no rows"
        word = words.get(kind, "correct")
        axes.text(column, row, f"{counts[kind]:,}\n{word}\n{share}", ha="center", va="center", color=_INK)
    axes.set_xticks((0, 1), names)
    axes.set_yticks((0, 1), names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=f"answer at threshold {threshold:.3g}", ylabel="label (each row adds up to 100 %)")


def _square(axes: Any, across: str, up: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=across, ylabel=up)


def _roc(axes: Any, curve: dict[str, Any], threshold: float, names: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color=_SOFT, linestyle="--", linewidth=1)
    axes.plot(curve["false_positive_rate"], curve["true_positive_rate"], color=_INK)
    _square(axes, "false positive rate", "true positive rate")


def _pr(axes: Any, curve: dict[str, Any], threshold: float, names: Sequence[str]) -> None:
    axes.plot(curve["recall"], curve["precision"], color=_INK)
    _square(axes, "recall", "precision")


def _reliability(axes: Any, bins: dict[str, Any], threshold: float, names: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color=_SOFT, linestyle="--", linewidth=1)
    axes.vlines(bins["probability"], bins["low"], bins["high"], color=_SOFT)
    axes.plot(bins["probability"], bins["share"], "o", color=_INK)
    _square(axes, "probability of class 1", "share of class 1 (95 % interval)")


def _histogram(axes: Any, counts: dict[str, Any], threshold: float, names: Sequence[str]) -> None:
    edges = counts["edges"]
    widths = [0.9 * (after - before) for before, after in itertools.pairwise(edges)]
    for label, colour, side in ((1, _ONE, 1), (0, _ZERO, -1)):
        heights = [side * count for count in counts[f"class_{label}"]]
        axes.bar(edges[:-1], heights, widths, align="edge", color=colour, label=names[label])
    axes.axhline(0, color=_SOFT, linewidth=1)
    axes.axvline(threshold, color=_SOFT, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set(xlim=(edges[0], edges[-1]), xlabel="probability of class 1", ylabel="rows")
    axes.legend()


def _risk_coverage(axes: Any, curve: dict[str, Any], threshold: float, names: Sequence[str]) -> None:
    axes.plot(curve["coverage"], curve["risk"], color=_INK)
    stored = curve["stored"]
    if stored is not None and stored["risk"] is not None:
        axes.plot(stored["coverage"], stored["risk"], "o", color=_ONE, label="the stored band")
        axes.legend()
    axes.set(xlim=(0, 1.01), xlabel="share of rows answered", ylabel="share of these wrong")
    axes.set_ylim(bottom=0)


def _cost(axes: Any, curve: dict[str, Any], threshold: float, names: Sequence[str]) -> None:
    lines = {
        "stored": ("stored threshold", _INK, "-"),
        "calibrated": ("threshold 1 − w", _ZERO, "-"),
        "best": ("best on these rows", _SOFT, "--"),
        "trivial": ("always or never 1", _ONE, ":"),
    }
    for name, (words, colour, style) in lines.items():
        axes.plot(curve["miss_weight"], curve[name], color=colour, linestyle=style, label=words)
    axes.set(xlim=(0, 1), xlabel="weight w of a miss", ylabel="mean cost")
    axes.set_ylim(bottom=0)
    axes.legend()


_DRAWERS: dict[str, Callable[[Any, dict[str, Any], float, Sequence[str]], None]] = {
    "confusion": _confusion,
    "roc": _roc,
    "pr": _pr,
    "reliability": _reliability,
    "histogram": _histogram,
    "risk_coverage": _risk_coverage,
    "cost": _cost,
}
