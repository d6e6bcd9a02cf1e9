"""Several processes behind one socket: real servers on two CPU "devices", real HTTP, real kills and signals."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from qwen_vl_classifier import Classifier, Example, ServeConfig
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.serving.replicas.supervisor import shared_out
from tests.crash_points import has_ended
from tests.serving.replicas import stub_model
from tests.serving.server_process import ServerProcess, running
from tests.waiting import LIMIT, until

CALLERS = 6
_FAILED = "the server failed (ChildProcessError: the process on cpu failed"
_PAUSE = 0.02  # seconds between two requests of a caller: what starts meanwhile needs the processor too
TEXTS = tuple(f"claim {number}" for number in range(5))

PARENT = f"""
import sys
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.serving.replicas import supervisor
supervisor._FIRST_PAUSE, supervisor._END_SECONDS = 0.05, {LIMIT}
supervisor.REPLICA = (sys.executable, "-W", "error", "-m", "tests.serving.replicas.stub_model", "{{model}}")
sys.exit(main(sys.argv[1:]))
"""


def command(*arguments: str, model: str = "stub") -> tuple[str, ...]:
    """Return the command of a server in which no limit is met by being slow."""
    names = ("header-timeout", "body-timeout", "decode-timeout", "deadline", "grace")
    limits = [word for name in names for word in (f"--{name}", str(LIMIT))]
    return ("-c", PARENT.format(model=model), "serve", *arguments, *limits, "--device", "cpu,cpu", "--port", "0")


def replicas(server: ServerProcess) -> set[int]:
    """Return the processes that serve."""
    return {child.pid for child in psutil.Process(server.process.pid).children()}


def requests_of(server: ServerProcess) -> dict[str, int]:
    """Return the process that answered each request, by the id of the request."""
    lines = server.log.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {entry["request_id"]: entry["process"] for entry in entries if "request_id" in entry}


class Callers:
    """Clients with a connection each, which ask one thing after the other and note what they are told.

    Attributes:
        answered: Of each caller, the ids of its requests that were answered.
        lost: Of each caller, those that were not.
        scores: What was said of each text.
    """

    def __init__(self, server: ServerProcess) -> None:
        self.answered: list[list[str]] = [[] for _ in range(CALLERS)]
        self.lost: list[list[str]] = [[] for _ in range(CALLERS)]
        self.scores: dict[str, set[float]] = {text: set() for text in TEXTS}
        self.statuses: Counter[int] = Counter()
        self._server = server
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(CALLERS)
        self._futures = [self._threads.submit(self._ask, number) for number in range(CALLERS)]

    def _ask(self, caller: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=LIMIT, trust_env=False) as client:
            for number in itertools.count():
                if self._over.wait(_PAUSE):
                    return
                text, name = TEXTS[number % len(TEXTS)], f"{caller}-{number}"
                try:
                    answer = client.post(
                        "/v1/classify", json={"input": [{"text": text}]}, headers={"X-Request-ID": name}
                    )
                except httpx.ConnectError:
                    return  # nobody listens any more
                except httpx.TransportError:
                    self.lost[caller].append(name)
                    continue
                self.statuses[answer.status_code] += 1
                assert answer.status_code in (200, 503), answer.text
                if answer.status_code == 200:
                    self.answered[caller].append(name)
                    self.scores[text].add(answer.json()["data"][0]["score"])

    @property
    def count(self) -> int:
        return sum(map(len, self.answered))

    def go_on(self) -> None:
        """Return after some more answers to each."""
        before = [len(names) for names in self.answered]

        def further() -> bool:
            for future in self._futures:
                assert not future.done() or future.result() is None
            return all(len(now) >= then + 3 for now, then in zip(self.answered, before, strict=True))

        until(further, "answers to all callers")

    def finish(self) -> None:
        self._over.set()
        for future in self._futures:
            future.result(timeout=LIMIT)
        self._threads.shutdown()


@pytest.mark.long
def test_two_processes_serve_as_one(tmp_path: Path) -> None:
    serve_as_one(tmp_path / "log", "claims", "stub", [stub_model.probability(text) for text in TEXTS])


@pytest.mark.soak
def test_two_processes_serve_a_real_classifier_as_one(tmp_path: Path, tiny_classifier: Classifier) -> None:
    folder = tiny_classifier.save(tmp_path / "claims")
    expected = tiny_classifier.predict_proba([Example(None, text) for text in TEXTS])[:, 1].tolist()
    serve_as_one(tmp_path / "log", str(folder), "real", expected)


def serve_as_one(log: Path, folder: str, model: str, expected: Sequence[float]) -> None:
    """Use one server for all of it, since its start is what takes long."""
    with running(log, *command(folder, model=model)) as server:
        server.until_ready()
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == f"ready: claims at {server.url}\n"
        all_say_the_same(server)
        callers = Callers(server)
        callers.go_on()
        a_killed_process_costs_its_own_requests(server, callers)
        callers.finish()
        counters_are_sums(server, callers)
        for text, probability in zip(TEXTS, expected, strict=True):
            assert sorted(callers.scores[text]) == pytest.approx([probability] * len(callers.scores[text]), abs=1e-6)
        sigterm_under_load(server)


def all_say_the_same(server: ServerProcess) -> None:
    """Connections are dealt out in turn, so that two of them reach both processes."""
    with (
        httpx.Client(base_url=server.url, trust_env=False, timeout=LIMIT) as first,
        httpx.Client(base_url=server.url, trust_env=False, timeout=LIMIT) as second,
    ):
        answers = [client.get("/v1/models", headers={"X-Request-ID": "same"}) for client in (first, second)]
        assert answers[0].json() == answers[1].json()
        one, other = (
            client.get("/readyz", headers={"X-Request-ID": f"ready{client is first}"}) for client in (first, second)
        )
        assert one.status_code == other.status_code == 200
    until(lambda: {"readyTrue", "readyFalse"} <= requests_of(server).keys(), "two lines of the log")
    found = requests_of(server)
    assert {found["readyTrue"], found["readyFalse"]} == replicas(server)


def a_killed_process_costs_its_own_requests(server: ServerProcess, callers: Callers) -> None:
    before = replicas(server)
    assert len(before) == 2
    assert not any(callers.lost)
    shares = Counter(requests_of(server)[names[-2]] for names in callers.answered)
    assert shares.keys() == before
    assert max(shares.values()) <= CALLERS // 2 + 1
    killed = min(before)
    psutil.Process(killed).kill()
    until(lambda: has_ended(killed), "the end of a process")
    callers.go_on()  # the other one answers all
    answered_by = requests_of(server)
    for answered, lost in zip(callers.answered, callers.lost, strict=True):
        assert len(lost) <= 1
        if lost:
            asked = int(lost[0].partition("-")[2])
            earlier = [name for name in answered if int(name.partition("-")[2]) < asked]
            assert answered_by[earlier[-1]] == killed, "a connection of the other one was lost"
    until(lambda: len(replicas(server) - {killed}) == 2, "a process that takes its place")
    (new,) = replicas(server) - before

    def has_callers() -> bool:
        return sum(process == new for process in requests_of(server).values()) >= 3 * CALLERS

    until(has_callers, "callers of the other one that find the new one")  # by connections that were shed
    callers.go_on()
    assert all(len(lost) <= 1 for lost in callers.lost)
    assert callers.statuses.keys() == {200}
    assert any("killed by signal 9 (SIGKILL)" in line["message"] for line in server.lines())


def counters_are_sums(server: ServerProcess, callers: Callers) -> None:
    """Whichever process tells them, and although one of those that counted is gone."""
    name = 'classifier_requests_total{code="200",route="/v1/classify"}'
    at_hand = sum(map(len, callers.lost)) or CALLERS  # answers that the killed process had given and not counted
    until(lambda: callers.count - at_hand <= server.metric(name) <= callers.count, "answers that are counted")
    assert server.metric(name) == server.metric(name)
    for gauge in ("in_flight", "queue_depth", "running"):
        until(lambda gauge=gauge: server.metric(f"classifier_{gauge}") == 0, gauge)
    assert server.metric("classifier_ready") == 1
    labels = [line for line in server.get("/metrics").text.splitlines() if line.startswith("classifier_model_info{")]
    assert [line.rsplit(" ", 1)[1] for line in labels] == ["1.0"]


def sigterm_under_load(server: ServerProcess) -> None:
    processes = replicas(server)
    callers = Callers(server)
    callers.go_on()
    for process in (*processes, server.process.pid):  # as a supervisor does that ends the whole group
        psutil.Process(process).send_signal(signal.SIGTERM)
    server.until_refused()
    callers.finish()
    assert server.finish() == 0
    assert server.process.stdout is not None
    (answered,) = re.findall(r"^stopped: answered ([\d,]+) requests, ran for .* s\n$", server.process.stdout.read())
    assert int(answered.replace(",", "")) >= callers.count, "the answers of all processes, told once"
    assert all(has_ended(process) for process in processes)
    assert not any(callers.lost)
    assert callers.statuses.keys() <= {200, 503}


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("refuse", 2, "claims: no classifier here; give one that is"),
        pytest.param("die", 1, f"{_FAILED}: killed by signal 9 (SIGKILL)", marks=pytest.mark.soak),
        pytest.param("fail", 1, f"{_FAILED}: LookupError: a defect of loading)", marks=pytest.mark.soak),
    ],
)
def test_a_process_that_cannot_be_made_ready_ends_the_start(
    tmp_path: Path, fault: str, status: int, message: str
) -> None:
    with running(tmp_path / "log", *command("claims"), environment={"STUB_LOAD": fault}) as server:
        assert server.finish() == status
        assert server.process.stdout is not None
        assert server.process.stdout.read() == "", "that it serves was never said"
    assert server.log.read_text().splitlines()[-1].startswith(f"qwen-vl-classifier serve: {message}")


@pytest.mark.soak
def test_a_process_that_is_stuck_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path / "log", *command("claims"), "--deadline", "1") as server:
        server.until_ready()
        before = replicas(server)
        body = {"input": [{"text": stub_model.HANGING}]}
        answer = httpx.post(f"{server.url}/v1/classify", json=body, timeout=LIMIT, trust_env=False)
        assert answer.status_code == 504
        until(lambda: len(before & replicas(server)) == 1, "the end of a process that is stuck")
        until(lambda: len(replicas(server)) == 2, "a process that takes its place")
        for _ in range(4):
            body = {"input": [{"text": "claim"}]}
            answer = httpx.post(f"{server.url}/v1/classify", json=body, timeout=LIMIT, trust_env=False)
            assert answer.status_code == 200
        assert any("the inference loop is stuck" in line["message"] for line in server.lines())


@pytest.mark.soak
def test_all_processes_follow_a_watched_folder(tmp_path: Path, tiny_classifier: Classifier) -> None:
    """One that takes the place of another begins with what is served now, and requests change nothing."""
    other = copy.copy(tiny_classifier)
    other.threshold, other.temperature = 0.7, 2.0
    folder = tiny_classifier.save(tmp_path / "watched" / "claims")
    words = command("--watch", str(folder.parent), model="real")

    def seen(server: ServerProcess) -> set[tuple[int, str]]:
        """Return which process serves which version: two connections are dealt out to two processes."""
        found = {}
        with contextlib.ExitStack() as connections:
            for number in range(2):
                client = connections.enter_context(httpx.Client(base_url=server.url, trust_env=False, timeout=LIMIT))
                name = f"{time.monotonic_ns()}-{number}"
                answer = client.get("/v1/models", headers={"X-Request-ID": name})
                if answer.status_code == 200:
                    found[name] = answer.json()["data"][0]["version"]
        until(lambda: found.keys() <= requests_of(server).keys(), "the lines of some requests")
        processes = requests_of(server)
        return {(processes[name], version) for name, version in found.items()}

    with running(tmp_path / "log", *words, environment={ADMIN_KEY_VARIABLE: "admin"}) as server:
        server.until_ready()
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == f"ready: what {folder.parent} holds at {server.url}\n"
        ((_, old), (_, same)) = seen(server)
        assert old == same
        other.save(folder)
        until(lambda: {version for _, version in seen(server)}.isdisjoint({old}), "a version that all serve")
        ((killed, new), _) = seen(server)
        psutil.Process(killed).kill()
        until(lambda: len(replicas(server) - {killed}) == 2, "a process that takes its place")
        until(lambda: len(seen(server)) == 2, "answers of both")
        assert {version for _, version in seen(server)} == {new}
        headers = {"Authorization": "Bearer admin"}
        refused = httpx.post(f"{server.url}/v1/models", json={"folder": "claims"}, headers=headers, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "several_processes")
        infos = [line for line in server.get("/metrics").text.splitlines() if line.startswith("classifier_model_info{")]
        assert {line.rpartition("version=")[2][1:13]: line[-3:] for line in infos} == {old: "0.0", new: "1.0"}


@pytest.mark.soak
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    with running(tmp_path / "log", *command("claims")) as server:
        server.until_ready()
        processes = replicas(server)
        server.process.kill()
        until(lambda: all(map(has_ended, processes)), "the end of all processes")


def test_bounds_are_shared_out() -> None:
    config = ServeConfig(classifiers=("claims",), queue_size=9, queue_bytes=1000, decode_workers=5, device="cpu,cpu")
    one = shared_out(config, "cpu", 2)
    assert (one.device, one.queue_size, one.queue_bytes, one.decode_workers) == ("cpu", 4, 500, 3)
    few = ServeConfig(classifiers=("claims",), decode_workers=2), ServeConfig(classifiers=("claims",), decode_workers=1)
    assert [shared_out(config, "cpu", 2).decode_workers for config in few] == [2, 1]
    with pytest.raises(ConfigError, match=r"^queue_size 1 with 2 devices: each process needs room for an example; "):
        shared_out(ServeConfig(classifiers=("claims",), queue_size=1), "cpu", 2)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu,", "device 'cpu,': '' does not say which device; list single ones"),
        ("auto,cpu", "device 'auto,cpu': 'auto' does not say which device"),
        ("all", "device 'all': torch sees no GPU here; give cpu"),
    ],
)
def test_lists_that_name_no_devices(capsys: pytest.CaptureFixture[str], device: str, message: str) -> None:
    assert main(["serve", "claims", "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
