"""Halt a process at a defined moment of writing a file, so that a test can kill it exactly there.

Everything in this package that writes a file or a folder whole or not at all (`files/whole.py`) writes one that ends in
`.partial` first, then renames it. A process that calls `halt` stops when it comes to the chosen moment of such a file,
says so in a barrier file, and goes on when it is released. Only one process stops at a barrier: those that come later
go on.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from qwen_vl_classifier.files import whole
from tests.waiting import until

MOMENTS = ("before the first byte", "in the middle", "before the rename", "after the rename")

VARIABLE = "TEST_HALT"
"""Environment variable with the arguments of `halt`, for processes that tests start."""


def settings(*halts: tuple[str, str, Path]) -> dict[str, str]:
    """Return the environment with which `halt_as_told` halts: moment, target and barrier of each time."""
    return {VARIABLE: json.dumps([(moment, target, str(barrier)) for moment, target, barrier in halts])}


def halt_as_told() -> None:
    """Halt where the environment says."""
    for moment, target, barrier in json.loads(os.environ.get(VARIABLE, "[]")):
        halt(moment, target, Path(barrier))


def halt(moment: str, target: str, barrier: Path, after: int = 0) -> None:
    """Have this process stop at a moment of writing a file, or of replacing a folder.

    Args:
        moment: One of `MOMENTS`. Of a folder, the first two are moments of the first file that Python writes in it.
            Where a folder is replaced in two steps, "before the rename" is between them.
        target: Part of the file's or folder's name while it is partial.
        barrier: Made, with the process id in it, when the process stops.
        after: How many such files are written before.
    """
    assert moment in MOMENTS
    open_path, replace, exchange = Path.open, Path.replace, whole.exchange
    opened: list[Path] = []

    def opening(path: Path, *arguments: Any, **options: Any) -> Any:
        file = open_path(path, *arguments, **options)
        path = path if whole.is_partial(path.name) else path.parent
        if not whole.is_partial(path.name) or target not in path.name or path in opened:
            return file
        opened.append(path)
        if len(opened) <= after:
            return file
        if moment == "before the first byte":
            stop_at(barrier)
        return _Half(file, lambda: stop_at(barrier)) if moment == "in the middle" else file

    def replacing_by(rename: Callable[[Path, Any], Any]) -> Callable[[Path, Any], Any]:
        def replacing(path: Path, other: Any) -> Any:
            concerned = path in opened[after:]
            if concerned and moment == "before the rename":
                stop_at(barrier)
            result = rename(path, other)
            if concerned and moment == "after the rename":
                stop_at(barrier)
            return result

        return replacing

    Path.open, Path.replace = opening, replacing_by(replace)  # type: ignore[method-assign, assignment]
    whole.exchange = replacing_by(exchange)


def stop_at(barrier: Path) -> None:
    """Stop until this process is released, unless another one has stopped at this barrier before."""
    noted = barrier.with_name(f"{barrier.name}-{os.getpid()}")
    noted.write_text(str(os.getpid()))
    try:
        os.link(noted, barrier)  # there with its content, or not at all
    except FileExistsError:
        return
    finally:
        noted.unlink()
    until(_released(barrier).exists, "being killed or released")


def release(barrier: Path) -> None:
    """Let the process that stops at a barrier go on."""
    _released(barrier).touch()


def kill_at(barrier: Path) -> int:
    """Wait until a process has stopped at a barrier, kill it, and return its id once it is dead."""
    until(barrier.exists, f"a process that stops at {barrier.name}")
    pid = int(barrier.read_text())
    os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid), "the end of a process that was killed")
    return pid


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended, even where its parent has not noticed."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _released(barrier: Path) -> Path:
    return barrier.with_name(f"{barrier.name}-released")


class _Half:
    """A file of which the first half is written, then something happens."""

    def __init__(self, file: Any, then: Callable[[], None]) -> None:
        self._file = file
        self._then = then

    def write(self, content: bytes) -> int:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._then()
        return self._file.write(content[len(content) // 2 :]) + len(content) // 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
