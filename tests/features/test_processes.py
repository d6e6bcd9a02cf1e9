"""Real processes that extract: killed at any moment, two at once, and over more rows than should be held in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, FeatureStore, extract_features, load_examples
from qwen_vl_classifier.features.extraction import every_tap
from qwen_vl_classifier.features.folder_contents import summarise
from tests import crash_points, nano
from tests.waiting import LIMIT, until

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 4
ROWS = 66  # the last window is not full
TAPS = "mean:-1,text:2"

# Importing takes seconds, so it is done once; each run is a fork that has loaded and computed nothing yet.
SERVER = """
import faulthandler, importlib, json, os, sys, time
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
torch.set_num_threads(1)
from qwen_vl_classifier.backbone import windows
from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.cli.main import main
from tests.crash_points import halt
from tests.waiting import until
for name in ("features.extraction", "data.loading"):
    importlib.import_module(f"qwen_vl_classifier.{name}")
importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")

def run(log, window, slow, stub, longest, arguments, halts, waits_for):
    faulthandler.dump_traceback_later(longest, exit=True)  # nobody would end a run that hangs
    sys.stdout = sys.stderr  # lines of several runs would mix with the answers
    windows.WINDOW_EXAMPLES = window
    for moment, target, barrier, after in halts:
        halt(moment, target, Path(barrier), after)
    encode, sync = Backbone.encode_prepared, os.fsync

    def noting(self, prepared, taps, **options):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{len(prepared)}\\n".encode())
        os.close(handle)
        for path in waits_for:
            until(Path(path).exists, path)
        if stub:
            return np.full((len(prepared), len(taps), self.hidden_size), 0.5, dtype=np.float32)
        time.sleep(slow)
        return encode(self, prepared, taps, **options)

    def slowly(number):
        time.sleep(slow)
        sync(number)

    Backbone.encode_prepared, os.fsync = noting, slowly
    return main(arguments)

print("ready", flush=True)
for line in sys.stdin:
    children = []
    for request in json.loads(line):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = run(**request)
            finally:
                os._exit(status)
        children.append(child)
    print(json.dumps(children), flush=True)
    ended = [os.wait4(child, 0) for child in children]
    ends = [[os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1000] for _, status, usage in ended]
    print(json.dumps(ends), flush=True)
"""


class Server:
    """Starts runs of the verb `extract`, several at once, and says how they ended."""

    def __init__(self, checkpoint: Path, errors: Path) -> None:
        self.checkpoint = checkpoint
        self.errors = errors
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
            )
        assert self._line() == "ready"

    def start(
        self,
        data: Path,
        store: Path,
        *logs: Path,
        slow=0.0,
        stub=False,
        window=WINDOW,
        taps=TAPS,
        longest=LIMIT,
        halts: Sequence[tuple[str, str, Path, int]] = (),
        waits_for: Sequence[Path] = (),
    ) -> list[int]:
        """Start one run for each log; return their process ids.

        Args:
            data: What to extract from.
            store: Where features are kept.
            logs: Each run writes a line for each call of the backbone to its own.
            slow: Seconds that are added to each call, and to bringing a file to disk.
            stub: Whether the backbone only makes up features.
            window: Examples in a call.
            taps: Where to read.
            longest: Seconds after which a run that hangs is ended.
            halts: Where the first run stops (see `tests/crash_points.py`).
            waits_for: Files for which all other runs wait in each call.
        """
        backbone = ["--model", str(self.checkpoint), "--device", "cpu", "--dtype", "float32"]
        arguments = ["extract", str(data), "--features", str(store), "--taps", taps, *backbone]
        common = {"window": window, "slow": slow, "stub": stub, "longest": longest, "arguments": arguments}
        requests = [
            common
            | {
                "log": str(log),
                "halts": [] if number else [(*halt[:2], str(halt[2]), halt[3]) for halt in halts],
                "waits_for": [str(path) for path in waits_for] if number or not halts else [],
            }
            for number, log in enumerate(logs)
        ]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def wait(self) -> list[tuple[int, float]]:
        """Return exit status and most resident megabytes of each run that was started last."""
        return [tuple(end) for end in json.loads(self._line())]

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        return line.strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


@pytest.fixture(scope="module")
def backbone(checkpoint) -> Backbone:
    return Backbone.load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[Server]:
    server = Server(checkpoint, tmp_path_factory.mktemp("server") / "errors.txt")
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(6):
        Image.new("RGB", (28 + 28 * number, 56), (40 * number, 90, 0)).save(folder / f"{number}.png")
    rows = [{"image": f"{n % 6}.png" if n % 3 else None, "text": f"text {n}", "id": str(n)} for n in range(ROWS)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wait_for(count: int, log: Path, child: int) -> None:
    until(lambda: len(calls(log)) >= count or crash_points.has_ended(child), f"{count} windows, or the end of the run")


def kill(child: int) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(child, signal.SIGKILL)


def calls(log: Path) -> list[int]:
    """The number of examples in each call of the backbone."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def rows_kept(folder: Path) -> int:
    """Count rows; a damaged shard would be a warning, and so an error. Both taps of a row are kept, or neither."""
    if not folder.exists():
        return 0
    features = len(FeatureStore(folder))
    assert features % 2 == 0
    return features // 2


def assert_complete(server: Server, data: Path, store: Path, backbone: Backbone, log: Path) -> None:
    """Everything is kept, nothing else lies there, and a further run has nothing to do."""
    assert rows_kept(store) == ROWS
    assert {path.suffix for path in store.iterdir()} == {".parquet"}
    assert summarise(store)["damaged"] == []
    server.start(data, store, log)
    assert server.wait()[0][0] == 0
    assert calls(log) == []
    examples, taps = load_examples(data), [tap for tap in every_tap(backbone) if str(tap) in TAPS]
    features = extract_features(examples, backbone, taps, store=FeatureStore(store), progress=False)
    np.testing.assert_allclose(features, backbone.encode(examples, taps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moment", crash_points.MOMENTS)
def test_a_kill_loses_no_more_than_the_window_in_flight(server, data, backbone, tmp_path, moment):
    store, log, barrier = tmp_path / "store", tmp_path / "log", tmp_path / "barrier"
    server.start(data, store, log, halts=[(moment, ".parquet", barrier, 2)])
    crash_points.kill_at(barrier)
    assert server.wait()[0][0] == -signal.SIGKILL
    assert calls(log) == [WINDOW] * 3
    kept = 3 if moment == "after the rename" else 2
    assert rows_kept(store) == kept * WINDOW
    assert len(list(store.glob("*.partial"))) == (kept == 2)
    again = tmp_path / "log-2"
    server.start(data, store, again)
    assert server.wait()[0][0] == 0
    assert sum(calls(again)) == ROWS - kept * WINDOW  # what is missing, and nothing else
    assert_complete(server, data, store, backbone, tmp_path / "log-3")


@pytest.mark.soak
def test_eighty_kills_at_any_moment(server, data, backbone, tmp_path):
    """At moments that chance chooses, to meet those that nobody thought of."""
    rng = np.random.default_rng(80)
    store = tmp_path / "store"
    leftovers = survived = 0
    for number in range(80):
        before, log = rows_kept(store), tmp_path / f"log-{number}"
        (child,) = server.start(data, store, log, slow=0.02)
        # Early, so that there is something left to lose in the next rounds.
        wanted = min(int(rng.integers(1, 3)), -(-(ROWS - before) // WINDOW))
        wait_for(wanted, log, child)
        time.sleep(float(rng.uniform(0, 0.1)))
        kill(child)
        ((status, _),) = server.wait()
        assert status in (0, -signal.SIGKILL)
        survived += status == 0
        gained, encoded = rows_kept(store) - before, sum(calls(log))
        assert gained <= encoded <= gained + WINDOW, "more was lost than the window in flight"
        leftovers += any(path.suffix == ".partial" for path in store.iterdir())
        if rows_kept(store) == ROWS:  # start over: kills at all stages are wanted
            store = tmp_path / f"store-{number}"
    assert survived < 80
    assert leftovers > 0  # some kills hit a shard half written
    before, log = rows_kept(store), tmp_path / "log-last"
    server.start(data, store, log)
    assert server.wait()[0][0] == 0
    assert sum(calls(log)) == ROWS - before
    assert_complete(server, data, store, backbone, tmp_path / "log-again")


@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.soak)])
def test_two_processes_write_at_once(server, data, backbone, tmp_path, rounds):
    for number in range(rounds):
        store, logs = tmp_path / f"store-{number}", [tmp_path / f"log-{number}-{name}" for name in "ab"]
        server.start(data, store, *logs, waits_for=logs)  # so that both are at work
        assert [status for status, _ in server.wait()] == [0, 0]
        assert ROWS <= sum(sum(calls(log)) for log in logs) <= 2 * ROWS
        assert_complete(server, data, store, backbone, tmp_path / f"log-{number}")


@pytest.mark.parametrize(
    "moment",
    [
        moment if moment == "in the middle" else pytest.param(moment, marks=pytest.mark.soak)
        for moment in crash_points.MOMENTS
    ],
)
def test_the_death_of_one_does_not_disturb_the_other(server, data, backbone, tmp_path, moment):
    store, logs = tmp_path / "store", [tmp_path / "log-a", tmp_path / "log-b"]
    barrier, dead = tmp_path / "barrier", tmp_path / "dead"
    server.start(data, store, *logs, halts=[(moment, ".parquet", barrier, 1)], waits_for=[dead])
    until(lambda: calls(logs[1]), "the other run, which has opened the store")
    crash_points.kill_at(barrier)
    dead.touch()
    assert [status for status, _ in server.wait()] == [-signal.SIGKILL, 0]
    assert_complete(server, data, store, backbone, tmp_path / "log-c")


@pytest.mark.parametrize(
    ("rows", "most"), [(8_000, 25), pytest.param(100_000, 200, marks=pytest.mark.soak)], ids=["8,000", "100,000"]
)
def test_memory_does_not_grow_with_the_features(server, tmp_path, rows, most):
    """20 taps of 64 numbers: held, the features of 8,000 rows would take 41 MB, those of 100,000 rows 512 MB."""
    path = tmp_path / "rows.jsonl"
    reached = []
    for count in (1_000, rows):
        path.write_text("".join(json.dumps({"image": None, "text": f"row {n}"}) + "\n" for n in range(count)))
        log, store = tmp_path / f"log-{count}", tmp_path / f"store-{count}"
        server.start(path, store, log, slow=0, stub=True, window=256, taps="all", longest=1800)
        ((status, megabytes),) = server.wait()
        assert status == 0
        assert sum(calls(log)) == count
        reached.append(megabytes)
    assert reached[1] - reached[0] < most
