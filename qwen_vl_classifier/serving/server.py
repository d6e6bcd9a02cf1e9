"""Run an application as a process should be run: bounded connections, an orderly end, an honest exit status."""

from __future__ import annotations

import socket

from fastapi import FastAPI

from qwen_vl_classifier.config import ServeConfig


class Server:
    """One listening socket and the application behind it.

    Args:
        config: Limits and time limits.
        listener: A socket that listens; it is closed at the end.

    Example:
        >>> server = Server(config, listener)  # doctest: +SKIP
        >>> status = server.run(create_app(config, on_failure=server.fail))  # doctest: +SKIP
    """

    def __init__(self, config: ServeConfig, listener: socket.socket) -> None:
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """End because of an error: what was accepted is answered, then `run` raises it. To be called in the loop."""
        raise NotImplementedError

    def run(self, app: FastAPI) -> int:
        """Serve until a signal or a failure.

        Returns:
            The exit status: 0 after SIGTERM, 1 if requests had to be cut off.
        """
        raise NotImplementedError
