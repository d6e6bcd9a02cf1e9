"""What stands around the pass, for the GPU benchmark: scoring, serving, and the time until the first result."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_classifier, untrained
from gpu_bench import LAST, Bench
from gpu_rows import Reading
from racing import race, timed
from serving_load import Load, Requests, run
from serving_process import put, server

from qwen_vl_classifier import Backbone, Classifier, ScoreConfig, ServeConfig, TrainConfig, score, train

_SHARE = 0.8  # of the capacity, at which the tail is measured
_END = 60.0


def scoring(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Race `score` in this process, as one worker runs it, against the pass alone on the same rows."""
    rows, prepared = bench.enough_rows(bench.sizes.small)
    data = bench.folder / "rows.jsonl"
    lines = [json.dumps({"image": str(row.images[0]), "text": row.text}) for row in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    classifier = untrained(bench.backbone)
    outs = (bench.folder / f"scores-{number}" for number in itertools.count())
    options: dict[str, Any] = {"config": ScoreConfig(), "progress": False, "allow_outside": True}
    times = race(
        {
            "pass": lambda: bench.backbone.encode_prepared(prepared, [LAST]),
            "score": lambda: score(classifier, data, next(outs), **options),
        },
        bench.sizes.repeats,
        within=seconds,
    )
    taken = times["score"].median
    yield Reading("score", times["pass"].median / taken, {"rows": len(rows), "rows/s": len(rows) / taken})


def serving(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Ask a server from many callers, in turns with the same work offline; then at 80 % of its capacity.

    Raises:
        ModuleNotFoundError: FastAPI is not installed.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise ModuleNotFoundError("fastapi", name="fastapi")
    sizes = bench.sizes
    folder = make_classifier(bench.backbone, bench.folder / "claims")
    classifier = Classifier.load(folder, backbone=bench.backbone)
    with _served(bench, folder) as (url, ask):
        load = Load(
            url, "closed", count=sizes.requests, callers=sizes.callers, pictures=sizes.requests, side=sizes.small
        )
        requests = Requests(load)
        examples = [example for number in range(sizes.requests) for example in requests.examples(number)]
        ratios, rates = [], []
        until = time.perf_counter() + seconds / 2
        for number in range(sizes.repeats + 1):
            if number > 1 and time.perf_counter() > until:
                break
            offline = timed(lambda: classifier.predict_proba(examples))
            outcome = ask(load)
            if outcome["statuses"].keys() != {"200"}:
                raise RuntimeError(f"the server answered {outcome['statuses']} {outcome['failures']}")
            if number:  # the first round is not counted
                ratios.append(offline / outcome["elapsed"])
                rates.append(sizes.requests / outcome["elapsed"])
        capacity = statistics.median(rates)
        yield Reading("serve", statistics.median(ratios), {"requests/s": capacity, "rounds": len(ratios)})
        count = {"rate": _SHARE * capacity, "random": False, "seconds": sizes.open_seconds}
        outcome = ask(Load(url, "open", pictures=sizes.requests, side=sizes.small, seed=1, **count))
    answered = outcome["seconds"]["200"]
    errors = outcome["requests"] - outcome["statuses"]["200"]
    notes = {"p50, s": answered["p50"], "p99, s": answered["p99"], "requests": outcome["requests"], "errors": errors}
    yield Reading("serve-tail", answered["p99"] / answered["p50"], notes)


@contextlib.contextmanager
def _served(bench: Bench, folder: Path) -> Iterator[tuple[str, Callable[[Load], dict[str, Any]]]]:
    """Serve a classifier, and yield the address and what puts a load on it: each a process of its own.

    In a dry run both are threads, which saves the seconds in which two processes import torch.
    """
    if bench.dry:
        with _in_a_thread(folder, bench.device) as url:
            yield url, lambda load: asyncio.run(run(load))
        return
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    options = ("--device", str(bench.device), "--deadline", "600")
    with server(folder, bench.folder / "server.log", *options, environment=threads) as at:
        yield at.url, put


@contextlib.contextmanager
def _in_a_thread(folder: Path, device: torch.device) -> Iterator[str]:
    import uvicorn

    from qwen_vl_classifier import create_app

    ready = threading.Event()
    app = create_app(ServeConfig(classifiers=(str(folder),), device=str(device)), on_ready=ready.set)
    http = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
        thread.start()
        try:
            if not ready.wait(_END):
                raise RuntimeError("the server was not ready in time")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            http.should_exit = True
            thread.join(_END)


def start(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Time loading, the fingerprint before and after digests of files are kept, and `train` on few rows."""
    rows = bench.rows(bench.sizes.small, bench.sizes.probe)  # drawn before any clock runs
    loaded: list[Backbone] = []
    yield Reading("load", timed(lambda: loaded.append(bench.load())))
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(bench.folder / "empty-cache")
    try:
        yield Reading("fingerprint-first", timed(lambda: loaded[0].fingerprint))
        loaded = [bench.load()]
        yield Reading("fingerprint-again", timed(lambda: loaded[0].fingerprint))
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
    taken = timed(lambda: train(rows, backbone=loaded[0], config=TrainConfig(), progress=False))
    yield Reading("train", taken, {"rows": len(rows)})
