"""`extract`: encode a data set once and keep its features, so that training and evaluation need not."""

from __future__ import annotations

import argparse
import time
from typing import Any

from qwen_vl_classifier.cli.options import (
    add_backbone_flags,
    add_data_flags,
    add_features_flag,
    load_backbone,
    open_store,
    read_examples,
)


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "extract",
        help="keep the features of a data set; what is kept is never computed again",
        description=(
            "Encode a data set and keep its features. All taps cost one pass, and what is kept already is not "
            "computed again, also after a kill."
        ),
    )
    parser.add_argument("data", metavar="DATA", help="JSONL, CSV or Parquet file, or folder with 0/ and 1/")
    add_features_flag(parser, required=True)
    parser.add_argument(
        "--taps",
        default="mean:-1,last:-1",
        metavar="TAPS",
        help=(
            "where to read: a list such as mean:-1,text:24; auto, what train tries; or all, every pooling of every "
            "layer (default: %(default)s)"
        ),
    )
    add_backbone_flags(parser)
    add_data_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Extract, and print how many features are kept and how many rows had to be encoded for them."""
    from qwen_vl_classifier.features.extraction import every_tap, keep_features
    from qwen_vl_classifier.training.candidates import candidate_taps

    examples = read_examples(flags.data, flags, require_labels=False)
    store = open_store(flags)
    assert store is not None  # the flag is required
    backbone = load_backbone(flags)
    taps = every_tap(backbone) if flags.taps == "all" else candidate_taps(flags.taps, backbone)
    started = time.perf_counter()
    done = keep_features(examples, backbone, taps, store)
    what = f"{done.rows:,} rows x {len(taps)} taps are kept"
    if done.features:
        rate = done.encoded / (time.perf_counter() - started)
        print(f"{flags.features}: {what}; encoded {done.encoded:,} rows now, {rate:.0f} a second")
    else:
        print(f"{flags.features}: nothing to do: {what} already")
    return 0
