"""`serve --watch` as a process of its own: classifiers are saved, broken, repaired and removed while it answers."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from tests.crash_points import kill_at
from tests.fresh import FreshProcesses
from tests.serving.server_process import ServerProcess, running
from tests.waiting import LIMIT, until

TEXTS = ("claim 1", "claim 2", "claim 3")
CALLERS = 4
_PAUSE = 0.02  # seconds between two requests of a caller: what is loaded meanwhile needs the processor too

SAVING = """
import sys
from pathlib import Path
from qwen_vl_classifier import Classifier
from tests import crash_points
folder, barrier, moment = sys.argv[1:]
classifier = Classifier.load(folder, device="cpu")
classifier.threshold = 0.77
crash_points.halt(moment, Path(folder).name, Path(barrier))
classifier.save(folder)
"""


def variant(classifier: Classifier, number: int) -> Classifier:
    """Return another version of a classifier, with other probabilities."""
    other = copy.copy(classifier)
    other.tap, other.temperature, other.threshold = Tap((-1, 2)[number % 2], "mean"), 0.2 + number, 0.1 + number / 100
    return other


class Callers:
    """Clients that ask one thing after the other, and note by which version they are answered.

    Attributes:
        answers: For each of them the version and the score of each answer, by text.
    """

    def __init__(self, server: ServerProcess, name: str) -> None:
        self.answers: list[list[tuple[str, str, float]]] = [[] for _ in range(CALLERS)]
        self._server, self._name = server, name
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(CALLERS)
        self._futures = [self._threads.submit(self._ask, caller) for caller in range(CALLERS)]

    def _ask(self, caller: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=LIMIT, trust_env=False) as client:
            for number in itertools.count():
                if self._over.wait(_PAUSE):
                    return
                text = TEXTS[number % len(TEXTS)]
                answer = client.post("/v1/classify", json={"model": self._name, "input": [{"text": text}]})
                assert answer.status_code == 200, answer.text
                self.answers[caller].append((answer.json()["version"], text, answer.json()["data"][0]["score"]))

    def until_all_have(self, version: str) -> None:
        """Return when each of them has had a few answers of a version."""

        def have() -> bool:
            for future in self._futures:
                assert not future.done() or future.result() is None
            return all(sum(seen == version for seen, _, _ in answers) >= 3 for answers in list(self.answers))

        until(have, f"answers of version {version}")

    def finish(self, expected: dict[str, Classifier]) -> None:
        """Check that none was lost, that each answer is that of one version, and that no version came back."""
        self._over.set()
        for future in self._futures:
            future.result(timeout=LIMIT)
        self._threads.shutdown()
        offline = {
            (version, text): probability
            for version, classifier in expected.items()
            for text, probability in zip(
                TEXTS, classifier.predict_proba([Example(None, text) for text in TEXTS])[:, 1].tolist(), strict=True
            )
        }
        for answers in self.answers:
            assert [version for version, _ in itertools.groupby(version for version, _, _ in answers)] == list(expected)
            for version, text, score in answers:
                assert score == pytest.approx(offline[version, text], abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    words = ("serve", "--watch", str(folder), "--device", "cpu", "--port", "0", "--deadline", str(LIMIT))
    log = tmp_path_factory.mktemp("log") / "log"
    with running(log, "-m", "qwen_vl_classifier", *words) as server:
        until(lambda: server.get("/v1/models").status_code == 200, "a server that has begun")
        yield server


def models(server: ServerProcess) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in server.get("/v1/models").json()["data"]}


def version_of(server: ServerProcess, name: str, *, other_than: str = "") -> str:
    """Return the version of a classifier once it is served, in another version than that before."""

    def version() -> str | None:
        found = models(server).get(name)
        return found["version"] if found is not None and found["version"] != other_than else None

    found = until(version, f"another version of {name}")
    assert found is not None
    return found


def failing(server: ServerProcess, name: str) -> bool:
    return server.metric(f'classifier_model_load_failing{{model="{name}"}}') == 1


def said_of(server: ServerProcess, name: str) -> list[str]:
    """Return what the log says of versions that cannot be served."""
    lines = server.log.read_text().splitlines(keepends=True)
    messages = [json.loads(line)["message"] for line in lines if line.endswith("\n")]
    return [message for message in messages if message.startswith(f"{name}: a new version cannot be served")]


def a_switch_under_load(server: ServerProcess, folder: Path, classifier: Classifier, name: str, switches: int) -> None:
    first = variant(classifier, 0)
    first.save(folder / name)
    version = version_of(server, name)
    callers, expected = Callers(server, name), {version: first}
    callers.until_all_have(version)
    for number in range(1, switches + 1):
        new = variant(classifier, number)
        new.save(folder / name)
        version = version_of(server, name, other_than=version)
        callers.until_all_have(version)
        expected[version] = new
    callers.finish(expected)


def test_a_new_version_takes_over_and_no_request_is_lost(
    server: ServerProcess, folder: Path, tiny_classifier: Classifier
) -> None:
    """The second one reads layers that the first one's backbone has not loaded."""
    a_switch_under_load(server, folder, tiny_classifier, "claims", 1)


@pytest.mark.soak
def test_many_versions_under_load(server: ServerProcess, folder: Path, tiny_classifier: Classifier) -> None:
    a_switch_under_load(server, folder, tiny_classifier, "often", 30)


@pytest.mark.soak
def test_what_is_broken_leaves_the_old_version(
    server: ServerProcess, folder: Path, tiny_classifier: Classifier
) -> None:
    saved = variant(tiny_classifier, 0).save(folder / "broken")
    version = version_of(server, "broken")
    head = saved / "head.safetensors"
    content = head.read_bytes()
    head.write_bytes(content[:-10])
    (folder / ".new.partial").mkdir()
    (folder / "dataset").mkdir(exist_ok=True)
    until(lambda: failing(server, "broken"), "a failure that the metrics tell")
    assert {"id": "broken", "state": "failed"} in server.get("/v1/models").json()["pending"]
    variant(tiny_classifier, 2).save(folder / "later")
    later = version_of(server, "later")  # and so the folder was looked at several times
    (saved / "classifier.json").rename(folder / "dataset" / "classifier.txt")
    until(lambda: len(said_of(server, "broken")) == 2, "another reason")
    assert models(server)["broken"]["version"] == version
    assert not failing(server, "later")
    (folder / "dataset" / "classifier.txt").rename(saved / "classifier.json")
    head.write_bytes(content)
    until(lambda: not failing(server, "broken"), "the end of a failure")
    assert models(server)["broken"]["version"] == version, "it is the version that serves"
    assert len(said_of(server, "broken")) == 2
    assert all("the previous version stays" in line for line in said_of(server, "broken"))
    shutil.rmtree(folder / "later")
    until(lambda: "later" not in models(server), "a classifier that is gone")
    answer = httpx.post(f"{server.url}/v1/classify", json={"model": "later", "input": [{"text": "a"}]}, trust_env=False)
    assert answer.status_code == 404
    assert later
    assert not {"dataset", ".new.partial"} & models(server).keys()


@pytest.mark.soak
@pytest.mark.parametrize("moment", ["in the middle", "before the rename", "after the rename"])
def test_a_saver_that_is_killed(
    server: ServerProcess, folder: Path, tiny_classifier: Classifier, fresh: FreshProcesses, moment: str, tmp_path: Path
) -> None:
    """What it leaves is the old version or the new one, never half of each."""
    name = f"killed {moment}"
    classifier = variant(tiny_classifier, 1)
    saved = classifier.save(folder / name)
    version = version_of(server, name)
    fresh.start(SAVING, saved, tmp_path / "barrier", moment)
    kill_at(tmp_path / "barrier")
    if moment == "after the rename":
        assert version_of(server, name, other_than=version) != version
        assert models(server)[name]["threshold"] == 0.77
    else:
        tiny_classifier.save(folder / "beside")
        version_of(server, "beside")
        assert models(server)[name]["version"] == version
        assert not failing(server, name)
    shutil.rmtree(folder / "beside", ignore_errors=True)


@pytest.mark.soak
def test_a_backbone_that_is_missing(
    server: ServerProcess, folder: Path, tiny_classifier: Classifier, tmp_path: Path
) -> None:
    """It is tried again, since nothing in the classifier's folder changes when the backbone comes back."""
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype="float32", max_pixels=100_352)
    classifier = Classifier(backbone, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec, finetuned=True)
    saved = classifier.save(tmp_path / "tuned")
    shutil.copytree(saved, folder / "copied", ignore=shutil.ignore_patterns("backbone"))
    until(lambda: failing(server, "copied"), "a failure")
    assert "copied" not in models(server)
    shutil.copytree(saved / "backbone", folder / "copied" / "backbone")
    assert version_of(server, "copied")
    assert not failing(server, "copied")
    assert len(said_of(server, "copied")) <= 2  # it may have been looked at while it was half copied
