"""Flags that several verbs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.shared.remembered_text import text_for
from qwen_vl_classifier.config.device_lists import ONE_PROCESS_EACH
from qwen_vl_classifier.config.fields import (
    DEVICES,
    FEATURES_HELP,
    GREY_BITS_HELP,
    MAX_TEXT_CHARS,
    MODEL_HELP,
    TEXT_TOKENS_HELP,
    split_list,
)
from qwen_vl_classifier.errors import ConfigError

if TYPE_CHECKING:
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.data.example import Example
    from qwen_vl_classifier.features.store import FeatureStore

DEFAULT_MODEL = "builtin:tiny"
SOFT_LABELS_HELP = "labels are probabilities of class 1, from 0 to 1"
_MOST_TEMPLATE_BYTES = 1_000_000
_MOST_PIXELS, _MOST_BYTES = 25_000_000, 50 * 1024**2  # of a picture

_MOST_LISTED = 10  # rows that were left out
_FOR_TEXTS = ("image_column", "text_column", "allow_outside")  # options by which texts are found
_COLUMNS = {"image": "path of the picture", "text": "text", "label": "label", "id": "id of the row"}


def add_data_argument(parser: VerbParser) -> None:
    """Add the argument that names a labelled data set."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="labelled rows: a CSV, TSV, JSON, JSONL or Parquet file, or a folder with a subfolder for each class",
    )


def add_backbone_flags(parser: VerbParser, *, several_devices: bool = False) -> None:
    """Add the flags that choose and load a backbone, or one on each of several devices."""
    parser.add_flag(
        "--model",
        metavar="NAME",
        help=f"vision-language model: a name on the hub, a folder, or {DEFAULT_MODEL} (default: {DEFAULT_MODEL})",
    )
    section = "the backbone"
    parser.add_flag(
        "--revision",
        section=section,
        rare=True,
        metavar="REVISION",
        help="branch, tag or commit of the name on the hub",
    )
    parser.add_flag(
        "--dtype",
        section=section,
        rare=True,
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="data type of the weights; auto takes what suits the device (default: %(default)s)",
    )
    parser.add_flag(
        "--quantization",
        section=section,
        rare=True,
        choices=("8bit", "4bit"),
        help="store the language model's weights in 8 or 4 bits: less memory, other features (extra: finetune)",
    )
    for flag, what in (
        ("--min-pixels", "enlarge pictures to at least"),
        ("--max-pixels", "shrink pictures to at most"),
    ):
        parser.add_flag(
            flag, section=section, rare=True, type=int, metavar="PIXELS", help=f"{what} this size, width x height"
        )
    parser.add_flag(
        "--chat-template",
        section=section,
        rare=True,
        type=Path,
        metavar="FILE",
        help="chat template to use instead of the checkpoint's own",
    )
    _add_text_flag(parser)
    add_device_flag(parser, several=several_devices)


def add_overwrite_flag(parser: VerbParser) -> None:
    """Add the flag without which no classifier is overwritten."""
    parser.add_flag("--overwrite", action="store_true", help="replace the classifier in the output folder")


def add_loading_flags(parser: VerbParser, *, several_devices: bool = False) -> None:
    """Add the flags that say how a saved classifier is loaded, or one on each of several devices."""
    parser.add_flag("--model", rare=True, metavar="FOLDER", help=MODEL_HELP)
    _add_text_flag(parser)
    add_device_flag(parser, several=several_devices)


def _add_text_flag(parser: VerbParser) -> None:
    parser.add_flag("--max-text-tokens", rare=True, type=_positive, metavar="TOKENS", help=TEXT_TOKENS_HELP)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give 1 or more")
    return value


def loading_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Classifier.load` that the flags of `add_loading_flags` give."""
    return {name: getattr(flags, name) for name in ("device", "model", "max_text_tokens")}


def add_device_flag(parser: VerbParser, *, several: bool = False) -> None:
    """Add the flag that says where models run: on one device, or in a process on each of several."""
    names = f"{DEVICES}; or {ONE_PROCESS_EACH}" if several else DEVICES
    parser.add_flag("--device", metavar="DEVICE", default="auto", help=f"{names} (default: %(default)s)")


def add_data_flags(parser: VerbParser, *, columns: bool = True, labels: bool = True) -> None:
    """Add the flags that say how a data set is read.

    Args:
        parser: The parser of the verb.
        columns: Whether `--help` shows the names of columns.
        labels: Whether `--help` shows what concerns labels.
    """
    section = "data"
    for what in _COLUMNS:
        parser.add_flag(
            f"--{what}-column",
            section=section,
            rare=not columns or what == "id" or (what == "label" and not labels),
            default=what,
            metavar="NAME",
            help=f"column with the {_COLUMNS[what]} (default: %(default)s)",
        )
    parser.add_flag(
        "--positive",
        section=section,
        metavar="LABEL",
        rare=not labels,
        help="label or class folder of class 1; all others are class 0 (default: 1, or as in the saved classifier)",
    )
    parser.add_flag("--text", section=section, metavar="TEXT", help="one text for all rows (for a folder of pictures)")
    parser.add_flag(
        "--allow-outside",
        section=section,
        rare=True,
        action="store_true",
        help="allow paths to pictures outside the data file's folder",
    )
    parser.add_flag(
        "--max-text-chars",
        section=section,
        rare=True,
        type=_positive,
        default=MAX_TEXT_CHARS,
        metavar="CHARACTERS",
        help=f"longest text of one row (default: {MAX_TEXT_CHARS:,})",
    )
    parser.add_flag(
        "--limit", section=section, rare=True, type=int, metavar="ROWS", help="read only the first ROWS rows"
    )
    add_picture_flags(parser)


def add_picture_flags(parser: VerbParser) -> None:
    """Add the flags that say which pictures are accepted."""
    section = "pictures"
    parser.add_flag(
        "--max-image-pixels",
        section=section,
        rare=True,
        type=int,
        default=_MOST_PIXELS,
        metavar="PIXELS",
        help="largest picture, width x height; above 25 megapixels, a picture is read at half its size, a quarter, ... "
        f"(default: {_MOST_PIXELS:,})",
    )
    parser.add_flag(
        "--max-image-bytes",
        section=section,
        rare=True,
        type=int,
        default=_MOST_BYTES,
        metavar="BYTES",
        help=f"largest image file (default: {_MOST_BYTES:,})",
    )
    parser.add_flag(
        "--grey-bits",
        section=section,
        rare=True,
        type=int,
        default=0,
        choices=(0, 12, 16),
        help=f"{GREY_BITS_HELP} (default: %(default)s)",
    )
    parser.set_defaults(limits_of=picture_limits)


def picture_limits(flags: argparse.Namespace) -> dict[str, int]:
    """Return the fields of `ImageLimits` that the flags of `add_picture_flags` give."""
    return {
        "max_pixels": flags.max_image_pixels,
        "max_bytes": flags.max_image_bytes,
        "grey_bits": flags.grey_bits,
    }


def add_features_flag(parser: VerbParser, *, required: bool = False, rare: bool = False) -> None:
    """Add the flags that say where and how features are kept, and whether `--help` shows them."""
    parser.add_flag(
        "--features",
        rare=rare,
        type=Path,
        required=required,
        metavar="FOLDER",
        help=FEATURES_HELP,
    )
    parser.add_flag(
        "--feature-dtype",
        rare=True,
        default="float32",
        choices=("float32", "float16"),
        help="data type of kept features; float16 takes half the space, and rounds (default: %(default)s)",
    )


def data_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `load_examples` that the flags of `add_data_flags` give."""
    names = ("positive", "text", "allow_outside", "limit", "max_text_chars")
    return {
        **{f"{what}_column": getattr(flags, f"{what}_column") for what in _COLUMNS},
        **{name: getattr(flags, name) for name in names},
    }


def read_examples(
    source: str | Path,
    flags: argparse.Namespace,
    *,
    require_labels: bool,
    read_labels: bool = True,
    soft_labels: bool = False,
    one_of: bool = False,
    class_names: tuple[str, str] | None = None,
    trained: Sequence[str | Path] = (),
) -> list[Example]:
    """Load a data set as the flags say.

    Args:
        source: Its path.
        flags: The flags of `add_data_flags`.
        require_labels: As in `load_examples`.
        read_labels: As in `load_examples`.
        soft_labels: As in `load_examples`.
        one_of: As in `load_examples`.
        class_names: What class 0 and class 1 are called, by `--class-names` or by a saved classifier.
        trained: Folders of saved classifiers, whose text of training stands in where the data has no texts.
    """
    from qwen_vl_classifier.data.loading import load_examples

    options = data_options(flags)
    if trained and options["text"] is None:
        options["text"] = text_for(source, trained, **{name: options[name] for name in _FOR_TEXTS})
    return load_examples(
        source,
        require_labels=require_labels,
        read_labels=read_labels,
        soft_labels=soft_labels,
        one_of=one_of,
        class_names=class_names,
        max_errors=getattr(flags, "max_errors", None),
        **options,
    )


def add_skip_flag(parser: VerbParser, what: str = "leave out rows that cannot be used") -> None:
    """Add the flag that passes over all rows which cannot be used, for a verb that has `--max-errors`.

    Args:
        parser: The parser of the verb.
        what: What is done with these rows, for the help.
    """
    parser.add_flag(
        "--skip-bad-rows",
        section="data",
        dest="max_errors",
        action="store_const",
        const="100%",
        default=argparse.SUPPRESS,
        help=f"{what} (--max-errors 100%%)",
    )


def add_class_names_flag(parser: VerbParser) -> None:
    """Add the flag that says what the classes are called."""
    parser.add_flag(
        "--class-names",
        section="data",
        rare=True,
        type=_pair_of_names,
        metavar="NO,YES",
        help="names of class 0 and class 1, such as cat,dog (default: the labels, if --positive is given)",
    )


def add_labels_flags(parser: VerbParser) -> None:
    """Add the flags for several labels, and for one of several classes."""
    parser.add_flag(
        "--labels",
        section="data",
        type=_label_names,
        metavar="NAMES",
        help="columns of several labels, a classifier for each",
    )
    parser.add_flag(
        "--one-of",
        section="data",
        action="store_true",
        help="each row has exactly one of several labels or classes",
    )


def check_labels_flags(flags: argparse.Namespace) -> None:
    """Refuse flags for a single label beside those of `add_labels_flags`.

    Raises:
        ConfigError: There is one.
    """
    given = "--one-of" if flags.labels is None else "--labels"
    single = {
        "positive": "says which label counts as 1",
        "class_names": "names the two classes of one label",
        "soft_labels": "reads one label as a probability",
    }
    found = [name for name in single if getattr(flags, name, None)]
    if flags.labels is not None and flags.label_column != "label":
        found, single["label_column"] = [*found, "label_column"], "names the column of one label"
    if found:
        option = f"--{found[0].replace('_', '-')}"
        raise ConfigError(f"{option} with {given}; {option} {single[found[0]]}; leave one of them out")


def _label_names(text: str) -> tuple[str, ...]:
    names = split_list(text)
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}; expected names of columns, such as defect,dirty")
    return names


def _pair_of_names(text: str) -> tuple[str, str]:
    names = split_list(text)
    if len(names) != 2 or text.count(",") != 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected two different words, such as normal,pneumonia")
    return names[0], names[1]


def show_left_out(*records: Mapping[str, Any]) -> None:
    """List rows that were left out on standard error, as `BadRows.to_json` describes them."""
    for record in records:
        if record["total"]:
            print(f"left out {record['total']:,} of {record['of']:,} {record['what']}:", file=sys.stderr)
            for line in record["lines"][:_MOST_LISTED]:
                print(f"  {line}", file=sys.stderr)
            if record["total"] > _MOST_LISTED:
                print(f"  and {record['total'] - _MOST_LISTED:,} more", file=sys.stderr)


def load_backbone(flags: argparse.Namespace) -> Backbone:
    """Load a backbone as the flags say."""
    from qwen_vl_classifier.backbone.backbone import Backbone

    return Backbone.load(**backbone_options(flags), device=flags.device)


def backbone_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Backbone.load` that the flags of `add_backbone_flags` give, but for the device."""
    names = ("dtype", "min_pixels", "max_pixels", "revision", "quantization", "max_text_tokens")
    template = _read_template(flags.chat_template) if flags.chat_template else None
    options = {name: getattr(flags, name) for name in names}
    return {"name": flags.model or DEFAULT_MODEL, "chat_template": template, **options}


def _read_template(path: Path) -> str:
    try:
        size = path.stat().st_size
        template = path.read_text(encoding="utf-8") if size <= _MOST_TEMPLATE_BYTES else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"--chat-template {path}: cannot be read ({reason}); give a Jinja template") from None
    if template is None:  # Jinja would take minutes over it
        raise ConfigError(
            f"--chat-template {path}: has {size:,} bytes, expected at most {_MOST_TEMPLATE_BYTES:,}; "
            "give a Jinja template"
        )
    if not template.strip():
        raise ConfigError(f"--chat-template {path}: is empty; give a Jinja template")
    return template


def open_store(flags: argparse.Namespace) -> FeatureStore | None:
    """Open the feature store that the flags name, if any."""
    from qwen_vl_classifier.features.store import FeatureStore

    return FeatureStore(flags.features, dtype=flags.feature_dtype) if flags.features else None
