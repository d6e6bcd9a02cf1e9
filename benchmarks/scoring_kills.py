"""Run `score` on the command line, kill its processes at random, and count what was computed twice."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 900.0  # seconds without a new shard, after which something is wrong

# Python runs this when it starts, in every worker: each pass of the backbone leaves a line with its number of rows.
HOOK = """
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "qwen_vl_classifier.backbone.backbone":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def count(module):
            execute(module)
            encode = module.Backbone.encode_prepared

            def counting(self, prepared, *arguments, **options):
                log = os.open(os.environ["BENCHMARK_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(log, b"%d\\n" % len(prepared))
                os.close(log)
                return encode(self, prepared, *arguments, **options)

            module.Backbone.encode_prepared = counting

        spec.loader.exec_module = count
        return spec

sys.meta_path.insert(0, Finder())
"""


@dataclass(slots=True)
class Killed:
    """What became of a run that was killed.

    Attributes:
        kills: Whom each kill hit: "driver", "worker" (a process of the local engine) or "actor" (of Ray's).
        starts: Of the command.
        seconds: From the first start to the end.
        encoded: Rows that went into the backbone, all processes together.
    """

    kills: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    encoded: int = 0

    def most_wasted(self, shard_size: int, workers: int) -> int:
        """Return what may be lost: the shard of a worker that is killed, or those of all workers of a driver."""
        return sum(shard_size * (workers if victim == "driver" else 1) for victim in self.kills)


class Scoring:
    """The command that is run, and where.

    Args:
        classifier: Folder of the classifier.
        data: What is scored.
        shard_size: Rows of a shard.
        workers: Processes or actors, one thread each.
        place: An empty folder for what this needs.
    """

    def __init__(self, classifier: Path, data: Path, *, shard_size: int, workers: int, place: Path) -> None:
        self.workers = workers
        self.shard_size = shard_size
        self.place = place
        (place / "hook").mkdir(parents=True)
        (place / "hook" / "sitecustomize.py").write_text(HOOK)
        self._command = [sys.executable, "-m", "qwen_vl_classifier", "score", str(classifier), str(data)]
        self._command += ["--device", "cpu", "--shard-size", str(shard_size), "--threads", "1"]
        self._command += ["--workers", str(workers)]

    def run(self, out: Path, kills: int, *, engines: tuple[str, ...], seed: int = 0) -> Killed:
        """Score into a folder, kill so often on the way, and start again as often as that needs."""
        rng = random.Random(seed)  # noqa: S311  # no secrets
        log = self.place / f"{out.name}.log"
        killed = Killed()
        began = time.perf_counter()
        while True:
            killed.starts += 1
            engine = rng.choice(engines)
            process = self._start(out, engine, log)
            try:
                while len(killed.kills) < kills and self._wait_for_a_shard(process, out):
                    time.sleep(rng.uniform(0, 1))
                    victim = "driver" if rng.random() < 1 / 3 else {"local": "worker", "ray": "actor"}[engine]
                    if _kill(process, victim, rng):
                        killed.kills.append(victim)
                    if victim == "driver":
                        break
                status = process.wait()
            finally:
                process.kill()
            if status == 0:
                break
            if status != -9:
                raise RuntimeError(f"score ended with status {status}: {(self.place / 'errors').read_text()[-2000:]}")
        killed.seconds = time.perf_counter() - began
        killed.encoded = sum(map(int, log.read_text().split()))
        return killed

    def _start(self, out: Path, engine: str, log: Path) -> subprocess.Popen[bytes]:
        path = f"{self.place / 'hook'}{os.pathsep}{ROOT}"
        environment = {**os.environ, "PYTHONPATH": path, "BENCHMARK_LOG": str(log), "OMP_NUM_THREADS": "1"}
        command = [*self._command, "--out", str(out), "--engine", engine]
        with (self.place / "errors").open("ab") as errors:
            return subprocess.Popen(  # noqa: S603  # nothing in it comes from outside
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment
            )

    def _wait_for_a_shard(self, process: subprocess.Popen[bytes], out: Path) -> bool:
        """Wait until one more shard is there; return whether the run goes on."""
        before, deadline = _shards(out), time.monotonic() + LONGEST
        while process.poll() is None and _shards(out) <= before:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no shard in {LONGEST:.0f} s: {(self.place / 'errors').read_text()[-2000:]}")
            time.sleep(0.02)
        return process.poll() is None


def _shards(out: Path) -> int:
    return len(list(out.glob("shards/[0-9]*.parquet")))


def _kill(process: subprocess.Popen[bytes], victim: str, rng: random.Random) -> bool:
    """Kill the driver, or one of its workers; return whether there was one."""
    if victim == "driver":
        process.kill()
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        found = [child for child in psutil.Process(process.pid).children(recursive=True) if _works(child)]
        if found:
            rng.choice(found).kill()
            return True
    return False


def _works(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name().startswith("ray::Actor") or "qwen_vl_classifier.scoring.local" in process.cmdline()
    return False
