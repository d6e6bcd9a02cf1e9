"""How commands that train end: what was saved where, and the next command to type."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from pathlib import Path

_WIDTH = 80
_PROGRAM = "qwen-vl-classifier"
_COLUMNS = ("image", "text", "label", "id")


def wrapped(text: str) -> str:
    """Break a paragraph into lines of 80 columns, all but the first indented."""
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def command_line(*arguments: object) -> str:
    """Write a command as it is typed in a shell, indented."""
    return f"  {shlex.join([_PROGRAM, *map(str, arguments)])}"


def features_line(folder: Path | None) -> str:
    """Describe where features are kept and how many bytes all of them take, or how to keep them."""
    if folder is None:
        return "Features: not kept; --features FOLDER keeps them for later runs"
    size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return f"Features: kept in {folder} ({_bytes(size)} in all)"


def next_commands(
    out: Path, flags: argparse.Namespace, *, data: str | None = None, start: Path | None = None
) -> list[str]:
    """Return what to type after training, with the paths and options that are in use.

    Args:
        out: The folder of the new classifier.
        flags: Those of `add_data_flags` and `add_features_flag`.
        data: Labelled rows that had no say in what was chosen, if there are any.
        start: The classifier with which the new one is to be compared, if any.
    """
    folders = [out] if start is None else [start, out]
    report = out.with_name(f"{out.name}-{'report' if start is None else 'comparison'}")
    measure = command_line("evaluate", *folders, data or "NEW_DATA", *_data_flags(flags), "--out", report)
    if data:
        return [f"Next: see its mistakes in {data}", measure]
    what = "measure it" if start is None else "compare both"
    return [
        "Next: try it on pictures in a web page",
        command_line("serve", out),
        f"Then {what} on labelled rows that it was not trained on (NEW_DATA)",
        measure,
    ]


def _data_flags(flags: argparse.Namespace) -> list[str]:
    """Return the options that say how rows are read and where features are kept, where they are not the defaults."""
    found = []
    for name in _COLUMNS:
        column = getattr(flags, f"{name}_column", name)
        if column != name:
            found += [f"--{name}-column", column]
    if flags.text is not None:
        found += ["--text", flags.text]
    if flags.features:
        found += ["--features", str(flags.features)]
    return found + (["--allow-outside"] if flags.allow_outside else [])


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
