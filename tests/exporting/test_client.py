"""The client in the model card, run against a server that answers from the exported files as vLLM does."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from qwen_vl_classifier import Example, export
from qwen_vl_classifier.exporting.decide import decide
from qwen_vl_classifier.exporting.export_manifest import read_export
from tests.exporting.engine_by_files import EngineByFiles
from tests.exporting.linear import linear_classifier

CURVE = ((0.2, 0.5, 0.7), (0.1, 0.4, 0.95))


@pytest.fixture(scope="module")
def classifier(tiny_backbone):
    return linear_classifier(
        tiny_backbone,
        "mean:-1",
        isotonic=CURVE,
        threshold=0.15,
        abstention=(0.17, 0.19),
        label_names=("no", "yes"),
    )


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    return export(classifier, tmp_path_factory.mktemp("exported") / "out", leave_to_client=True)


@pytest.fixture(scope="module")
def server(folder):
    """Address of a server that answers `POST /classify` as vLLM does, and the requests that it got."""
    engine, seen = EngineByFiles(folder, "MEAN"), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            (message,) = body["messages"]
            probabilities, tokens = engine.answer(message["content"])
            data = [{"index": 0, "label": "no", "probs": probabilities, "num_classes": 2}]
            answer = json.dumps({"object": "list", "data": data, "usage": {"prompt_tokens": tokens}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", seen
        running.shutdown()
        thread.join()


@pytest.fixture
def client(folder, server, monkeypatch):
    """The module `client.py` of the exported folder."""
    monkeypatch.setenv("VLLM_SERVER", server[0])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("client", folder / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_asking_and_deciding_gives_what_the_classifier_gives(client, classifier, folder, server):
    rows = read_export(folder).examples
    examples = [Example([folder / name for name in row.images] or None, row.text) for row in rows]
    expected = classifier.decide(examples)
    for row, prediction in zip(rows, expected, strict=True):
        probability = client.ask(row.text, *(str(folder / name) for name in row.images))
        assert probability == pytest.approx(row.probability, abs=1e-5)
        made = client.decide(probability, client.rules())
        assert made["probability"] == pytest.approx(prediction.probability, abs=1e-5)
        assert made["decision"] == prediction.decision == row.decision
        assert made["label"] == classifier.label_names[prediction.label]
    assert {prediction.decision for prediction in expected} == {"no", "abstain", "yes"}
    assert {path for path, _ in server[1]} == {"/classify"}
    assert {body["model"] for _, body in server[1]} == {"classifier"}


def test_texts_that_the_server_would_read_otherwise_are_refused(client):
    for text in ("a <|im_end|> b", "<|image_pad|>", "\nabove", " \r above"):
        with pytest.raises(ValueError, match="would not read this text"):
            client.ask(text)


def test_it_needs_the_standard_library_alone(folder, server):
    row = read_export(folder).examples[0]
    done = subprocess.run(
        [sys.executable, "-S", folder / "client.py", row.text, folder / row.images[0]],
        env={"VLLM_SERVER": server[0], "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["decision"] == row.decision


def test_the_model_card_shows_the_client(folder):
    (shown,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert shown == (folder / "client.py").read_text()
    assert "qwen_vl_classifier" not in shown


@pytest.mark.parametrize("curve", [CURVE, ((0.5,), (0.3,)), ((0.0, 1.0), (0.2, 0.8))])
def test_isotonic_calibration_is_the_same_line(curve):
    rules = {"isotonic": dict(zip(("in", "out"), curve, strict=True)), "threshold": 0.5}
    rules |= {"abstention": None, "label_names": ["0", "1"]}
    for probability in np.linspace(0, 1, 41):
        made = decide(float(probability), rules)
        assert made["probability"] == pytest.approx(np.interp(probability, *curve), abs=1e-12)
