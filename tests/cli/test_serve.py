"""`serve` as a process of its own: a real server on a loopback port that the system chose, real HTTP, real signals."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from qwen_vl_classifier import Classifier, Example
from qwen_vl_classifier.cli.main import main

LIMIT = 120.0  # seconds after which a test gives up; an idle machine needs a tenth of it

# The same command with classifiers that take a second to load and no model in them: enough for signals.
WITHOUT_MODEL = """
import sys, time
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.serving import service
service._load_panel = lambda config: time.sleep(1)
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def server(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server; give its process and its address once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.communicate()[1]
        yield process, line.split()[-1]
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a server's end; return its status and what it said on stderr."""
    _, errors = process.communicate(timeout=LIMIT)
    return process.returncode, errors


def until_refused(url: str) -> None:
    """Return when nobody listens any more: the signal has arrived."""
    end = time.monotonic() + LIMIT
    with contextlib.suppress(httpx.TransportError):
        while time.monotonic() < end:
            httpx.get(f"{url}/livez", timeout=LIMIT, trust_env=False)
            time.sleep(0.02)
        pytest.fail("it went on listening")


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (60 + number, 80), (20 * number, 0, 255 - 20 * number)).save(stream, "PNG")
    return stream.getvalue()


def test_sigterm_lets_requests_in_flight_finish(tmp_path: Path, tiny_classifier: Classifier) -> None:
    folder = tiny_classifier.save(tmp_path / "claims")
    numbers = range(10)
    bodies = [
        json.dumps({"input": [{"image": base64.b64encode(picture(n)).decode(), "text": f"claim {n}"}]}).encode()
        for n in numbers
    ]
    held = threading.Semaphore(0)
    terminated = threading.Event()

    def halves(body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        held.release()
        terminated.wait(LIMIT)
        yield body[len(body) // 2 :]

    command = ("-m", "qwen_vl_classifier", "serve", str(folder), "--device", "cpu", "--max-batch", "2")
    with (
        server(*command) as (process, url),
        httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client,
        ThreadPoolExecutor(len(numbers)) as threads,
    ):
        assert client.get("/livez").json() == {"status": "live"}
        while (ready := client.get("/readyz")).status_code != 200:
            assert ready.json()["error"]["code"] == "loading"
            time.sleep(0.05)
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["claims"]

        # Half of the requests are on their way when the signal comes, each in the middle of its body.
        sent = [
            threads.submit(client.post, "/v1/classify", content=halves(body) if number % 2 else body)
            for number, body in enumerate(bodies)
        ]
        try:
            for _ in numbers[1::2]:
                assert held.acquire(timeout=LIMIT)
            with httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as other:
                assert other.get("/livez").status_code == 200  # so all connections made before are accepted
            process.send_signal(signal.SIGTERM)
            until_refused(url)
            assert process.poll() is None, "it did not wait"
        finally:
            terminated.set()
        responses = [future.result(timeout=LIMIT) for future in sent]
        assert [response.status_code for response in responses] == [200] * len(numbers)
        assert finish(process) == (0, "")
    expected = tiny_classifier.predict_proba([Example(picture(n), f"claim {n}") for n in numbers])[:, 1]
    scores = [response.json()["data"][0]["score"] for response in responses]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(scores)) == len(numbers)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_while_loading(sent: signal.Signals, status: int) -> None:
    with server("-c", WITHOUT_MODEL, "serve", "claims") as (process, url):
        assert httpx.get(f"{url}/readyz", timeout=LIMIT, trust_env=False).json()["error"]["code"] == "loading"
        process.send_signal(sent)
        code, errors = finish(process)
        assert code == status
        assert errors == ("" if status == 0 else "qwen-vl-classifier serve: interrupted\n")


class TestErrors:
    """Each is one line that says what to do, and status 2."""

    def error_of(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("qwen-vl-classifier serve: ")
        assert errors.count("\n") == 1
        return errors

    def test_a_folder_that_holds_no_classifier(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = signal.getsignal(signal.SIGTERM)
        assert "no classifier.json in it" in self.error_of(capsys, str(tmp_path), "--port", "0")
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_port_that_is_taken(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            error = self.error_of(capsys, "claims", "--port", port)
        assert f"port {port}: cannot listen there (Address already in use)" in error

    def test_an_open_door_without_a_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--api-key-file" in self.error_of(capsys, "claims", "--host", "0.0.0.0", "--port", "0")

    def test_a_key_file_that_is_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "cannot be read" in self.error_of(capsys, "claims", "--api-key-file", str(tmp_path / "key"))

    @pytest.mark.parametrize("module", ["fastapi", "uvicorn"])
    def test_an_extra_that_is_not_installed(
        self, module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        error = self.error_of(capsys, "claims")
        assert f"{module} is not installed; run: pip install 'qwen-vl-classifier[serve]'" in error


def test_every_option_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for flag in ("host", "port", "api-key-file", "insecure", "max-batch", "queue-size", "deadline", "max-body-bytes"):
        assert f"--{flag}" in text
