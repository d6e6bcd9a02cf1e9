"""`serve --watch` with panels, as a process of its own: they are asked, replaced and broken while it answers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from qwen_vl_classifier import Backbone, Example, Panel
from tests.panels import CLASSES, LABELS, make_panel
from tests.serving.server_process import ServerProcess, running
from tests.waiting import LIMIT, until

TEXTS = ("claim 1", "claim 2", "claim 3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "watched"
    folder.mkdir()
    return folder


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    words = ("serve", "--watch", str(folder), "--device", "cpu", "--port", "0", "--deadline", str(LIMIT))
    with running(tmp_path / "log", "-m", "qwen_vl_classifier", *words) as server:
        until(lambda: server.get("/v1/models").status_code == 200, "a server that has begun")
        yield server


def listed(server: ServerProcess) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in server.get("/v1/models").json()["data"]}


def ask(server: ServerProcess, model: str, *texts: str) -> httpx.Response:
    body = {"model": model, "input": [{"text": text} for text in texts]}
    return httpx.post(f"{server.url}/v1/classify", json=body, timeout=LIMIT, trust_env=False)


@pytest.mark.soak
def test_panels_are_asked_replaced_and_broken_while_requests_are_answered(
    server: ServerProcess, folder: Path, tiny_backbone: Backbone
) -> None:
    """No request is lost, and every answer is that of one version, with all of its labels."""
    versions: dict[str, Panel] = {}
    answered: list[tuple[str, str, dict[str, float]]] = []
    over = threading.Event()

    def saved(panel: Panel) -> str:
        before = listed(server).get("parts", {}).get("version")
        panel.save(folder / "parts")
        until(lambda: listed(server).get("parts", {}).get("version", before) != before, "another version")
        version: str = listed(server)["parts"]["version"]
        versions[version] = panel
        return version

    def call() -> None:
        for text in itertools.cycle(TEXTS):
            if over.wait(0.02):
                return
            response = ask(server, "parts", text)
            assert response.status_code == 200, response.text
            (result,) = response.json()["data"]
            scores = {name: one["score"] for name, one in result["labels"].items()}
            answered.append((response.json()["version"], text, scores))

    def until_answered(version: str) -> None:
        until(lambda: sum(seen == version for seen, _, _ in list(answered)) >= 6, f"answers of {version}")

    saved(make_panel(tiny_backbone))
    animals = make_panel(tiny_backbone, CLASSES, one_of=True, temperature=1.7)
    animals.save(folder / "animals")
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(call) for _ in range(2)]
        try:
            until_answered(next(iter(versions)))
            until_answered(saved(make_panel(tiny_backbone, (*LABELS, "rust"), seed=3)))
            (folder / "parts" / "rust" / "classifier.json").write_text("{}")
            failing = 'classifier_model_load_failing{model="parts"}'
            until(lambda: server.metric(failing) == 1, "a failure that the metrics tell")
            assert ask(server, "parts/rust", "a").status_code == 200, "the version before serves on"
            until_answered(saved(make_panel(tiny_backbone, LABELS[:1], seed=4)))
        finally:
            over.set()
        for one in calls:
            one.result(LIMIT)
    offline = {
        version: panel.predict_proba([Example(None, text) for text in TEXTS]) for version, panel in versions.items()
    }
    for version, text, scores in answered:
        assert list(scores) == list(versions[version].names)
        np.testing.assert_allclose(list(scores.values()), offline[version][TEXTS.index(text)], rtol=0, atol=1e-6)
    assert ask(server, "parts/rust", "a").status_code == 404
    found = [result["probabilities"] for result in ask(server, "animals", *TEXTS).json()["data"]]
    expected = animals.predict_proba([Example(None, text) for text in TEXTS])
    np.testing.assert_allclose([list(one.values()) for one in found], expected, rtol=0, atol=1e-6)
