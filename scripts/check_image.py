"""Start an image of deploy/Dockerfile as Kubernetes would, and check what docs/how-to/deploy.md says of it.

    python scripts/check_image.py qwen-vl-classifier:0.1.0-cpu
    python scripts/check_image.py IMAGE --engine podman --host-network --options "--ulimit nofile=4096:4096"

The root file system is read-only, and all capabilities are dropped. The classifier is one on the built-in backbone,
made for this check. Exit status: 0 if all holds, 1 if something does not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from qwen_vl_classifier import Backbone, Classifier, Example

TEXT = "There is a red circle."
CLOSED = ("/", "/docs", "/openapi.json", "/metrics", "/v1/models")
TOLERANCE = 2e-3  # of bfloat16: the image may have another build of torch
USER = 10001
LOCKED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")  # noqa: S108
PROBE = """
import http.client
connection = http.client.HTTPConnection("127.0.0.1", {port})
connection.request("GET", "/livez")
print(connection.getresponse().status)
"""


@dataclass
class Container:
    """A container that runs.

    Attributes:
        engine: The command of the engine.
        name: Its name.
        url: Where it is reached.
        port: Where it listens, inside.
        key: The key that it asks for.
    """

    engine: tuple[str, ...]
    name: str
    url: str
    port: int
    key: str

    def run(self, *words: str) -> str:
        """Run a subcommand of the engine and return what it prints; end the program if it fails."""
        done = run(self.engine, *words)
        if done.returncode:
            sys.exit(f"{self.engine[0]} {words[0]} failed: {done.stderr.strip()}")
        return done.stdout.strip()

    def status(self, path: str, *, key: bool = False) -> int:
        """Return the status of a GET; 0 where nobody answers."""
        try:
            return self._client.get(path, headers=self._headers if key else None).status_code
        except httpx.TransportError:
            return 0

    def classify(self, text: str) -> float:
        """Return the probability of class 1."""
        answer = self._client.post("/v1/classify", json={"input": [{"text": text}]}, headers=self._headers)
        return float(answer.raise_for_status().json()["data"][0]["score"])

    @functools.cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


def run(engine: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a subcommand of a container engine."""
    return subprocess.run([*engine, *words], capture_output=True, text=True, check=False)  # noqa: S603  # no shell


def main() -> int:
    """Check one image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image")
    parser.add_argument("--engine", default="docker", help="command of the container engine (default: docker)")
    parser.add_argument("--options", default="", help="further options of its `run`")
    parser.add_argument(
        "--host-network", action="store_true", help="use the machine's network in place of a published port"
    )
    parser.add_argument("--seconds", type=float, default=300, help="until the server must be ready (default: 300)")
    given = parser.parse_args()
    engine, options = tuple(shlex.split(given.engine)), shlex.split(given.options)
    results: list[bool] = []

    def check(what: str, holds: bool) -> None:
        results.append(holds)
        print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu"))
        classifier.save(folder / "models" / "claims")
        expected = float(classifier.predict_proba([Example(None, TEXT)])[0, 1])

        network = ["--network", "none"]
        refused = run(engine, "run", "--rm", *network, *LOCKED, *options, given.image, "/models/claims")
        check("without an API key it does not start", refused.returncode == 2 and "API key" in refused.stderr)

        with started(engine, options, given.image, folder, host_network=given.host_network) as container:
            deadline = time.monotonic() + given.seconds
            while container.status("/readyz") != 200 and time.monotonic() < deadline:
                time.sleep(0.5)
            check("/livez and /readyz answer without the key", container.status("/livez") == 200)
            for path in CLOSED:
                check(f"{path} needs the key", (container.status(path), container.status(path, key=True)) == (401, 200))
            difference = abs(container.classify(TEXT) - expected)
            check(f"the probability is that outside, to {difference:.1e}", difference <= TOLERANCE)
            state = container.run("exec", container.name, "cat", "/proc/1/status")
            facts = dict(line.split(":\t", 1) for line in state.splitlines() if ":\t" in line)
            check(f"process 1 runs as user {USER}", facts["Uid"].split() == [str(USER)] * 4)
            check("it has no capabilities", int(facts["CapEff"], 16) == 0)
            check("it gets no new privileges", facts["NoNewPrivs"] == "1")
            probe = container.run("exec", container.name, "python", "-c", PROBE.format(port=container.port))
            check("the image's own Python reads /livez", probe == "200")
            container.run("stop", "--time", "40", container.name)
            code = container.run("inspect", "--format", "{{.State.ExitCode}}", container.name)
            check("SIGTERM ends it with status 0", code == "0")
    return 0 if all(results) else 1


@contextlib.contextmanager
def started(
    engine: tuple[str, ...], options: list[str], image: str, folder: Path, *, host_network: bool
) -> Iterator[Container]:
    """Start the image on a free port of loopback, and remove the container afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    key = secrets.token_urlsafe(24)
    (folder / "key").write_text(key)
    (folder / "key").chmod(0o644)
    inner = port if host_network else 8000
    network = ["--network", "host"] if host_network else ["--publish", f"127.0.0.1:{port}:{inner}"]
    mounts = ["--volume", f"{folder}/models:/models:ro", "--volume", f"{folder}/key:/run/secrets/api-key:ro"]
    arguments = ["/models/claims", "--port", str(inner), "--api-key-file", "/run/secrets/api-key"]
    if host_network:
        arguments += ["--host", "127.0.0.1"]
    container = Container(engine, f"check-image-{os.getpid()}", f"http://127.0.0.1:{port}", inner, key)
    settings = [*LOCKED, "--tmpfs", "/cache:exec", *network, *mounts, *options]
    container.run("run", "--detach", "--name", container.name, *settings, image, *arguments)
    try:
        yield container
    finally:
        run(engine, "rm", "--force", container.name)


if __name__ == "__main__":
    sys.exit(main())
