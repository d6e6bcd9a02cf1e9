"""`score`: write the probabilities of a data set of any size, and continue where an earlier run stopped."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import add_data_flags, add_loading_flags, data_options, loading_options
from qwen_vl_classifier.cli.shared.remembered_text import text_for
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ErrorLimitError, StoppedError
from qwen_vl_classifier.files.paths import is_url

EXIT_ERROR_LIMIT = 3

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLOSE_SECONDS = 5.0  # to end workers and remove what they had half written


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "score",
        help="score a data set of any size; run again to resume",
        description=(
            "Score a data set of any size. Rows that cannot be used become rows with an error. After an interruption, "
            "run the same command again to resume."
        ),
        details=(
            "Scores are written in shards, files that are complete or absent. Several classifiers must share one "
            "backbone. Each label of a panel has columns of its own; classes of which a row has exactly one have a "
            "probability each, and the columns class and class_probability.\n\n"
            "Exit status: 0 done; 2 an expected error; 3 more errors than --max-errors; 130, 143 or 129 stopped by "
            "SIGINT, SIGTERM or SIGHUP. After such a signal, shards that have begun are finished, for at most --grace "
            "seconds; a second signal drops them. Finished shards are always kept."
        ),
        usage="%(prog)s CLASSIFIER ... DATA --out FOLDER [options]",
        example="qwen-vl-classifier score demo/classifier demo/data/test.csv --out scores",
    )
    parser.add_argument(
        "classifiers",
        nargs="+",
        metavar="CLASSIFIER",
        help="folder of a saved classifier or panel; several are computed together",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help=(
            "a CSV, TSV, JSON, JSONL or Parquet file, a folder or a quoted pattern of such files, or a folder of "
            "pictures (with --text); labels are ignored"
        ),
    )
    parser.add_flag("--out", required=True, metavar="FOLDER", help="folder for manifest.json and shards/")
    parser.add_flag(
        "--resume",
        rare=True,
        action="store_true",
        help="fail if there is nothing to resume (existing results are always resumed)",
    )
    add_flags(parser, ScoreConfig, section="scoring")
    add_loading_flags(parser, several_devices=True)
    add_data_flags(parser, labels=False)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Score, and print how many rows and shards there are."""
    from qwen_vl_classifier.scoring.counting import decision_counts
    from qwen_vl_classifier.scoring.run import score
    from qwen_vl_classifier.scoring.shards import SHARDS

    config = from_flags(ScoreConfig, flags)
    options = data_options(flags)
    if flags.text is None:
        names = {name: options[name] for name in ("image_column", "text_column", "allow_outside")}
        options["text"] = text_for(flags.data, flags.classifiers, **names)
    caught: list[int] = []
    try:
        with _Signals(caught, config.grace):
            summary = score(
                flags.classifiers,
                flags.data,  # not `read_examples`, which refuses the whole data set for one bad row
                flags.out,
                config=config,
                resume=flags.resume,
                progress=flags.progress,
                should_stop=lambda: bool(caught),
                **loading_options(flags),
                **options,
            )
    except ErrorLimitError as error:
        print(f"qwen-vl-classifier score: {error}", file=sys.stderr)
        return EXIT_ERROR_LIMIT
    except StoppedError as stopped:
        print(f"qwen-vl-classifier score: {stopped}", file=sys.stderr)
        return _status(caught)
    except KeyboardInterrupt:
        print(
            f"qwen-vl-classifier score: {flags.out}: stopped at once; complete shards are kept; run again to continue",
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
        print(f"{flags.out}: wrote {written} shard{'' if written == 1 else 's'}")
    print(f"{summary['rows']} rows, {summary['errors']} of them with an error")
    if not is_url(flags.out):
        for line in decision_counts(Path(flags.out)):
            print(line)
    print(f"{config.format} files: {flags.out.rstrip('/')}/{SHARDS}")
    return 0


class _Signals:
    """Note signals that are to stop the run, so that shards in work are finished; drop these at the second signal.

    The run ends in any case: `KeyboardInterrupt` is raised at the second signal, or when the grace is over, and where
    the main thread does not get to that, the process exits. A thread sees to it, since the main thread may hang inside
    of the system, in a network mount, where no handler of Python runs.

    Args:
        caught: Receives the number of each signal.
        grace: Seconds that shards in work have.
    """

    def __init__(self, caught: list[int], grace: float) -> None:
        self._caught = caught
        self._grace = grace
        self._ended = threading.Event()
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> None:
        # The system's own handler writes the number of each signal here, whatever the main thread is doing.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._descriptor_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._note)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor_before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _note(self, number: int, _: object) -> None:
        self._caught.append(number)
        if len(self._caught) > 1 and not self._ended.is_set():
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = self._next_signal(None)
        if not first:
            return
        grace = f"for {self._grace:g} s at most"
        print(f"finishing shards that have begun, {grace}; interrupt again to drop them", file=sys.stderr)
        second = self._next_signal(self._grace)
        if second is None and not self._ended.is_set():
            # Sent to the main thread, so that it leaves whatever it waits for.
            signal.pthread_kill(threading.main_thread().ident or 0, first)
            second = self._next_signal(_CLOSE_SECONDS)
        if second != 0 and self._next_signal(_CLOSE_SECONDS) != 0:
            os.write(2, b"qwen-vl-classifier score: stopped at once; complete shards are kept; run again to continue\n")
            os._exit(128 + first)

    def _next_signal(self, seconds: float | None) -> int | None:
        """Wait for a signal, and return its number; 0 when the run has ended, `None` when time is over."""
        self._reader.settimeout(seconds)
        try:
            while number := self._reader.recv(1):
                if number[0] in self._before:
                    return number[0]
        except TimeoutError:
            return None
        return 0


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
