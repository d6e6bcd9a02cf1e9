"""`extract`: encode a data set once and keep its features, so that training and evaluation need not encode it."""

from __future__ import annotations

import argparse
import time

from qwen_vl_classifier.cli.flags import VerbParser, add_flags
from qwen_vl_classifier.cli.options import (
    add_backbone_flags,
    add_data_argument,
    add_data_flags,
    add_features_flag,
    add_skip_flag,
    backbone_options,
    load_backbone,
    open_store,
    read_examples,
    show_left_out,
)
from qwen_vl_classifier.config.device_lists import names_several
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.config.train import TrainConfig

_SHARED = ("engine", "workers", "threads", "shard_size", "url_hosts", "ray_address", "gpus_per_worker")
"""Options of `score` that say how rows are shared out, whatever is done with them."""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "extract",
        help="compute features in advance, to train and evaluate faster",
        description="Read every row with the backbone once and keep its features, for `train` and `evaluate` with the "
        "same --features. Run again after an interruption: features that exist are not computed again.",
        usage="%(prog)s DATA --features FOLDER [options]",
        example="qwen-vl-classifier extract demo/data/train.csv --features features",
    )
    add_data_argument(parser)
    add_features_flag(parser, required=True)
    parser.add_flag(
        "--taps",
        default="mean:-1,last:-1",
        metavar="TAPS",
        help=(
            "where to read features: a list such as mean:-1,text:24; auto, what `train` tries; or all "
            "(default: %(default)s)"
        ),
    )
    add_backbone_flags(parser, several_devices=True)
    add_flags(parser, TrainConfig, only=("max_errors",))
    add_flags(parser, ScoreConfig, section="several workers", only=_SHARED)
    add_data_flags(parser, labels=False)
    add_skip_flag(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Extract, and print how many features are kept and how many rows had to be encoded for them."""
    if flags.engine != "local" or flags.workers > 1 or names_several(flags.device):
        return _run_in_shards(flags)
    from qwen_vl_classifier.data.bad_rows import BadRows
    from qwen_vl_classifier.data.picture_checks import read_sizes
    from qwen_vl_classifier.features.extraction import keep_features
    from qwen_vl_classifier.scoring.workers import chosen_taps

    examples = read_examples(flags.data, flags, require_labels=False, read_labels=False)
    store = open_store(flags)
    assert store is not None  # the flag is required
    backbone = load_backbone(flags)
    taps = chosen_taps(flags.taps, backbone)
    started = time.perf_counter()
    bad = BadRows(flags.max_errors, can_leave_out=True, given=examples)
    read_sizes(examples, bad, progress=flags.progress)
    bad.check(len(examples))
    done = keep_features(examples, backbone, taps, store, bad=bad, progress=flags.progress)
    bad.check(len(examples))
    show_left_out(bad.to_json(len(examples)))
    what = f"{done.rows:,} rows x {len(taps)} taps are kept"
    if done.features:
        rate = done.encoded / (time.perf_counter() - started)
        print(f"{flags.features}: {what}; encoded {done.encoded:,} rows now, {rate:.0f} a second")
    else:
        print(f"{flags.features}: nothing to do: {what} already")
    return 0


def _run_in_shards(flags: argparse.Namespace) -> int:
    """Extract with several workers, and print how many features they added."""
    from qwen_vl_classifier.data.bad_rows import BadRows
    from qwen_vl_classifier.data.table import Columns
    from qwen_vl_classifier.scoring.run import extract_shards

    store = open_store(flags)
    assert store is not None  # the flag is required
    bad = BadRows(flags.max_errors, can_leave_out=True)
    started = time.perf_counter()
    done = extract_shards(
        flags.data,
        store,
        taps=flags.taps,
        backbone=backbone_options(flags),
        config=ScoreConfig(**{name: getattr(flags, name) for name in _SHARED}),
        device=flags.device,
        columns=Columns(flags.image_column, flags.text_column, flags.label_column, flags.id_column),
        text=flags.text,
        allow_outside=flags.allow_outside,
        limit=flags.limit,
        max_text_chars=flags.max_text_chars,
        bad=bad,
        progress=flags.progress,
    )
    bad.check(done["rows"])
    show_left_out(bad.to_json(done["rows"]))
    rate = done["rows"] / (time.perf_counter() - started)
    print(f"{flags.features}: {done['features']:,} features of {done['rows']:,} rows added, {rate:.0f} rows a second")
    return 0
