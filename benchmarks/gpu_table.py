"""The table of the GPU benchmark: its rows with their goals, and the JSON lines of a run laid out beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FAST_CARDS = ("H100", "H200", "GH200")
"""Cards whose rate the goals in pictures a second were set for."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        name: How JSON lines call it.
        part: The part of a run that measures it.
        work: What is measured, against what.
        style: How its value is written, as a format string.
        goal: What the value is to reach; `None` where it is only reported.
        at_most: Whether the value is to stay below the goal.
        fast: Whether the goal is for the cards of `_FAST_CARDS` alone.
        earlier: What an earlier version came to on an H100.
    """

    name: str
    part: str
    work: str
    style: str = "{:.2f}"
    goal: float | None = None
    at_most: bool = False
    fast: bool = False
    earlier: str = ""

    def met(self, value: float, card: str) -> bool | None:
        """Tell whether a value reaches the goal on a card; `None` where nothing is to be reached."""
        if self.goal is None or (self.fast and not any(name in card for name in _FAST_CARDS)):
            return None
        return value <= self.goal if self.at_most else value >= self.goal

    def written_goal(self) -> str:
        """Return the goal as the table has it."""
        if self.goal is None:
            return ""
        return f"{'≤' if self.at_most else '≥'} {self.goal:g}{' on an H100' if self.fast else ''}"


_E = "{:.1e}"
_RATE = "{:.1f}"
_TIMES = "{:.1f}x"
_SECONDS = "{:.1f} s"

_LARGE, _SMALL = "1,024-token pictures", "169-token pictures"

ROWS = (
    Row("product", "product", "8192^3 products alone, TFLOP/s", "{:.0f}", earlier="798"),
    Row("exact-float32", "exactness", "float32 against transformers, of the scale", _E, 5e-5, True, earlier="2e-5"),
    Row("exact-shared", "exactness", "shared prefixes against separate rows, float32", _E, 1e-5, True, earlier="3e-7"),
    Row("exact-adapter", "exactness", "an adapter written and read again, float32", _E, 1e-5, True, earlier="4e-7"),
    Row(
        "exact-dtype", "exactness", "error of bfloat16, divided by that of transformers in it", goal=1.25, at_most=True
    ),
    Row("exact-kernels", "exactness", "the same without own kernels", goal=1.25, at_most=True),
    Row("pass-large", "large", f"{_LARGE}: pass alone, a second", _RATE, 40, fast=True, earlier="16.7"),
    Row("share-large", "large", f"{_LARGE}: share of the product rate", goal=0.58, earlier="0.24"),
    Row("files-large", "large", f"{_LARGE}: from JPEG files, against the pass alone", goal=0.95, earlier="0.59"),
    Row("plain-large", "large", f"{_LARGE}: from JPEG files, against the plain loop", _TIMES, 8, earlier="2.1x"),
    Row("memory-large", "large", f"{_LARGE}: peak memory beside the weights, GiB", _RATE),
    Row("pass-small", "small", f"{_SMALL}: pass alone, a second", _RATE, earlier="92.8"),
    Row("files-small", "small", f"{_SMALL}: from JPEG files, against the pass alone", goal=0.95, earlier="0.49"),
    Row("plain-small", "small", f"{_SMALL}: from JPEG files, against the plain loop", _TIMES),
    Row("host", "host", "host work before a batch is on its way, of its pass", goal=0.05, at_most=True),
    Row("synchronisations", "host", "synchronisations in the pass of one batch", "{:.0f}", 1, True, earlier="108"),
    Row("products-share", "host", "matrix products, of the kernels' time", earlier="0.48"),
    Row("plain-texts", "texts", f"8 texts each, {_LARGE}: from JPEG files, against the plain loop", _TIMES, 40),
    Row("pass-texts", "texts", f"8 texts each, {_LARGE}: pass alone, rows a second", _RATE, earlier="117.5"),
    Row("training-second", "training", "LoRA, from the second epoch on, against Trainer + PEFT", _TIMES, 2.5),
    Row("training-first", "training", "LoRA, first epoch, against Trainer + PEFT", _TIMES),
    Row("training-memory", "training", "LoRA, peak memory beside the weights, of Trainer + PEFT's"),
    Row("score", "score", "`score` with one worker, against the pass alone", goal=0.9),
    Row("serve", "serve", "`serve` with 64 callers, against the same work offline", goal=0.85),
    Row("serve-tail", "serve", "`serve` at 80 % of its capacity, p99 divided by p50", goal=3, at_most=True),
    Row("budget", "budgets", "rate with the default token budget, of the best budget's", earlier="0.98"),
    Row("kernels", "budgets", "own kernels, against torch's operators"),
    Row("load", "start", "load", _SECONDS, earlier="2.6 s"),
    Row("fingerprint-first", "start", "fingerprint, for the first time", _SECONDS, earlier="7.1 s"),
    Row("fingerprint-again", "start", "fingerprint, files unchanged", _SECONDS),
    Row("train", "start", "`train` of 240 rows", _SECONDS, earlier="41 s"),
)

TABLE, KERNELS = "gpu", "gpu kernels"
"""Parts of the page that a run fills."""

_MACHINE = "machine"  # the first line of a run
_NOT_MEASURED = "not measured"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of a run; one that was cut off in the middle is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            lines.append(content)
    return lines


def table(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Lay the lines of a run out beside the goals.

    Args:
        lines: As `read_lines` returns them; the last one of a row counts.
    """
    by_row: dict[str, dict[str, Any]] = {}
    by_part: dict[str, dict[str, Any]] = {}
    machine: dict[str, Any] = {}
    for line in lines:
        if _MACHINE in line:
            machine = line[_MACHINE]
        elif "row" in line:
            by_row[line["row"]] = line
        elif "skipped" in line:
            by_part[line["part"]] = line
    head = [_about(machine) if machine else "This version has not run on a GPU.", ""]
    head += ["| work | earlier | goal | measured | met | more |", "|---|---|---|---|---|---|"]
    return head + [_line(row, by_row.get(row.name), by_part.get(row.part, {}), machine) for row in ROWS]


def _about(machine: dict[str, Any]) -> str:
    text = ", ".join(f"{name} {value}" for name, value in machine.items()) + "."
    if machine.get("dry"):
        text += " A dry run: shapes are tiny, and times mean nothing."
    return text


def _line(row: Row, line: dict[str, Any] | None, part: dict[str, Any], machine: dict[str, Any]) -> str:
    start = f"| {row.work} | {row.earlier} | {row.written_goal()} |"
    if line is None or "value" not in line:
        reason = (line or part).get("skipped", _NOT_MEASURED)
        return f"{start} {reason} | | |"
    judged = None if machine.get("dry") else row.met(line["value"], machine.get("card", ""))
    met = {True: "yes", False: "no", None: ""}[judged]
    return f"{start} {row.style.format(line['value'])} | {met} | {_more(line.get('notes', {}))} |"


def _more(notes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_written(value)}" for name, value in notes.items() if not isinstance(value, dict | list))


def _written(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def kernel_table(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Lay the profile of a run out: shares of kernel time by kind, then the kernels that took most of it."""
    profiles = [line for line in lines if line.get("row") == "products-share" and "value" in line]
    if not profiles:
        return [f"Kernels: {_NOT_MEASURED}."]
    notes: dict[str, Any] = profiles[-1]["notes"]
    shares: dict[str, float] = notes["shares"]
    kernels: Sequence[tuple[str, int, float]] = notes["kernels"]
    lines_of_table = [
        "Share of kernel time: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()) + ".",
        "",
        "| kernel | calls | share |",
        "|---|---|---|",
    ]
    return lines_of_table + [
        f"| `{name.replace('|', '/')}` | {calls} | {share:.1%} |" for name, calls, share in kernels
    ]
