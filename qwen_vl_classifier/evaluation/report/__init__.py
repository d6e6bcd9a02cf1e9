"""An evaluation as files: `evaluation.json` for programs, `report.html` for people.

The report is one file that works from a disk, a mail or a bucket: no script, no font and no picture is loaded. Texts,
ids and label names come from strangers, so all of them are escaped, and a content security policy lets nothing but
the report's own style sheet through.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
import uuid
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.evaluation.report.summary import percent, summarise


def write_report(evaluation: dict[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write `evaluation.json`, exactly the evaluation, and `report.html`, one self-contained page about it.

    Args:
        evaluation: As `evaluate` returns it.
        folder: Where to write; made if missing. Older files of these two names are replaced.

    Returns:
        The path of `report.html`.

    Raises:
        ConfigError: The folder cannot be written.
    """
    folder = Path(folder)
    page = render_report(evaluation)
    content = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # UTF-8 has no half surrogate pairs; JSON spells them with the same backslash escape as Python.
        _replace(folder / "evaluation.json", content.encode("utf-8", "backslashreplace"))
        _replace(folder / "report.html", page.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(
            f"{folder}: the report cannot be written ({error.strerror or type(error).__name__}); "
            "give a folder that can be written, on a disk with room"
        ) from error
    return folder / "report.html"


def render_report(evaluation: dict[str, Any]) -> str:
    """Return the page of `report.html`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "csp_hash": _csp_hash}
    template = importlib.resources.files(__name__).joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(summarise(evaluation))


def _csp_hash(content: str) -> str:
    """Name a style sheet by its hash (Content Security Policy level 3, section 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
