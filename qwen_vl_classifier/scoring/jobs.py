"""What a driver and its workers tell each other: jobs, shards, tasks and answers, all of them small and JSON."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from qwen_vl_classifier.errors import QwenVLClassifierError


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one file.

    Attributes:
        source: Path or URL of the file, or of the folder of pictures; "" for rows given in Python.
        start: Where the first row begins: its byte (JSONL, CSV), or its position from 0.
        rows: How many rows.
        first_number: The first row's number in messages, from 1: its line (JSONL, CSV) or position.
        names: The names of the pictures, where the source is a folder of these.
    """

    source: str
    start: int
    rows: int
    first_number: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one output file.

    Attributes:
        index: Which shard, from 0.
        first_row: Position of its first row in the whole data, from 0.
        rows: How many rows.
        spans: Where they lie, in order.
    """

    index: int
    first_row: int
    rows: int
    spans: tuple[Span, ...]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Shard:
        """Make a shard from its fields."""
        spans = (Span(**{**span, "names": tuple(span["names"])}) for span in record["spans"])
        return cls(record["index"], record["first_row"], record["rows"], tuple(spans))


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no result.

    Attributes:
        code: In one word for programs: a code of `ImageError`, or invalid_row (the row's cells), out_of_memory (it does
            not fit, alone), crashed (it ends the process), timed_out (the process hangs at it) or not_finite (the
            model's answer is not a number).
        message: For people.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do with a shard.

    Attributes:
        shard: Which.
        excluded: Its rows that are left out, by position in the shard, and the error that each becomes.
        probe: Positions of rows that are computed without keeping the results, to see whether the worker survives them;
            `None` asks for the whole shard, kept.
        careful: Whether a worker has died with it. Pictures are then opened one after the other: several at a time may
            have taken too much memory.
    """

    shard: Shard
    excluded: Mapping[int, RowError] = field(default_factory=dict)
    probe: range | None = None
    careful: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {
            "shard": asdict(self.shard),
            "excluded": {position: [error.code, error.message] for position, error in self.excluded.items()},
            "probe": None if self.probe is None else [self.probe.start, self.probe.stop],
            "careful": self.careful,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Task:
        """Make a task from what `to_json` returned."""
        return cls(
            Shard.from_json(record["shard"]),
            {int(position): RowError(*error) for position, error in record["excluded"].items()},
            None if record["probe"] is None else range(*record["probe"]),
            record["careful"],
        )


@dataclass(frozen=True, slots=True)
class ShardReport:
    """The outcome of a shard.

    Attributes:
        index: Which shard.
        rows: Rows in it.
        errors: Rows with an error.
        seconds: Time that the model took.
        problems: Of rows that were left out of features: position in the data and what is wrong.
    """

    index: int
    rows: int
    errors: int
    seconds: float = 0.0
    problems: Sequence[tuple[int, str]] = ()


class Pulse:
    """A worker's progress, written by the threads that do its work, so that it stops where one of them hangs.

    Attributes:
        steps: Grows with everything that is done, such as a picture that is opened or a layer of the model.
        row: Position in the whole data of the row that is being prepared; `None` where none is. Others are being read
            ahead: of those whose pictures are not there yet it is the first, so where all stands still, it is the
            one that hangs.
        done: Rows of the shard in work that the model has done.
        on_done: Called with `done` whenever that changes.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.row: int | None = None
        self.done = 0
        self.on_done: Callable[[int], object] | None = None

    def count_done(self, rows: int) -> None:
        """Record how many rows of the shard in work the model has done."""
        self.done = rows
        if self.on_done is not None:
            self.on_done(rows)

    def step(self) -> None:
        """Record that something is done."""
        self.steps += 1

    def prepare(self, row: int | None) -> None:
        """Record that a row is being prepared from now on, or that none is."""
        self.row = row
        self.steps += 1


class Worker(Protocol):
    """Does the shards of one job, in one process. Until `load` it holds nothing that takes long.

    Attributes:
        pulse: Written while it works.
    """

    @property
    def pulse(self) -> Pulse: ...  # noqa: D102

    def load(self) -> None:
        """Load models and open what is written to; where that was done, do nothing."""

    def run_all(self, tasks: Iterable[Task], *, endless: bool = False) -> Iterator[ShardReport]:
        """Do shards, and report each once its results are on disk. The next one is read while the model is at work.

        Args:
            tasks: None of them a probe. A thread asks for the next one early: it may block until there is one, and the
                report of the one before comes all the same.
            endless: Whether it may block for ever. An error then leaves that thread behind, and the process has to be
                ended by `os._exit`.
        """

    def probe(self, task: Task) -> object:
        """Do the rows of a probe without keeping the results."""

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        """Remove what a worker that died left of shards that no other worker has. Needs no `load`."""


class Job(Protocol):
    """All that a worker needs to know, beside its shards; a frozen dataclass.

    Attributes:
        kind: What is done: "score" or "extract".
        device: Where the model runs, as in `Backbone.load`.
        threads: Of the CPU; 0 leaves the number as it is.
        sharing: Workers that share the memory of this worker's device.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[str]

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def threads(self) -> int: ...  # noqa: D102

    @property
    def sharing(self) -> int: ...  # noqa: D102

    def worker(self) -> Worker:
        """Return a worker for this job, not loaded."""


def job_to_json(job: Job) -> dict[str, Any]:
    """Return a job with its kind: what `workers.job_from_json` takes."""
    return {"kind": job.kind, **asdict(job)}


Answer: TypeAlias = "Mapping[str, Any]"
"""What a worker tells its driver, as JSON. It has one of these keys: ready (true), report (a `ShardReport`), probed
(true), pulse (steps, row and done of a `Pulse`, about once a second), error (class and message of an expected error)
or defect (a traceback)."""

_PULSE_SECONDS = 1.0


def work(worker: Worker, inbox: queue.Queue[Task] | queue.SimpleQueue[Task], tell: Callable[[Answer], object]) -> None:
    """Load a worker and run its tasks; return only after an error.

    Args:
        worker: Not loaded.
        inbox: Its tasks. They are done in their order, and answered in it.
        tell: Given each answer, by one thread at a time.
    """
    telling = threading.Lock()

    def tell_alone(answer: Answer) -> None:
        with telling:
            tell(answer)

    ended = threading.Event()
    threading.Thread(target=_tell_pulse, args=(worker.pulse, tell_alone, ended), name="pulse", daemon=True).start()
    try:
        _work(worker, inbox, tell_alone)
    finally:
        ended.set()


def _tell_pulse(pulse: Pulse, tell: Callable[[Answer], object], ended: threading.Event) -> None:
    """Report how far a worker is, as long as it makes progress."""
    told = None
    while not ended.wait(_PULSE_SECONDS):
        now = [pulse.steps, pulse.row, pulse.done]
        if now != told:
            tell({"pulse": now})
            told = now


def _work(worker: Worker, inbox: queue.Queue[Task] | queue.SimpleQueue[Task], tell: Callable[[Answer], object]) -> None:
    held: list[Task] = []  # the probe that ended a series of shards

    def shards() -> Iterator[Task]:
        while (task := inbox.get()).probe is None:
            yield task
        held.append(task)

    try:
        worker.load()
        tell({"ready": True})
        while True:
            for report in worker.run_all(shards(), endless=True):
                tell({"report": asdict(report)})
            worker.probe(held.pop())
            tell({"probed": True})
    except QwenVLClassifierError as error:
        tell({"error": [type(error).__name__, str(error)]})
    except Exception:
        tell({"defect": traceback.format_exc()})
