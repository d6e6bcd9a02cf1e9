"""Options of the suite, and what holds for every test. No test reaches the network."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import hypothesis
import psutil
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once

gc.disable()  # until all tests are collected: importing makes nearly a million objects, and hardly any garbage

# A shell that runs tests in the background has them ignore SIGINT, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By default the same examples in every run, so that a suite that passes here passes elsewhere; `make soak` explores.
# How long it takes to draw an example or to run it is no property of the code.
COMMON = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile("repeat", derandomize=True, **COMMON)
hypothesis.settings.register_profile("explore", derandomize=False, **COMMON)
hypothesis.settings.load_profile("repeat")

MARK = "TEST_SESSION"
"""Environment variable that tells which processes were started by tests of this session."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wait-limit",
        type=float,
        default=300,
        metavar="SECONDS",
        help="after how long tests give up a wait for something that does not come (default: 300)",
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TEST_WAIT_LIMIT"] = str(config.getoption("--wait-limit"))  # for `tests/waiting.py`, imported later
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":  # else others run the tests
        config.pluginmanager.import_plugin("tests.fixtures")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin long tests first; the others stay in the order that they have."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, each of which would look at all of it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End a run that failed with the command that runs the failed tests again, in the same order."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    reports = reporter.stats.get("failed", []) + reporter.stats.get("error", [])
    failed = list(dict.fromkeys(report.nodeid for report in reports))
    if failed:
        threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
        print("\nRun the failed tests again, in the same order:")
        seed = config.getoption("randomly_seed", None)  # none with `-p no:randomly`
        order = [] if seed is None else [f"--randomly-seed={seed}"]
        print(shlex.join([*threads, sys.argv[0], *order, *failed]))


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests and the programs that they start put into the user's cache folder among their own files."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """Fail at the end where processes that tests started are still there.

    Not seen: a process that has lost both its parent and its environment.
    """
    os.environ[MARK] = f"{os.getpid()} {time.time_ns()}"
    yield
    from tests.waiting import LIMIT

    end = time.monotonic() + LIMIT
    while left := _processes_of_tests():
        assert time.monotonic() < end, "processes outlive the tests that started them:\n" + "\n".join(left)
        time.sleep(0.05)


def _processes_of_tests() -> list[str]:
    """Describe the processes that tests of this session have started and that run: which test, and which command."""
    found = []
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment, command = process.environ(), process.cmdline()
            ours = process.pid in children or environment.get(MARK) == os.environ[MARK]
            # Python's resource tracker ends with the process that it serves.
            if ours and process.pid != os.getpid() and command and "resource_tracker" not in " ".join(command):
                test = environment.get("PYTEST_CURRENT_TEST", "a test")
                found.append(f"{test}: {process.pid} {shlex.join(command)[:300]}")
    return found
