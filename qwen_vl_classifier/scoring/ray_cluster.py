"""A connection to a Ray cluster: one that is there, or one on this machine that ends with the connection.

A cluster that is started here listens on loopback only, asks for a token, has no dashboard, reports no usage, and keeps
its files in a temporary folder.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.extras import require

_OBJECT_STORE_BYTES = 80_000_000  # the least that Ray takes; nothing is put there

_REACH = 10.0  # seconds to wait for an answer from a cluster's address

_ANY_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}
_OWN_CLUSTER = {
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill actors for the memory that other programs take
    "RAY_worker_niceness": "0",  # by default 15: beside programs that compute, actors then hardly start
}
_LOOPBACK = {
    # Ray takes 127.0.0.1 for "the address that others see". This is its switch for desktops, whose clusters are local.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray keeps one in the user's home
}
"""Ray looks at these when it is imported, and keeps to them as long as the process lives."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors there are, and where.

    Attributes:
        workers: How many.
        address: Of the cluster; "" starts one on this machine, which ends with the run.
        cpus: That each actor asks of the cluster.
        gpus: That each actor asks of the cluster; may be a fraction.
    """

    workers: int
    address: str = ""
    cpus: int = 1
    gpus: float = 0.0


@contextmanager
def connected(pool: Pool) -> Iterator[Any]:
    """Connect to a cluster, or start one; where this process is connected already, that connection is used and left.

    Raises:
        ConfigError: The cluster cannot be reached.
        MissingExtraError: Ray is not installed.
    """
    if pool.address not in ("", "auto"):
        _check_address(pool.address)
    with ExitStack() as stack:
        stack.enter_context(_environment(_ANY_CLUSTER if pool.address else _ANY_CLUSTER | _OWN_CLUSTER))
        if not pool.address and _loopback_holds():
            stack.enter_context(_environment(_LOOPBACK))
        ray = require("ray", extra="scale")
        # Ray prints the deaths of actors; what this program prints on stdout is its result.
        stack.enter_context(redirect_stdout(sys.stderr))
        if not ray.is_initialized():
            options: dict[str, Any] = {"address": pool.address}
            if not pool.address:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
                options = {
                    "address": "local",
                    "num_cpus": pool.workers * pool.cpus,
                    "include_dashboard": False,
                    "object_store_memory": _OBJECT_STORE_BYTES,
                    "_temp_dir": folder,
                }
            try:
                with _signals_kept():
                    ray.init(**options, log_to_driver=False, configure_logging=False)
            except ConnectionError as error:
                raise _unreachable(pool.address, summary(error)) from error
            stack.callback(ray.shutdown)
        yield ray


def _check_address(address: str) -> None:
    """Make sure that something listens: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()
    except ValueError:
        raise _unreachable(address, "it is not HOST:PORT") from None
    except OSError as error:
        raise _unreachable(address, error.strerror or type(error).__name__) from error


def _unreachable(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"ray_address {address!r}: no cluster can be reached there ({why}); give the HOST:PORT that `ray start --head` "
        "printed, auto on a machine of the cluster, or nothing to use this machine alone"
    )


@functools.cache
def _loopback_holds() -> bool:
    """Tell whether Ray was not yet imported when this process first came here."""
    return "ray" not in sys.modules


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that are not set by the user, and take them away again."""
    ours = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(error: Exception) -> str:
    """Return the line of a message of Ray that matters: where a traceback is added, the last one."""
    lines = str(error).strip().splitlines()
    return lines[-1 if any(line.startswith("Traceback") for line in lines) else 0].rstrip(".")
