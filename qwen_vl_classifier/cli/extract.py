"""`extract`: encode a data set once and keep its features, so that training and evaluation need not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_vl_classifier.cli.options import add_backbone_flags, add_data_flags, load_backbone, read_examples


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
    parser.add_argument(
        "--features", type=Path, required=True, metavar="DIR", help="keep features here; made if missing"
    )
    parser.add_argument(
        "--taps",
        default="mean:-1,last:-1",
        metavar="TAPS",
        help="where to read: auto, or a list (default: %(default)s)",
    )
    add_backbone_flags(parser)
    add_data_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Extract, and print how many features are kept and how many of them are new."""
    from qwen_vl_classifier.features.extraction import extract_features
    from qwen_vl_classifier.features.store import FeatureStore
    from qwen_vl_classifier.training.probe import candidate_taps

    examples = read_examples(flags.data, flags, require_labels=False)
    store = FeatureStore(flags.features)
    backbone = load_backbone(flags)
    taps = candidate_taps(flags.taps, backbone)
    extract_features(examples, backbone, taps, store=store)
    what = f"the features of {len(examples)} rows at {', '.join(map(str, taps))}"
    if store.written:
        print(f"{flags.features}: holds {what}; {store.written} are new")
    else:
        print(f"{flags.features}: nothing to do, holds {what}")
    return 0
