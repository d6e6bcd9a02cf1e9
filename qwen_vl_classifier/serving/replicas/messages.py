"""What the process that listens and those that serve tell each other, over a pair of sockets for each of them.

Down goes one byte at a time, with a connection where there is one to serve; up go lines of JSON.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, TypedDict

CONNECTION: Final = b"c"
"""Serve the connection that comes with this."""

READY: Final = b"r"
"""Answer requests: all others have loaded too."""

SHED: Final = b"s"
"""End one connection with its next answer; others have fewer."""

DRAIN: Final = b"d"
"""Finish what was accepted, and end. Where the socket is closed, that means the same."""

State: TypeAlias = Literal["started", "loaded", "ready", "ending"]
"""How far a process is: health checks are answered, its classifiers are loaded, requests are answered, or no more."""


class Report(TypedDict, total=False):
    """The state of a process.

    Attributes:
        state: How far it is.
        taken: How many connections it has taken over since it began.
        open: How many of these are open.
        error: Why it ends, where that is an expected error: class and message.
        failure: Why it ends, where it is a defect, in one line.
    """

    state: State
    taken: int
    open: int
    error: tuple[str, str]
    failure: str
