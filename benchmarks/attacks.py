"""Measure what honest callers of a server notice while others attack it.

    python benchmarks/attacks.py                            # each attack
    python benchmarks/attacks.py slow_bodies small_chunks   # some of them
    python benchmarks/attacks.py --seconds 5                # for less time each
    python benchmarks/attacks.py mixed --seconds 1200       # one after the other at random, with memory watched
    python benchmarks/attacks.py --write                    # fill the table of docs/reference/serving.md

For each attack a server of the encoder benchmark's checkpoint is started anew. Honest callers send it pictures at a
quarter of the rate that it can do, first alone and then beside the attack, and a third process asks `/livez` all the
while. Memory is that of the server and the processes that decode pictures, above what it was before. The server, its
callers, the attackers and the probe share the machine, so an attack that only keeps the machine busy counts too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attack_traffic import ATTACKS
from checkpoints import SHAPES, make_classifier, write_checkpoint
from serving_load import Load
from serving_process import HERE, Server, put, server
from tables import DOCUMENTS, put_table

from qwen_vl_classifier import Backbone

_PART = 0.25  # of what the server can do, that honest callers ask
_COUNTED = 24  # requests that show what the server can do
_QUIET_SECONDS = 10.0
_LIVEZ_SECONDS = 0.2
_TIMES = 2.0  # what an attack may add to the p99 of honest callers
_EXTRA_BYTES = 300_000_000  # above the budget of `--queue-bytes`
_QUEUE_BYTES = 1_000_000_000  # its default

_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Seen:
    """What honest callers saw beside an attack.

    Attributes:
        attack: Its name.
        alone: Seconds of their answers before it, 99th percentile.
        beside: The same beside it.
        refused: How many of them were not answered with 200.
        requests: How many there were.
        livez: Seconds of `/livez`, 99th percentile.
        memory: Bytes above those before.
        answers: What the attackers got.
    """

    attack: str
    alone: float
    beside: float
    refused: int
    requests: int
    livez: float
    memory: int
    answers: dict[str, int]

    def cells(self) -> list[str]:
        """Lay it out for the table."""
        return [
            self.attack.replace("_", " "),
            f"{self.alone:.3f} s",
            f"{self.beside:.3f} s ({self.beside / self.alone:.1f}){_mark(self.beside <= _TIMES * self.alone)}",
            f"{self.refused} of {self.requests}{_mark(not self.refused)}",
            f"{self.livez:.3f} s{_mark(self.livez < _LIVEZ_SECONDS)}",
            f"{self.memory / _MB:.0f} MB{_mark(self.memory <= _QUEUE_BYTES + _EXTRA_BYTES)}",
        ]


def attack(name: str, classifier: Path, folder: Path, seconds: float, side: int) -> Seen:
    """Attack a server of its own, and return what its honest callers saw."""
    with server(classifier, folder / f"{name}.log", "--device", "cpu") as at:
        honest = Load(at.url, "open", rate=_PART * _capacity(at, side), random=False, pictures=32, side=side)
        quiet = put(replace(honest, seconds=min(seconds, _QUIET_SECONDS)))
        before = at.memory()
        attacker, probe = _traffic(name, at, seconds), _traffic("probe", at, seconds)
        with _highest_memory(at) as highest:
            beside = put(replace(honest, seconds=seconds))
            livez, answers = _result(probe), _result(attacker)
    return Seen(
        name,
        quiet["seconds"]["200"]["p99"],
        beside["seconds"].get("200", {"p99": math.inf})["p99"],
        beside["requests"] - beside["statuses"].get("200", 0),
        beside["requests"],
        float(np.percentile(livez, 99)),
        max(highest) - before,
        answers,
    )


def _capacity(at: Server, side: int) -> float:
    """Return how many requests of one picture are answered a second at most; the server is warm afterwards."""
    outcome = put(Load(at.url, "closed", count=_COUNTED, callers=4, pictures=32, side=side))
    return float(_COUNTED / outcome["elapsed"])


def _traffic(name: str, at: Server, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603  # nothing in it comes from outside
        [sys.executable, str(HERE / "attack_traffic.py"), name, at.url, str(seconds)], stdout=subprocess.PIPE, text=True
    )


def _result(process: subprocess.Popen[str]) -> Any:
    text, _ = process.communicate()
    return json.loads(text)


@contextmanager
def _highest_memory(at: Server) -> Iterator[list[int]]:
    """Collect the server's memory ten times a second until the context ends."""
    sizes, over = [at.memory()], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            sizes.append(at.memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def _mark(met: bool) -> str:
    return "" if met else " ✗"


def table(rows: list[Seen]) -> list[str]:
    """Lay measurements out as Markdown."""
    targets = f"| | | ≤ {_TIMES:g} times | 0 | < {_LIVEZ_SECONDS} s | ≤ {(_QUEUE_BYTES + _EXTRA_BYTES) // _MB:,} MB |"
    head = [
        "| attack | honest p99 alone | beside it | honest refused | `/livez` p99 | memory |",
        "|---|---|---|---|---|---|",
    ]
    return [*head, targets, *(f"| {' | '.join(row.cells())} |" for row in rows)]


def main() -> None:
    """Measure what is asked for, and print the table."""
    names = [*ATTACKS, "mixed"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("what", nargs="*", metavar="ATTACK", help=f"any of: {', '.join(names)}; default: all but mixed")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack (default: %(default)s)")
    parser.add_argument("--shape", default="59m", choices=SHAPES, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reference/serving.md")
    options = parser.parse_args()
    unknown = set(options.what) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[options.shape]
        checkpoint = write_checkpoint(shape, Path(folder) / "checkpoint")
        classifier = make_classifier(Backbone.load(checkpoint, device="cpu"), Path(folder) / "claims")
        for name in options.what or ATTACKS:
            started = time.perf_counter()
            rows.append(attack(name, classifier, Path(folder), options.seconds, shape.picture))
            took = time.perf_counter() - started
            print(" | ".join(rows[-1].cells()), rows[-1].answers, f"{took:.0f} s", flush=True)
    print("\n".join(table(rows)))
    if options.write:
        put_table(DOCUMENTS / "reference" / "serving.md", "attacks", table(rows))


if __name__ == "__main__":
    main()
