"""`score`: write the probabilities of a data set of any size, and go on where an earlier run was killed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import add_data_flags, add_loading_flags, data_options, loading_options
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ErrorLimitError, StoppedError

EXIT_ERROR_LIMIT = 3


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "score",
        help="score a data set of any size in shards; run again to resume",
        description=(
            "Score a data set with one or several classifiers of one backbone, in shards that are complete or absent. "
            "A row that cannot be used becomes a row with an error. Run the same command again to resume after a kill."
        ),
        epilog=(
            "Exit status: 0 done, 2 an expected error, 3 stopped by --max-errors, 130 or 143 stopped by SIGINT or "
            "SIGTERM. Whatever the status, shards that are complete are kept."
        ),
        usage="%(prog)s CLASSIFIER [CLASSIFIER ...] DATA --out DIR [options]",
    )
    parser.add_argument(
        "classifiers", nargs="+", metavar="CLASSIFIER", help="folder of a saved classifier; several share one pass"
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help=(
            "JSONL, JSON, CSV, TSV or Parquet file, a folder or a quoted glob of these, or a folder of pictures "
            "(with --text); labels are not looked at"
        ),
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="write manifest.json and shards/ here")
    parser.add_argument(
        "--resume", action="store_true", help="refuse to begin a new folder; what is there is resumed anyway"
    )
    add_flags(parser, ScoreConfig)
    add_loading_flags(parser)
    add_data_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Score, and print how many rows and shards there are."""
    from qwen_vl_classifier.scoring.run import score

    caught: list[int] = []
    try:
        with _catching(caught):
            summary = score(
                flags.classifiers,
                flags.data,  # not `read_examples`, which refuses the whole data set for one bad row
                flags.out,
                config=from_flags(ScoreConfig, flags),
                resume=flags.resume,
                should_stop=lambda: bool(caught),
                **loading_options(flags),
                **data_options(flags),
            )
    except ErrorLimitError as error:
        print(f"qwen-vl-classifier score: {error}", file=sys.stderr)
        return EXIT_ERROR_LIMIT
    except StoppedError as stopped:
        print(f"qwen-vl-classifier score: {stopped}", file=sys.stderr)
        return _status(caught)
    except KeyboardInterrupt:
        print(
            f"qwen-vl-classifier score: {flags.out}: stopped at once; complete shards are kept; run again to go on",
            file=sys.stderr,
        )
        return _status(caught)
    if flags.dry_run:
        _print_estimate(flags.out, summary)
        return 0
    written, there = summary["shards_written"], summary["shards_there"]
    if not written:
        print(f"{flags.out}: nothing to do, all {there} shards are there")
    elif there:
        print(f"{flags.out}: wrote {written} of {written + there} shards, the others were there")
    else:
        print(f"{flags.out}: wrote {written} shards")
    print(f"{summary['rows']} rows, {summary['errors']} of them with an error")
    return 0


@contextmanager
def _catching(caught: list[int]) -> Iterator[None]:
    """Note SIGINT and SIGTERM, so that shards in work are finished; raise `KeyboardInterrupt` at the second one."""

    def note(number: int, _: object) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt
        print("finishing the shards in work; once more to drop them", file=sys.stderr)

    before: dict[signal.Signals, Callable[..., Any] | int | None] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(caught: Sequence[int]) -> int:
    """Return the status of a program that a signal has ended."""
    return 128 + (caught[0] if caught else signal.SIGINT)


def _print_estimate(out: str, found: Mapping[str, Any]) -> None:
    print(f"{out}: {found['shards']} shards, {found['shards_there']} of them there; {found['rows']} rows")
    minutes, seconds = divmod(round(found["seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    print(f"the rest would take about {hours}:{minutes:02}:{seconds:02} with {found['workers']} workers")
    print(f"all shards would take about {found['bytes'] / 1e6:.1f} MB")
    print(
        f"by {found['rows_sampled']} rows that were scored, {found['errors']:.0%} of them with an error; nothing was "
        "written"
    )
