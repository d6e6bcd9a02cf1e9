"""`score`: write the probabilities of a data set of any size, and go on where an earlier run was killed."""

from __future__ import annotations

import argparse
from typing import Any

from qwen_vl_classifier.cli.options import add_data_flags, add_device_flag, data_options
from qwen_vl_classifier.config import ScoreConfig, add_flags, from_flags


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "score",
        help="score a data set in shards of Parquet; run again to resume",
        description=(
            "Score a data set with one or several classifiers of one backbone, in shards of Parquet. A row that "
            "cannot be used becomes a row with an error. Run the same command again to resume after a kill."
        ),
    )
    parser.add_argument(
        "classifiers", nargs="+", metavar="CLASSIFIER", help="folder of a saved classifier; several share one pass"
    )
    parser.add_argument(
        "data", metavar="DATA", help="JSONL, CSV or Parquet file, or folder with 0/ and 1/; labels are not looked at"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="write manifest.json and shards/*.parquet here")
    add_flags(parser, ScoreConfig)
    add_device_flag(parser)
    add_data_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Score, and print how many rows and shards there are."""
    from qwen_vl_classifier.scoring.local import score

    summary = score(
        flags.classifiers,
        flags.data,  # not `read_examples`, which refuses the whole data set for one bad row
        flags.out,
        config=from_flags(ScoreConfig, flags),
        device=flags.device,
        **data_options(flags),
    )
    written, there = summary["shards_written"], summary["shards_there"]
    if not written:
        print(f"{flags.out}: nothing to do, all {there} shards are there")
    elif there:
        print(f"{flags.out}: wrote {written} of {written + there} shards, the others were there")
    else:
        print(f"{flags.out}: wrote {written} shards")
    print(f"{summary['rows']} rows, {summary['errors']} of them with an error")
    return 0
