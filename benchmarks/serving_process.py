"""Servers and loads as processes of their own, for the serving benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from serving_load import Load

HERE = Path(__file__).resolve().parent
SERVE = ("-m", "qwen_vl_classifier", "serve")
FAULTY = (str(HERE / "serving_faults.py"),)

_START = 120.0  # seconds in which a server must be ready
_END = 120.0


@dataclass(slots=True)
class Server:
    """A running server.

    Attributes:
        process: Its process.
        url: Where it listens.
        log: The file that its standard error goes to.
    """

    process: subprocess.Popen[str]
    url: str
    log: Path

    def memory(self) -> int:
        """Return the resident bytes of the server and of the processes that it started."""
        root = psutil.Process(self.process.pid)
        total = 0
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def requests(self) -> list[dict[str, Any]]:
        """Return the lines of its log that tell of a request."""
        lines = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                content = json.loads(line)
                if "request_id" in content and "status" in content:
                    lines.append(content)
        return lines

    def finish(self) -> int:
        """Ask it to end, and return its exit status."""
        self.process.terminate()
        return self.process.wait(_END)


@contextlib.contextmanager
def server(
    classifier: Path, log: Path, *options: str, command: Sequence[str] = SERVE, environment: Mapping[str, str] = {}
) -> Iterator[Server]:
    """Start a server on a free port of loopback, wait until it is ready, and end it."""
    with log.open("w") as errors:
        process = subprocess.Popen(  # noqa: S603  # nothing in it comes from outside
            [sys.executable, *command, str(classifier), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise SystemExit(f"the server did not start: {log.read_text(encoding='utf-8')}")
        url = line.split()[-1]
        until = time.monotonic() + _START
        while not _is_ready(url):
            if time.monotonic() > until:
                raise SystemExit(f"the server was not ready in {_START:.0f} s")
            time.sleep(0.1)
        yield Server(process, url, log)
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        directly.open(f"{url}/readyz").close()
    except urllib.error.HTTPError:
        return False
    return True


class Running:
    """A load that runs.

    Args:
        load: What to ask.
    """

    def __init__(self, load: Load) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # nothing in it comes from outside
            [sys.executable, str(HERE / "serving_load.py"), json.dumps(asdict(load))],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        assert self._lines.readline() == "ready\n"

    def outcome(self) -> dict[str, Any]:
        """Wait for its end; return what came of it."""
        outcome: dict[str, Any] = json.loads(self._lines.readline())
        self._process.wait()
        return outcome


def put(load: Load) -> dict[str, Any]:
    """Put a load on a server and return what came of it."""
    return Running(load).outcome()
