"""An evaluation or a comparison as files: JSON for programs, a page and a summary for people, plots as pictures.

The page is one file that works from a disk, a mail or a bucket: no script, no font and no picture is loaded. Texts,
ids, file names and label names come from strangers, so all of them are escaped, and a content security policy lets
nothing but the page's own style sheet, script and embedded pictures through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.errors import ConfigError, MissingExtraError
from qwen_vl_classifier.evaluation.report.comparison_page import summarise_comparison
from qwen_vl_classifier.evaluation.report.markdown import markdown
from qwen_vl_classifier.evaluation.report.panel_markdown import panel_markdown
from qwen_vl_classifier.evaluation.report.panel_page import MOST_BYTES, MOST_PICTURES, summarise_panel
from qwen_vl_classifier.evaluation.report.pictures import SMALL_SIDE, Thumbnails
from qwen_vl_classifier.evaluation.report.plots import draw_plots
from qwen_vl_classifier.evaluation.report.summary import summarise
from qwen_vl_classifier.files.pages import page_file, page_templates
from qwen_vl_classifier.files.room import check_inner_folders
from qwen_vl_classifier.files.whole import write_file

_PAGE = "evaluation/report/page"
_STYLES, _SCRIPTS = ("style.css",), ("gallery.js", "tuner.js")
_PANEL_STYLES, _PANEL_SCRIPTS = ("style.css", "panel.css"), ("sorting.js",)


def write_report(evaluation: dict[str, Any], folder: str | os.PathLike[str], *, examples: Source | None = None) -> Path:
    """Write `evaluation.json`, exactly the evaluation, `report.html`, one self-contained page, `summary.md` and plots.

    The plots, `plots/*.svg` and `plots/*.png`, need matplotlib (extra `report`). Without it they are left out, and one
    line of page and summary says so; the page draws its own. The report of a panel has no plots as files.

    Args:
        evaluation: As `evaluate` or `evaluate_panel` returns it.
        folder: Where to write; made if missing. Older files of these names are replaced.
        examples: The rows that were evaluated, in their order: anything that `load_examples` takes. The page takes
            thumbnails from them. Pictures that cannot be opened are left out. Of an evaluation as `evaluate` returned
            it, no picture is opened again unless they were too many for their thumbnails to be kept.

    Returns:
        The path of `report.html`.

    Raises:
        ConfigError: The folder cannot be written, or the examples are not those of the evaluation.
    """
    folder = Path(folder)
    if _is_of_panel(evaluation):
        page = render_report(evaluation, examples=examples)
        summary = panel_markdown(evaluation).encode("utf-8", "replace")
        files = {"evaluation.json": _json(evaluation), "summary.md": summary}
        _write(folder, files | {"report.html": page.encode("utf-8", "replace")})
        return folder / "report.html"
    check_inner_folders(folder, "plots")
    try:
        plots, without = draw_plots(evaluation), None
    except MissingExtraError as error:
        plots, without = {}, f"Plot files were not written: {error}"
    page = render_report(evaluation, examples=examples, without=without)
    files = {
        "evaluation.json": _json(evaluation),
        "summary.md": markdown(evaluation, plots=sorted(plots), without=without).encode("utf-8", "replace"),
        **{f"plots/{name}": content for name, content in plots.items()},
        "report.html": page.encode("utf-8", "replace"),
    }
    _write(folder, files)
    return folder / "report.html"


def write_comparison(
    comparison: dict[str, Any], folder: str | os.PathLike[str], *, examples: Source | None = None
) -> Path:
    """Write `comparison.json`, exactly the comparison, and `comparison.html`, one self-contained page.

    Args:
        comparison: As `compare` returns it.
        folder: Where to write; made if missing. Older files of these names are replaced.
        examples: The rows that were compared, in their order: anything that `load_examples` takes. The page takes
            thumbnails from them. Pictures that cannot be opened are left out.

    Returns:
        The path of `comparison.html`.

    Raises:
        ConfigError: The folder cannot be written, or the examples are not those of the comparison.
    """
    folder = Path(folder)
    page = render_comparison(comparison, examples=examples)
    _write(folder, {"comparison.json": _json(comparison), "comparison.html": page.encode("utf-8", "replace")})
    return folder / "comparison.html"


def render_report(evaluation: dict[str, Any], *, examples: Source | None = None, without: str | None = None) -> str:
    """Return the page of `report.html`; see `write_report`. `without` says why there are no plots as files."""
    examples = _measured_examples(evaluation, examples, len(evaluation["predictions"]), "an evaluation")
    if _is_of_panel(evaluation):
        made = getattr(evaluation, "thumbnails", None)
        limits = {"side": SMALL_SIDE, "most_pictures": MOST_PICTURES, "most_bytes": MOST_BYTES}
        contents = summarise_panel(evaluation, Thumbnails(examples, made, **limits))
        return _page("panel.html", contents, styles=_PANEL_STYLES, scripts=_PANEL_SCRIPTS)
    contents = summarise(evaluation, Thumbnails(examples, getattr(evaluation, "thumbnails", None)))
    return _page("report.html", contents | {"without": without})


def render_comparison(comparison: dict[str, Any], *, examples: Source | None = None) -> str:
    """Return the page of `comparison.html`; see `write_comparison`."""
    examples = _measured_examples(comparison, examples, comparison["rows"]["total"], "a comparison")
    return _page("comparison.html", summarise_comparison(comparison, Thumbnails(examples)))


def _measured_examples(
    measured: dict[str, Any], rows: Source | None, count: int, what: str
) -> Sequence[Example] | None:
    """Return the rows as examples, without those that were left out."""
    examples = None if rows is None else as_examples(rows, read_labels=False)
    gone = set(measured.get("left_out", {}).get("positions", ()))
    if examples is not None and gone and len(examples) == count + len(gone):
        examples = [example for position, example in enumerate(examples) if position not in gone]
    if examples is not None and len(examples) != count:
        raise ConfigError(
            f"{len(examples)} examples for {what} of {count} rows; "
            "give the examples that were measured, in their order, or none"
        )
    return examples


def _is_of_panel(evaluation: dict[str, Any]) -> bool:
    return "panel_evaluation_version" in evaluation


def _page(
    template: str, contents: dict[str, Any], *, styles: Sequence[str] = _STYLES, scripts: Sequence[str] = _SCRIPTS
) -> str:
    """Fill a template with what a page shows, its style sheets as one, and its scripts."""
    style = Markup("".join(page_file(_PAGE, name) for name in styles))  # noqa: S704 (our own files)
    code = [Markup(page_file(_PAGE, name)) for name in scripts]  # noqa: S704 (our own files)
    return page_templates(_PAGE).get_template(template).render(contents, style=style, scripts=code)


def _json(measured: dict[str, Any]) -> bytes:
    # UTF-8 has no half surrogate pairs; JSON spells them with the same backslash escape as Python.
    text = json.dumps(measured, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, content)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the report cannot be written ({error.strerror or type(error).__name__}); "
            "give a folder that can be written, on a disk with room"
        ) from error
