"""`predict`: pictures, a folder of them or a table in, probabilities and decisions out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_vl_classifier.cli.flags import VerbParser, add_flags
from qwen_vl_classifier.cli.options import (
    add_data_flags,
    add_loading_flags,
    add_skip_flag,
    loading_options,
    show_left_out,
)
from qwen_vl_classifier.cli.shared.remembered_text import text_of_training
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.errors import ConfigError, one_line

if TYPE_CHECKING:
    from qwen_vl_classifier.data.bad_rows import Examples
    from qwen_vl_classifier.data.example import Prediction
    from qwen_vl_classifier.scoring.tables.own_table import Answer
    from qwen_vl_classifier.scoring.tables.raw_tables import Cells

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
_MOST_SHOWN = 40  # rows on a terminal
_WIDEST = 44  # characters of a picture's name or a text
_MOST_COLUMNS = 12  # named where a table was written

T = TypeVar("T")

_USAGE = """%(prog)s CLASSIFIER IMAGE [IMAGE ...] TEXT [options]
       %(prog)s CLASSIFIER FOLDER TEXT [options]
       %(prog)s CLASSIFIER DATA --out FILE [options]"""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "predict",
        help="classify pictures, a folder of them, or the rows of a table",
        description="Classify pictures with a text, all pictures of a folder, or the rows of a table. A table comes "
        "back with its own columns as they were, and four more: probability, label, decision and label_name. A panel "
        "adds probability_NAME, label_NAME and decision_NAME for each label, or class and class_probability.",
        usage=_USAGE,
        example="qwen-vl-classifier predict demo/classifier demo/data/test.csv --out scored.csv",
    )
    parser.add_argument("classifier", metavar="CLASSIFIER", help="folder of a saved classifier or panel")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a JSONL, JSON, CSV, TSV or Parquet file; a folder of pictures; or pictures (- for none), each of them "
        "classified on its own. The last INPUT is the text that goes with all of them; leave it out for a table with "
        "a column of texts, or if the classifier was trained with one text for all rows",
    )
    parser.gathers = "inputs"
    parser.add_flag(
        "--out", type=Path, metavar="FILE", help="write a table; its suffix chooses the format (default: print)"
    )
    parser.add_flag("--overwrite", action="store_true", help="replace the file of --out, if there is one")
    parser.add_flag("--json", action="store_true", help="print JSON: one object for each row, all of them")
    parser.add_flag("--one-example", action="store_true", help="take several pictures as one example, in their order")
    parser.add_flag(
        "--prefix",
        metavar="WORD",
        help="what the names of the added columns begin with (default: predicted_ if the table has one of them, else "
        "nothing)",
    )
    add_loading_flags(parser)
    add_flags(parser, TrainConfig, only=("max_errors",))
    add_data_flags(parser, labels=False)
    add_skip_flag(parser, "give rows that cannot be used an error in place of an answer")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is to be classified.

    Attributes:
        examples: The rows.
        columns: The names of their own columns.
        values: Yields the values of each row.
        file: The data file that they are from, if they are from one.
        folder: Where the names of pictures begin.
        has_texts: Whether each row has a text of its own.
        needed: The columns by which the separator of the file is found.
    """

    examples: Examples
    columns: Sequence[str]
    values: Callable[[], Iterable[Mapping[str, Any]]]
    file: Path | None = None
    folder: str = ""
    has_texts: bool = False
    needed: Sequence[str] = ()


def run(flags: argparse.Namespace) -> int:
    """Classify what was given; print it, or write a table."""
    words: list[str] = flags.inputs
    if _is_table(words[0]):
        return _classify(flags, _table_rows(flags, words))
    pictures, text = _parted(words, flags.text)
    if text is None:
        text = text_of_training([flags.classifier])
    if text is None:
        raise ConfigError(
            f"no text, and {flags.classifier} was not trained with one text for all rows; expected the text that goes "
            "with the pictures; give it after them, or with --text"
        )
    if flags.out is None and (len(pictures) == 1 or flags.one_example):
        return _classify_one(flags, pictures, text)
    return _classify(flags, _picture_rows(flags, pictures, text))


def _is_table(word: str) -> bool:
    from qwen_vl_classifier.data.text_files import format_of

    return os.path.isdir(word) or format_of(word) is not None  # noqa: PTH112  # a text that is too long is no error


def _is_picture(word: str) -> bool:
    return word.lower().endswith(_PICTURES) and " " not in word


def _parted(words: Sequence[str], text: str | None) -> tuple[Sequence[str], str | None]:
    """Part pictures and the text behind them."""
    *pictures, last = words
    if text is not None or last == "-" or (_is_picture(last) and os.path.isfile(last)):  # noqa: PTH113
        return words, text
    if _is_picture(last):
        raise ConfigError(
            f"{last!r} does not exist; expected pictures, and then a text; check the name, or give a text such as this "
            "with --text"
        )
    if not pictures:
        raise ConfigError(
            f"only {last!r}; expected a picture, a folder or a table, and then a text; - stands for no picture"
        )
    if len(pictures) > 1:
        missing = [name for name in pictures if name != "-" and not os.path.isfile(name)]  # noqa: PTH113
        if missing:
            raise ConfigError(
                f"{missing[0]!r} is not a file; expected pictures, and then one text; a text with spaces needs quotes "
                "around it"
            )
    return pictures, last


def _table_rows(flags: argparse.Namespace, words: Sequence[str]) -> _Rows:
    """Read a data file or folder."""
    from qwen_vl_classifier.data.table import Columns, LoadOptions, name_in
    from qwen_vl_classifier.scoring.tables.own_table import OwnTable

    source, *texts = words
    if len(texts) + (flags.text is not None) > 1:
        raise ConfigError(
            f"{words[-1]!r} after {source!r}; expected one table or folder, and one text at most; give a text with "
            "spaces in quotes, and several tables one after the other"
        )
    if flags.one_example:
        raise ConfigError(f"--one-example with {source!r}: it needs pictures given by name; leave it out")
    columns = Columns(flags.image_column, flags.text_column)
    options = LoadOptions(
        columns,
        text=texts[0] if texts else flags.text,
        allow_outside=flags.allow_outside,
        max_text_chars=flags.max_text_chars,
        read_labels=False,
        read_ids=False,
    )
    table = OwnTable(source, options, flags.limit)
    has_texts = options.text is None and name_in(table.columns, columns.text) in table.columns
    if options.text is None and not has_texts:
        text = text_of_training([flags.classifier])
        if text is None and table.file is None:
            raise ConfigError(
                f"{source!r} is a folder of pictures, and {flags.classifier} was not trained with one text for all "
                "rows; expected the text that goes with them; give it after the folder, or with --text"
            )
        table = dataclasses.replace(table, options=dataclasses.replace(options, text=text))
    if flags.out is not None and table.file is not None and flags.out.resolve() == table.file.resolve():
        raise ConfigError(f"--out {flags.out}: is the table itself, which is only read; expected another file")
    return _Rows(
        table.examples(flags.max_errors),
        table.columns,
        table.rows,
        file=table.file,
        folder=str(table.file.parent if table.file else source),
        has_texts=has_texts,
        needed=columns.needed,
    )


def _picture_rows(flags: argparse.Namespace, pictures: Sequence[str], text: str) -> _Rows:
    """Make rows of pictures that were named, each on its own or all as one example."""
    from qwen_vl_classifier.data.bad_rows import Examples
    from qwen_vl_classifier.data.example import Example

    rows = [[name for name in pictures if name != "-"]] if flags.one_example else [[name] for name in pictures]
    examples = []
    values: list[dict[str, Any]] = []
    for names in rows:
        image = None if names == ["-"] else names[0] if len(names) == 1 else tuple(names)
        examples.append(Example(image, text, origin=", ".join(names)))
        values.append({"image": image, "text": text})
    return _Rows(Examples(examples), ("image", "text"), lambda: values)


def _classify_one(flags: argparse.Namespace, pictures: Sequence[str], text: str) -> int:
    """Classify one example, and print label, probability and decision."""
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel_folder import is_panel
    from qwen_vl_classifier.cli.shared.panel_answers import show_one
    from qwen_vl_classifier.data.example import Example
    from qwen_vl_classifier.images.opening import open_image

    images = [open_image(name) for name in pictures if name != "-"]  # a wrong path shows before a model is loaded
    example = Example(images[0] if len(images) == 1 else images or None, text)
    if is_panel(flags.classifier):
        show_one(flags, example)
        return 0
    classifier = Classifier.load(flags.classifier, **loading_options(flags))
    (prediction,) = classifier.decide([example])
    if flags.json:
        print(json.dumps(_as_json(prediction, classifier.label_names), ensure_ascii=False))
    else:
        names = [one_line(name) for name in classifier.label_names]
        print(f"label        {prediction.label} ({names[prediction.label]})")
        print(f"probability  {prediction.probability:.4f} of class 1 ({names[1]})")
        print(f"decision     {prediction.decision}")
    return 0


def _as_json(prediction: Prediction, label_names: Sequence[str]) -> dict[str, Any]:
    return {**dataclasses.asdict(prediction), "label_name": label_names[prediction.label]}


def _classify(flags: argparse.Namespace, given: _Rows) -> int:
    """Classify rows, and print them or write a table."""
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel_folder import is_panel
    from qwen_vl_classifier.scoring.tables.own_table import added_columns, cells_of, check_rows, classify

    if is_panel(flags.classifier):
        return _classify_by_panel(flags, given)
    errors = bool(flags.max_errors)
    names = added_columns(given.columns, flags.prefix, errors=errors)
    _check_out(flags)
    bad = check_rows(given.examples, flags.max_errors, progress=flags.progress)
    classifier = Classifier.load(flags.classifier, **loading_options(flags))
    answers = classify(classifier, given.examples, bad, progress=flags.progress)
    show_left_out(bad.to_json(len(given.examples)))
    if not _written(flags, given, names, cells_of(answers, classifier.label_names, errors=errors)):
        _print_table(
            given, answers, ["probability", "decision"], lambda made: _one_answer(made, classifier.label_names)
        )
    if not flags.json or flags.out:
        print(_counts(answers, classifier.label_names))
    return 0


def _classify_by_panel(flags: argparse.Namespace, given: _Rows) -> int:
    """Classify rows by a panel, and print them or write a table."""
    from qwen_vl_classifier.cli.shared.panel_answers import HEADINGS, brief_answer, counted, load_panel
    from qwen_vl_classifier.scoring.tables.own_table import added_columns, check_rows, classify
    from qwen_vl_classifier.scoring.tables.panel_columns import PanelColumns

    errors = bool(flags.max_errors)
    columns = PanelColumns.of_folder(flags.classifier)
    names = added_columns(given.columns, flags.prefix, errors=errors, added=columns.added)
    _check_out(flags)
    bad = check_rows(given.examples, flags.max_errors, progress=flags.progress)
    answers = classify(load_panel(flags), given.examples, bad, progress=flags.progress)
    show_left_out(bad.to_json(len(given.examples)))
    if not _written(flags, given, names, columns.cells_of(answers, errors=errors)):
        _print_table(given, answers, HEADINGS[columns.one_of], brief_answer)
    if not flags.json or flags.out:
        print(counted(answers, columns))
    return 0


def _check_out(flags: argparse.Namespace) -> None:
    from qwen_vl_classifier.scoring.tables.table_formats import out_format

    if flags.out is not None:
        out_format(flags.out)
        if flags.out.exists() and not flags.overwrite:
            raise ConfigError(f"--out {flags.out}: exists; give another file, or --overwrite to replace it")


def _written(flags: argparse.Namespace, given: _Rows, names: Sequence[str], cells: Sequence[Cells]) -> bool:
    """Write the table, or print JSON, if that is asked for."""
    from qwen_vl_classifier.scoring.tables.table_formats import json_lines, write_table

    if flags.out is not None:
        write_table(flags.out, names, cells, own_rows=given.values(), copied=given.file, needed=given.needed)
        shown = names if len(names) <= _MOST_COLUMNS else [*names[: _MOST_COLUMNS - 1], "...", names[-1]]
        print(f"wrote {flags.out}: {len(cells):,} rows, with the columns {one_line(', '.join(shown))} added")
    elif flags.json:
        for line in json_lines(names, cells, given.values(), pictures=True):
            print(line)
    return flags.out is not None or flags.json


def _print_table(
    given: _Rows, answers: Sequence[Answer[T]], headings: Sequence[str], cells: Callable[[T], list[str]]
) -> None:
    """Print the first rows, with what `cells` makes of each answer below the headings."""
    header = ["row", "picture", "text", *headings]
    lines = []
    for answer in answers[:_MOST_SHOWN]:
        example = answer.example
        pictures = ", ".join(_picture_name(image, given.folder) for image in example.images) if example else ""
        made = answer.prediction
        result = ["", one_line(f"cannot be used: {answer.error}", 2 * _WIDEST)] if made is None else cells(made)
        text = one_line(example.text, _WIDEST) if example else ""
        lines.append([one_line(answer.name, _WIDEST), one_line(pictures or "-", _WIDEST), text, *result])
    shown = [*range(len(header))]
    if all(line[0] == line[1] or given.file is None for line in lines):
        shown.remove(0)
    if not given.has_texts:
        shown.remove(2)
    widths = [max(len(line[place]) for line in (header, *lines)) for place in range(len(header))]
    for line in (header, *lines):
        print("  ".join(line[place].ljust(widths[place]) for place in shown).rstrip())
    if len(answers) > _MOST_SHOWN:
        print(f"... and {len(answers) - _MOST_SHOWN:,} more; write all of them with --out, or print them with --json")


def _one_answer(made: Prediction, label_names: Sequence[str]) -> list[str]:
    return [f"{made.probability:.4f}", f"{made.decision} ({one_line(label_names[made.label], _WIDEST)})"]


def _picture_name(image: object, folder: str) -> str:
    return os.fspath(image).removeprefix(f"{folder}/") if isinstance(image, (str, os.PathLike)) else "in the table"


def _counts(answers: Sequence[Answer[Prediction]], label_names: Sequence[str]) -> str:
    """Say how many rows got which decision."""
    counts = Counter(answer.prediction.decision if answer.prediction else "error" for answer in answers)
    parts = [
        f"{counts['yes']:,} yes ({one_line(label_names[1])})",
        f"{counts['no']:,} no ({one_line(label_names[0])})",
        *(f"{counts[name]:,} {name}" for name in ("abstain", "error") if counts[name]),
    ]
    return f"{len(answers):,} rows: {', '.join(parts)}"
