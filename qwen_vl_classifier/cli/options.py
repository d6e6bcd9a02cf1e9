"""Flags that several verbs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.config.fields import MODEL_HELP, TEXT_TOKENS_HELP, split_list
from qwen_vl_classifier.errors import ConfigError

if TYPE_CHECKING:
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.data.example import Example
    from qwen_vl_classifier.features.store import FeatureStore

DEFAULT_MODEL = "builtin:tiny"
_MOST_TEMPLATE_BYTES = 1_000_000

_COLUMNS = ("image", "text", "label", "id")


def add_backbone_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose and load a backbone."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"hub name, local folder or {DEFAULT_MODEL} (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="type of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=("8bit", "4bit"),
        help="quantise the decoder's linear layers: less memory, other features (needs the extra finetune)",
    )
    parser.add_argument("--min-pixels", type=int, metavar="N", help="enlarge pictures to at least N pixels")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="shrink pictures to at most N pixels")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="chat template to use in place of the checkpoint's own"
    )
    _add_text_flag(parser)
    add_device_flag(parser)


def add_overwrite_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag without which no classifier is overwritten."""
    parser.add_argument("--overwrite", action="store_true", help="replace a classifier that is there already")


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a saved classifier is loaded."""
    parser.add_argument("--model", metavar="FOLDER", help=MODEL_HELP)
    _add_text_flag(parser)
    add_device_flag(parser)


def _add_text_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-text-tokens", type=_positive, metavar="N", help=TEXT_TOKENS_HELP)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give 1 or more")
    return value


def loading_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Classifier.load` that the flags of `add_loading_flags` give."""
    return {name: getattr(flags, name) for name in ("device", "model", "max_text_tokens")}


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says where models run."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a data set is read."""
    group = parser.add_argument_group("reading data")
    for what in _COLUMNS:
        group.add_argument(
            f"--{what}-column",
            default=what,
            metavar="NAME",
            help=f"column of the {what} (default: %(default)s)",
        )
    group.add_argument(
        "--positive",
        metavar="LABEL",
        help="the label (or class folder) that becomes 1; every other becomes 0 (default: the words that a saved "
        "classifier calls its classes by, else labels must be 0 or 1)",
    )
    group.add_argument("--text", metavar="TEXT", help="one text for all rows; a folder of pictures needs it")
    group.add_argument("--allow-outside", action="store_true", help="let image paths leave the folder of the data file")
    group.add_argument("--limit", type=int, metavar="N", help="use the first N rows only")
    add_picture_flags(parser)


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which pictures are let in."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--max-image-pixels",
        type=int,
        default=25_000_000,
        metavar="N",
        help="largest picture, width times height; those above 25 megapixels are read at a half, a quarter, ... "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-image-bytes",
        type=int,
        default=50 * 1024**2,
        metavar="N",
        help="largest image file, in bytes (default: %(default)s)",
    )
    group.add_argument(
        "--grey-bits",
        type=int,
        default=0,
        choices=(0, 12, 16),
        help="what 16-bit grey pictures are whose values end at 4095: of 12 bits, or dark; 0 refuses them "
        "(default: %(default)s)",
    )
    parser.set_defaults(limits_of=picture_limits)


def picture_limits(flags: argparse.Namespace) -> dict[str, int]:
    """Return the fields of `ImageLimits` that the flags of `add_picture_flags` give."""
    return {
        "max_pixels": flags.max_image_pixels,
        "max_bytes": flags.max_image_bytes,
        "grey_bits": flags.grey_bits,
    }


def add_features_flag(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the flags that say where and how features are kept."""
    parser.add_argument(
        "--features",
        type=Path,
        required=required,
        metavar="DIR",
        help="keep features here, made if missing; what is kept is never computed again",
    )
    parser.add_argument(
        "--feature-dtype",
        default="float32",
        choices=("float32", "float16"),
        help="type of kept features: float16 takes half the space and rounds (default: %(default)s)",
    )


def data_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `load_examples` that the flags of `add_data_flags` give."""
    names = ("positive", "text", "allow_outside", "limit")
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
    class_names: tuple[str, str] | None = None,
) -> list[Example]:
    """Load a data set as the flags say.

    Args:
        source: Its path.
        flags: The flags of `add_data_flags`.
        require_labels: As in `load_examples`.
        read_labels: As in `load_examples`.
        soft_labels: As in `load_examples`.
        class_names: What class 0 and class 1 are called, by `--class-names` or by a saved classifier.
    """
    from qwen_vl_classifier.data.loading import load_examples

    return load_examples(
        source,
        require_labels=require_labels,
        read_labels=read_labels,
        soft_labels=soft_labels,
        class_names=class_names,
        allow_missing=bool(getattr(flags, "max_errors", "")),  # they are counted with the damaged ones
        **data_options(flags),
    )


def add_class_names_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says what the classes are called."""
    parser.add_argument(
        "--class-names",
        type=_pair_of_names,
        metavar="NO,YES",
        help="what class 0 and class 1 are called, in reports and in data read later (default: with --positive, the "
        "words of the data)",
    )


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
            for line in record["lines"]:
                print(f"  {line}", file=sys.stderr)
            if len(record["lines"]) < record["total"]:
                print(f"  and {record['total'] - len(record['lines']):,} more", file=sys.stderr)


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
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
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
