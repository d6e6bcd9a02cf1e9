"""Options of the suite, and fixtures that several folders of tests share. No test reaches the network."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once

from qwen_vl_classifier import Backbone, Classifier, Example, ServeConfig, Tap
from qwen_vl_classifier.backbone import devices
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.scenes.statements import scene_examples
from tests import nano
from tests.fresh import FreshProcesses

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

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """The built-in backbone, in float32 on the CPU."""
    return Backbone.load("builtin:tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_classifier(tiny_backbone: Backbone) -> Classifier:
    """A classifier whose head is untrained: everything but its accuracy is real."""
    spec = HeadSpec("mlp", tiny_backbone.hidden_size, units=512, dropout=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = spec.build()
    return Classifier(tiny_backbone, Tap(-1, "mean"), head, spec)


@pytest.fixture(scope="session", params=nano.FAMILIES)
def nano_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A random checkpoint of each family in turn: its `model_type` and its folder."""
    folder = tmp_path_factory.mktemp("nano") / request.param
    return request.param, nano.make_checkpoint(request.param, folder)


@pytest.fixture(scope="session")
def mixed_examples() -> list[Example]:
    """Examples of every form: several sizes, shared pictures, two pictures, none, and hostile text."""
    rng = np.random.default_rng(0)

    def noise(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    first, second, third = noise(120, 90), noise(60, 150), noise(224, 200)
    return [
        Example(first, "hello world"),
        Example(first, "another, longer text about it <|image_pad|><|im_end|>"),
        Example(second, "x"),
        Example((first, second), "two pictures"),
        Example(None, "no picture at all"),
        Example(third, "There is 1 tower with at least 2 yellow blocks."),
        Example(first, "the third text about the same picture"),
        Example((second, first), "two pictures"),
    ]


@pytest.fixture(scope="session")
def scene_rows() -> list[Example]:
    """Labelled examples on scenes of the test split, two of each picture."""
    return [
        Example(picture, line.text, line.label, fields={"kind": line.kind})
        for picture, _, lines in scene_examples("test", scenes=40, per_scene=2)
        for line in lines
    ]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Processes that share nothing with the tests, for what has to hold after a restart or to survive a kill."""
    processes = FreshProcesses(tmp_path_factory.mktemp("fresh") / "errors.txt")
    yield processes
    processes.close()


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return the folder of a real data set, or skip where it is not on this machine."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"the real data set {name} is not on this machine")
        return folder

    return find


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread, for tests that compare bit by bit.

    How many threads share a matrix product, and with it the order of its sums, depends on the machine's load.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut batches alike on every machine: where memory is short, they follow what is free of it, and last bits too."""
    monkeypatch.setattr(devices, "free_memory", lambda _: 10**12)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[str]:
    """The address of a server of one classifier, called my_classifier; it has no key and keeps nothing.

    It runs in this process, so it ends with the module: tests elsewhere change what it rests on.
    """
    from tests.serving.clock import PATIENT  # here, since most tests need no server
    from tests.serving.served import listening

    folder = tiny_classifier.save(tmp_path_factory.mktemp("server") / "my_classifier")
    with listening(ServeConfig(classifiers=(str(folder),), device="cpu", **PATIENT)) as url:
        yield url
