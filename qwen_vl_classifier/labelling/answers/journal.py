"""The journal: every answer as one line of a file that only grows, on disk before the next question is shown.

::

    {"format": "qwen-vl-classifier answers", "version": 1, "labels": [...], "one_of": false, "question": ..., ...}
    {"event": "answer", "id": "9f3c...", "at": "2026-01-02T03:04:05.678Z", "key": "5e1c...", "label": "label", ...}
    {"event": "undo", "id": "77ab...", "at": ..., "undoes": "9f3c...", ...}

Several processes may write to one journal. A record is written by one call to the end of the file (O_APPEND), under a
lock of the file, and brought to disk (fsync). A process that is killed in this call leaves part of a line at the end,
an answer that nobody was told is saved: who reads passes over it, and who writes next removes it under the lock. On
file systems without locks, O_APPEND alone keeps records apart, which NFS does not promise: there, let one process write
at a time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.config.spelling import named, spelled
from qwen_vl_classifier.errors import ConfigError, JournalError, first_of, one_line
from qwen_vl_classifier.files.bounded import REFUSED, open_regular_file, parse_json
from qwen_vl_classifier.labelling.answers.records import Record, described, read_record
from qwen_vl_classifier.labelling.asking import NO, SKIP, UNSURE, YES, LabelSpec, check_labels

_log = logging.getLogger(__name__)

FORMAT, VERSION = "qwen-vl-classifier answers", 1
SUFFIX = ".answers.jsonl"
"""Ends the name of the journal, in place of the `.jsonl` of the data set."""

MOST_LINE = 1 << 20
"""Bytes of a line: a record has about three hundred, and the first line a few for each label."""

_MOST_QUESTION = 2_000  # characters of the text of all rows that the first line repeats


@dataclass(frozen=True, slots=True)
class _Line:
    """A complete line of the file: its number from 1, and its content, empty where it is too long."""

    number: int
    content: bytes
    is_too_long: bool = False


class Journal:
    """The journal beside a data set. Use `at`.

    Attributes:
        out: The data set.
        path: The journal.
        labels: What is asked.
        one_of: Whether each row has exactly one of the labels.
        seed: Of what is random in the choice of rows, as in the first line.
        data: The rows with which it was begun, as in the first line.
        damaged: Numbers of lines that another process wrote and that cannot be read.
    """

    def __init__(self, out: Path, labels: Sequence[LabelSpec], *, one_of: bool, seed: int, data: str) -> None:
        self.out = out
        self.path = journal_path(out)
        self.labels = tuple(labels)
        self.one_of = one_of
        self.seed = seed
        self.data = data
        self.damaged: list[int] = []
        self._offset = 0  # of the first byte that was not read yet
        self._line = 0  # lines before it
        self._status: os.stat_result | None = None

    @classmethod
    def at(
        cls,
        out: str | os.PathLike[str],
        *,
        labels: Sequence[LabelSpec],
        one_of: bool = False,
        question: str | None = None,
        seed: int = 0,
        backbone: str = "",
        data: str = "",
    ) -> Journal:
        """Open the journal of a data set, or begin it.

        Args:
            out: The data set, whose name ends in `.jsonl`.
            labels: What is asked.
            one_of: Whether each row has exactly one of the labels.
            question: The text of all rows; `None` where rows have texts of their own.
            seed: Of what is random in the choice of rows; a journal that is there keeps its own.
            backbone: What reads the rows, for the record: another one may go on with the answers.
            data: The rows, for the record.

        Raises:
            ConfigError: The labels or the name of the data set are not usable, or the journal is about others.
            JournalError: It cannot be read or written, or a line is damaged.
        """
        check_labels(labels, one_of=one_of)
        journal = cls(Path(out), labels, one_of=one_of, seed=seed, data=data)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "question": None if question is None else _shortened(question),
            "labels": [label.to_json() for label in labels],
            "one_of": one_of,
            "seed": seed,
            "backbone": backbone,
            "data": data,
        }
        with journal._refusing("opened"):
            journal._begin(header)
        journal._check_header(header)
        return journal

    def append(self, record: Record, *, durable: bool = True) -> None:
        """Write a record to the end; on return it is on disk.

        Args:
            record: What happened.
            durable: Bring it to disk; a record that may be lost with the machine needs no wait.

        Raises:
            JournalError: It cannot be written: nothing of it is there.
        """
        with self._refusing("saved"), self._locked() as (descriptor, is_locked):
            self._check_same(os.fstat(descriptor))
            end, begin = _end_of_lines(descriptor, repair=is_locked)
            _write(descriptor, begin + record.line(), end if is_locked else None, durable=durable)

    def read_new(self) -> list[Record]:
        """Return the records that were added since the last call, by any process, in the order of the file.

        A line that is not a record is logged, and its number added to `damaged`: this process goes on without it. The
        next one that opens the journal refuses it.

        Raises:
            JournalError: The file was removed, replaced or cut, or cannot be read.
        """
        records, problems = self._parsed()
        for number, problem in problems:
            self.damaged.append(number)
            _log.warning("%s, line %d: %s; it is left out", self.path, number, problem)
        return records

    def read_all(self) -> list[Record]:
        """Return all records when the journal was just opened.

        Raises:
            JournalError: As in `read_new`, or a line is not a record; the message names the first ten.
        """
        records, problems = self._parsed()
        if problems:
            lines = first_of([f"line {number} ({problem})" for number, problem in problems])
            raise JournalError(
                f"{self.path}: {lines}; expected one answer a line, as label writes them; delete what is damaged to go "
                "on without these answers"
            )
        return records

    def has_grown(self) -> bool:
        """Tell whether there is something that `read_new` has not read."""
        try:
            return self.path.stat().st_size > self._offset
        except OSError:
            return True

    def _parsed(self) -> tuple[list[Record], list[tuple[int, str]]]:
        records: list[Record] = []
        problems: list[tuple[int, str]] = []
        names = [None] if self.one_of else [label.name for label in self.labels]
        with self._refusing("read"):
            for line in self._lines():
                if line.number == 1 or not (line.content.strip() or line.is_too_long):
                    continue
                try:
                    if line.is_too_long:
                        raise ValueError(f"more than {MOST_LINE:,} bytes")
                    records.append(read_record(line.content, labels=names, answers=self.answers))
                except ValueError as problem:
                    problems.append((line.number, one_line(problem, 100)))
        return records, problems

    def _begin(self, header: Mapping[str, Any]) -> None:
        """Write the first line where there is none; a first line that was cut short is written again."""
        if self.out.suffix != ".jsonl" or self.out.name.endswith(SUFFIX):
            raise ConfigError(
                f"{spelled('out', str(self.out))}; expected a file whose name ends in .jsonl; give another name"
            )
        if self.out.exists() and not self.path.exists():
            raise ConfigError(
                f"{self.out} is there without {self.path.name}, so label did not write it, and would replace it; give "
                f"another name with {named('out')}"
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(create=True) as (descriptor, is_locked):
            end, _ = _end_of_lines(descriptor, repair=is_locked)
            if not end:
                _write(descriptor, json.dumps(header).encode() + b"\n", 0 if is_locked else None)
                _sync_folder(self.path.parent)
            self._status = os.fstat(descriptor)

    def _check_header(self, header: Mapping[str, Any]) -> None:
        with self._refusing("read"), open_regular_file(self.path) as file:
            first = file.readline(MOST_LINE + 1)
        try:
            found = parse_json(first) if len(first) <= MOST_LINE else None
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ConfigError(
                f"{self.path}: its first line is not that of answers of label; expected such a file, or none; give "
                f"another name with {named('out')}"
            )
        if found.get("version") != VERSION:
            raise ConfigError(
                f"{self.path}: version {one_line(found.get('version'), 20)} of the format; expected {VERSION}; go on "
                "with the version of this package that wrote it"
            )
        for name, what in (("labels", "labels"), ("one_of", named("one_of")), ("question", "the question")):
            if found.get(name) != header[name]:
                raise ConfigError(
                    f"{self.path}: its answers are about {what} {described(found.get(name))}, and now it is "
                    f"{described(header[name])}; give the same again, or another file with {named('out')}"
                )
        if is_number(found.get("seed"), 0, 2**63) and isinstance(found["seed"], int):
            self.seed = found["seed"]
        if isinstance(found.get("data"), str):
            self.data = one_line(found["data"], 200)

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers that are possible."""
        words = tuple(label.name for label in self.labels) if self.one_of else (YES, NO)
        return (*words, SKIP, UNSURE)

    def _lines(self) -> Iterator[_Line]:
        """Yield the complete lines that were not read yet."""
        with open_regular_file(self.path) as file:
            self._check_same(os.fstat(file.fileno()))
            file.seek(self._offset)
            while content := file.readline(MOST_LINE + 1):
                size, is_too_long = len(content), len(content) > MOST_LINE
                while not content.endswith(b"\n") and is_too_long and (content := file.readline(MOST_LINE)):
                    size += len(content)
                if not content.endswith(b"\n"):
                    return
                self._offset += size
                self._line += 1
                yield _Line(self._line, b"" if is_too_long else content, is_too_long)

    def _check_same(self, status: os.stat_result) -> None:
        """Make sure that this is the file that was opened, and that nothing that was read is gone.

        Raises:
            OSError: It is not.
        """
        if self._status is None or not os.path.samestat(status, self._status):
            raise OSError(errno.ESTALE, "it was replaced by another file")
        if status.st_size < self._offset:
            raise OSError(errno.ESTALE, "it was cut by another program")

    @contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[tuple[int, bool]]:
        """Open the file for writing at its end, and lock it where that is possible; say whether it is."""
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.path, flags | (os.O_CREAT if create else 0), 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is a pipe, socket or device")
            is_locked = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                is_locked = False
            yield descriptor, is_locked
        finally:
            os.close(descriptor)

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Turn an `OSError` into one line.

        Args:
            what: What cannot be done: "read", "saved" or "opened".
        """
        try:
            yield
        except JournalError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if what == "saved":
                raise JournalError(
                    f"{self.path}: the answer was not saved ({reason}); free some space or restore the file, then "
                    "answer again: all earlier answers are kept"
                ) from error
            advice = "give another file" if error.errno in REFUSED else "check the file and its folder"
            raise JournalError(f"{self.path}: answers cannot be {what} ({reason}); {advice}") from error


def journal_path(out: Path) -> Path:
    """Return the journal of a data set: `rows.answers.jsonl` of `rows.jsonl`."""
    return out.with_name(out.stem + SUFFIX)


def _end_of_lines(descriptor: int, *, repair: bool) -> tuple[int, bytes]:
    """Return where the last complete line ends, and what has to be written first so that a new line begins.

    Args:
        descriptor: The open file.
        repair: Remove what a killed process left after that line; only under the lock, since it is known then that
            nobody is writing it.
    """
    end = size = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        block = os.pread(descriptor, end - start, start)
        if (found := block.rfind(b"\n")) >= 0:
            end = start + found + 1
            break
        end = start
    if end == size:
        return end, b""
    if repair:
        os.ftruncate(descriptor, end)
        return end, b""
    return end, b"\n"


def _write(descriptor: int, line: bytes, end: int | None, *, durable: bool = True) -> None:
    """Write a line to the end of a file by one call, or leave the file as it was.

    Args:
        descriptor: The open file.
        line: What to write.
        end: The size of the file before, if it is locked.
        durable: Bring it to disk.

    Raises:
        OSError: Not all of it can be written.
    """
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fsync(descriptor)
    except OSError:
        if end is not None:
            with suppress(OSError):
                os.ftruncate(descriptor, end)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system on which that has no meaning
            os.fsync(handle)
    finally:
        os.close(handle)


def _shortened(text: str) -> str:
    if len(text) <= _MOST_QUESTION:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:_MOST_QUESTION]}... (SHA-256 {digest})"
