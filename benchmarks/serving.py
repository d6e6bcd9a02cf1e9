"""Measure a server under loads that break others: throughput, tails, overload, faults and ends.

    python benchmarks/serving.py                          # all rows
    python benchmarks/serving.py throughput overload      # some rows
    python benchmarks/serving.py --short                  # every row with less work
    python benchmarks/serving.py throughput --device cuda:0,cuda:1
    python benchmarks/serving.py --write                  # fill the table of docs/reference/serving.md

The server computes in one thread, and the load comes from a process of its own over loopback: on two cores, model and
load have one each. Where speed matters, the checkpoint is the encoder benchmark's (59 million random weights) and
pictures are JPEG files of 364 x 364 pixels, every one another. Where only right and wrong answers are counted, it is
the built-in backbone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from checkpoints import SHAPES, make_classifier, write_checkpoint
from serving_load import Load, Requests
from serving_process import FAULTY, Running, Server, put, server
from tables import DOCUMENTS, put_table

from qwen_vl_classifier import Backbone, Classifier
from qwen_vl_classifier.config.device_lists import listed_devices

_SHORT = 0.04  # of the full work
_CALLERS = 64  # of a closed load: enough to keep passes full


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        what: What was done.
        target: What was wanted of it.
        seen: What came of it.
        met: Whether that is what was wanted.
    """

    what: str
    target: str
    seen: str
    met: bool


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share.

    Attributes:
        classifier: The folder of the classifier that is served where speed matters.
        small: The folder of one that is served where it does not.
        folder: For logs.
        share: How much of the full work is done: 1, or less in a short run.
        side: Of a picture, in pixels.
        device: Where it is served: one device, or a list with commas, which has a process for each.
    """

    classifier: Path
    small: Path
    folder: Path
    share: float
    side: int
    device: str

    def part(self, full: float, least: float = 1) -> int:
        """Return the amount of work to do where `full` is all of it."""
        return max(math.ceil(full * self.share), math.ceil(least))

    def serve(self, *options: str) -> Any:
        """Start a server of the classifier."""
        return server(self.classifier, self.folder / "server.log", "--device", self.device, *options)

    def serve_small(self, *options: str) -> Any:
        """Start a server of the small one, with a model that fails if it is asked to."""
        return server(
            self.small,
            self.folder / "server.log",
            *("--device", "cpu", *options),
            command=FAULTY,
            environment={"PASSES": str(self.passes)},
        )

    @property
    def passes(self) -> Path:
        """The file in which a small server notes its passes."""
        return self.folder / "passes.jsonl"

    def load(self, at: Server, mode: str, **more: Any) -> Load:
        """Describe a load."""
        return Load(at.url, mode, side=self.side, **more)


def throughput(bench: Bench) -> list[Row]:
    """Ask as fast as answers come, in turns with the same work offline."""
    rows = []
    for items, count in ((1, bench.part(96, 32)), (16, bench.part(6, 2))):
        with bench.serve("--deadline", "600") as at:  # nothing is refused for being slow
            load = bench.load(
                at, "closed", count=count, callers=max(_CALLERS // items, 8), items=items, pictures=count * items
            )
            one_device = listed_devices(bench.device)[0]
            classifier, requests = Classifier.load(bench.classifier, device=one_device), Requests(load)
            examples = [example for number in range(count) for example in requests.examples(number)]
            ratios, served_rates = [], []
            for number in range(4):
                started = time.perf_counter()
                classifier.predict_proba(examples)
                offline = time.perf_counter() - started
                outcome = put(load)
                if number:  # the first round is not counted
                    ratios.append(offline / outcome["elapsed"])
                    served_rates.append(len(examples) / outcome["elapsed"])
                assert outcome["statuses"].get("200") == count, outcome
        ratio = statistics.median(ratios)
        seen = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {statistics.median(served_rates):.1f} examples/s"
        rows.append(Row(f"throughput, {items} in a request, against offline", "≥ 0.8", seen, ratio >= 0.8))
    return rows


def steady(bench: Bench) -> list[Row]:
    """Ask at four fifths of the capacity: at even distances, as load tools do, and at random moments, as people do."""
    rows = []
    with bench.serve("--deadline", "60") as at:
        capacity = _capacity(bench, at)
        for random_moments, target in ((False, "0 errors, p99 ≤ 3 p50"), (True, "0 errors")):
            seconds = bench.part(60 if random_moments else 300, 10)
            outcome = put(bench.load(at, "open", rate=0.8 * capacity, random=random_moments, seconds=seconds, seed=1))
            times = outcome["seconds"].get("200", {"p50": math.inf, "p99": math.inf})
            ratio = times["p99"] / times["p50"]
            errors = outcome["requests"] - outcome["statuses"].get("200", 0)
            how = "at random moments" if random_moments else "evenly"
            what = f"{seconds} s at 80 % of capacity ({capacity:.1f}/s), {how}"
            seen = (
                f"{errors} errors of {outcome['requests']:,}; p50 {times['p50']:.2f} s, p99 {times['p99']:.2f} s: "
                f"{ratio:.1f}"
            )
            rows.append(Row(what, target, seen, errors == 0 and (random_moments or ratio <= 3)))
    return rows


def overload(bench: Bench) -> list[Row]:
    """Ask ten times as much as there is capacity for."""
    deadline = 10.0
    with bench.serve("--deadline", str(deadline), "--queue-size", "64") as at:
        capacity = _capacity(bench, at, callers=_CALLERS // 2)  # no more than are done before the deadline
        seconds = bench.part(120, 10)
        warm = put(bench.load(at, "open", rate=10 * capacity, seconds=bench.part(20, 5), seed=2))
        running, sizes = Running(bench.load(at, "open", rate=10 * capacity, seconds=seconds, seed=3)), []
        for _ in range(2 * seconds):
            time.sleep(0.5)
            sizes.append(at.memory())
        outcome = running.outcome()
        quarter = len(sizes) // 4
        growth = statistics.median(sizes[-quarter:]) / statistics.median(sizes[:quarter]) - 1
    statuses = outcome["statuses"]
    good = statuses.get("200", 0)
    goodput = good / outcome["elapsed"] / capacity
    accepted, refused = outcome["seconds"].get("200", {}), outcome["seconds"].get("429", {})
    others = outcome["requests"] - good - statuses.get("429", 0)
    assert warm["requests"]
    what = f"{seconds} s at 10 times the capacity ({outcome['requests'] / outcome['elapsed']:.0f}/s)"
    return [
        Row(what, "only 200 and 429", _counts(outcome), others == 0),
        Row("… slowest accepted, p99", f"≤ {deadline:.0f} s", f"{accepted['p99']:.2f} s", accepted["p99"] <= deadline),
        Row("… goodput against the peak", "≥ 0.9", f"{goodput:.2f}", goodput >= 0.9),
        Row("… refusals, as callers see them", "", f"p50 {refused['p50']:.3f} s, p99 {refused['p99']:.3f} s", True),
        Row("… growth of memory, first to last quarter", "< 5 %", f"{100 * growth:+.1f} %", growth < 0.05),
    ]


def burst(bench: Bench) -> list[Row]:
    """Ask from many connections at one moment."""
    count = bench.part(2000, 200)
    with bench.serve("--deadline", "60") as at:
        put(bench.load(at, "closed", count=32, callers=8))  # a server in use, which knows its pace
        outcome = put(bench.load(at, "burst", count=count, pictures=64))
        refused = sorted(line["seconds"] for line in at.requests() if line["status"] == 429)
    answered = outcome["requests"] - outcome["statuses"].get("0", 0)
    late = sum(seconds >= 0.1 for seconds in refused)
    inside = f"p50 {statistics.median(refused):.3f} s, slowest {refused[-1]:.3f} s, {late} of {len(refused):,} slower"
    seen = f"{answered:,} answered: {_counts(outcome)}"
    return [
        Row(f"{count:,} requests at once", "all answered", seen, answered == count),
        Row("… refusals, in the server", "< 0.1 s", inside, late == 0),
    ]


def poison(bench: Bench) -> list[Row]:
    """Send batches of 16 with one example in each that breaks the model."""
    batches = bench.part(500, 10)
    failed = wrong = 0
    with bench.serve_small() as at, httpx.Client(base_url=at.url, trust_env=False, timeout=60) as client:
        for number in range(batches):
            texts = [f"claim {number} {place}" for place in range(16)]
            bad = number % 16
            texts[bad] = f"poison {number}"
            data = client.post("/v1/classify", json={"input": [{"text": text} for text in texts]}).json()["data"]
            failures = [place for place, result in enumerate(data) if "error" in result]
            failed += len(failures)
            wrong += failures != [bad]
    what = f"{batches} batches of 16 with one poisoned example each"
    seen = f"{failed} failures, {wrong} batches in which another failed"
    return [Row(what, f"exactly {batches} failures", seen, failed == batches and not wrong)]


def faults(bench: Bench) -> list[Row]:
    """Let passes raise and run out of memory, and time how soon the next example is answered."""
    count = bench.part(100, 10)
    slowest, lost = 0.0, 0
    with bench.serve_small() as at, httpx.Client(base_url=at.url, trust_env=False, timeout=60) as client:
        for number in range(count):
            word = ("poison", "memory")[number % 2]
            answer = client.post("/v1/classify", json={"input": [{"text": f"{word} {number}"}]})
            failed = time.perf_counter()
            lost += answer.status_code not in (200, 413, 500)
            good = client.post("/v1/classify", json={"input": [{"text": f"claim {number}"}]})
            lost += good.status_code != 200 or "error" in good.json()["data"][0]
            slowest = max(slowest, time.perf_counter() - failed)
    what = f"{count} exceptions and lacks of memory in passes"
    seen = f"{lost} lost; slowest next answer {slowest:.3f} s"
    return [Row(what, "next answer < 1 s", seen, lost == 0 and slowest < 1)]


def ends(bench: Bench) -> list[Row]:
    """Send SIGTERM at a random moment of a load, again and again."""
    rounds = bench.part(20, 2)
    moments = random.Random(0)  # noqa: S311  # of a benchmark, not of a key
    answered = lost = 0
    statuses = set()
    for number in range(rounds):
        with bench.serve_small() as at:
            load = bench.load(at, "open", rate=60, seconds=4, pictures=32, seed=100 + number)
            running = Running(load)
            time.sleep(moments.uniform(1, 3))
            statuses.add(at.finish())
            unanswered = set(running.outcome()["unanswered"])
            accepted = {line["request_id"] for line in at.requests() if line.get("route") == "/v1/classify"}
        lost += len(unanswered & accepted)
        answered += len(accepted - unanswered)
    what = f"SIGTERM under load, {rounds} times"
    seen = f"{answered:,} accepted and answered, {lost} lost; exit {', '.join(map(str, sorted(statuses)))}"
    return [Row(what, "0 lost, exit 0", seen, lost == 0 and statuses == {0})]


def slow_sockets(bench: Bench) -> list[Row]:
    """Open sockets that send half of their headers, or half of a body, and nothing more."""
    count = bench.part(200, 20)
    with bench.serve_small() as at:
        address = ("127.0.0.1", urlsplit(at.url).port)
        head = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        sockets = []
        started = time.perf_counter()
        for number in range(count):
            one = socket.create_connection(address)
            one.sendall(head if number % 2 else head + b'Content-Length: 1000\r\n\r\n{"input": [')
            sockets.append(one)
        for one in sockets:
            one.settimeout(60)
            while one.recv(65536):
                pass
            one.close()
        slowest = time.perf_counter() - started
        well = httpx.post(f"{at.url}/v1/classify", json={"input": [{"text": "a"}]}, trust_env=False).status_code
    what = f"{count} sockets with slow headers or bodies"
    return [
        Row(what, "closed ≤ 10 s", f"all closed after {slowest:.1f} s; then {well}", slowest <= 10.5 and well == 200)
    ]


def disconnects(bench: Bench) -> list[Row]:
    """Leave while the model is busy, and look whether it computes what nobody waits for."""
    count = bench.part(1000, 50)
    bench.passes.unlink(missing_ok=True)
    late = left = 0
    margin = 0.5  # seconds in which a server on a busy machine must have noticed
    with bench.serve_small("--max-batch", "8") as at:
        port = urlsplit(at.url).port
        gone: dict[str, float] = {}
        while left < count:
            # Passes of a fifth of a second keep the model busy, so that what follows waits.
            busy = [_send(port, f"slow {left} {place}") for place in range(24)]
            time.sleep(0.1)
            waiting = [(f"leaves {left + place}", _send(port, f"leaves {left + place}")) for place in range(50)]
            time.sleep(0.05)
            for text, one in waiting:
                one.close()
                gone[text] = time.monotonic()
            left += len(waiting)
            for one in busy:
                one.settimeout(60)
                one.recv(65536)
                one.close()
        passes = [json.loads(line) for line in bench.passes.read_text(encoding="utf-8").splitlines()]
    computed = 0
    for entry in passes:
        for text in entry["texts"]:
            if text in gone:
                computed += 1
                late += entry["began"] > gone[text] + margin
    what = f"{left:,} callers leave"
    seen = f"{computed} computed before, {late} after they had left"
    return [Row(what, "0 computed after", seen, late == 0)]


def _send(port: int | None, text: str) -> socket.socket:
    body = json.dumps({"input": [{"text": text}]}).encode()
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(
        b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    return one


def _capacity(bench: Bench, at: Server, callers: int = _CALLERS) -> float:
    """Return how many requests of one picture are answered a second at most."""
    load = bench.load(at, "closed", count=bench.part(200, 32), callers=callers)
    put(replace(load, count=32))
    outcome = put(load)
    assert outcome["statuses"].keys() == {"200"}, outcome
    return outcome["statuses"]["200"] / outcome["elapsed"]


def _counts(outcome: dict[str, Any]) -> str:
    failures = [f"{count:,} x {name}" for name, count in outcome["failures"].items()]
    return ", ".join([f"{count:,} x {status}" for status, count in outcome["statuses"].items()] + failures)


MEASUREMENTS: dict[str, Callable[[Bench], list[Row]]] = {
    "throughput": throughput,
    "steady": steady,
    "overload": overload,
    "burst": burst,
    "poison": poison,
    "faults": faults,
    "ends": ends,
    "slow": slow_sockets,
    "disconnects": disconnects,
}


def table(rows: Sequence[Row]) -> list[str]:
    """Lay measurements out as Markdown."""
    lines = ["| what | target | measured | met |", "|---|---|---|---|"]
    return lines + [f"| {row.what} | {row.target} | {row.seen} | {'yes' if row.met else 'no'} |" for row in rows]


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"any of: {', '.join(MEASUREMENTS)}; default: all")
    parser.add_argument("--short", action="store_true", help="do a small part of the work")
    parser.add_argument("--shape", default="59m", choices=SHAPES, help="of the checkpoint (default: %(default)s)")
    parser.add_argument(
        "--device", default="cpu", help="where speed is measured; offline work takes the first of a list (default: cpu)"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/reference/serving.md")
    options = parser.parse_args()
    unknown = set(options.what) - MEASUREMENTS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MEASUREMENTS)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(SHAPES[options.shape], folder / "checkpoint")
        bench = Bench(
            classifier=make_classifier(Backbone.load(checkpoint, device="cpu"), folder / "claims"),
            small=make_classifier(Backbone.load("builtin:tiny", device="cpu"), folder / "small"),
            folder=folder,
            share=_SHORT if options.short else 1.0,
            side=SHAPES[options.shape].picture,
            device=options.device,
        )
        for measurement in options.what or MEASUREMENTS:
            for row in MEASUREMENTS[measurement](bench):
                rows.append(row)
                print(json.dumps(row.what), row.seen, "met" if row.met else "NOT MET", flush=True)
    print("\n".join(table(rows)))
    if options.write:
        put_table(DOCUMENTS / "reference" / "serving.md", "figures", table(rows))


if __name__ == "__main__":
    main()
