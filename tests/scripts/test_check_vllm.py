"""The script that compares vLLM with exported classifiers, held by an engine that reads the exported files alone."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from qwen_vl_classifier import Backbone, Classifier, export
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = "if sys.argv[1] == '-c': sys.exit(print('0.32.0+cpu 2.13.0 5.19.0 0.28.0'))"
ENGINE = """
import json, http.server
sys.path.insert(0, {root!r})
from tests.exporting.engine_by_files import EngineByFiles

words = sys.argv
engine = EngineByFiles(Path(words[words.index("serve") + 1]), "LAST")
engine.bias[1] += {shift}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        probabilities, tokens = engine.answer(body["messages"][0]["content"])
        self.answer({{"data": [{{"probs": probabilities}}], "usage": {{"prompt_tokens": tokens}}}})

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""
WITH_CHILD = """
import subprocess, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_vllm", ROOT / "scripts" / "check_vllm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_vllm"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_vllm"]


@pytest.fixture
def interpreter(tmp_path):
    """Return an interpreter that has something else for vLLM."""

    def make(code: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{VERSIONS}\n{code}")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture(scope="module")
def exported(tiny_backbone: Backbone, tmp_path_factory) -> Path:
    return export(Classifier.zero_shot(tiny_backbone), tmp_path_factory.mktemp("exported") / "tiny")


def test_an_engine_that_ends_says_where_its_log_is(script, interpreter, exported, tmp_path):
    engine = script.Engine(interpreter("print('no such option'); sys.exit(1)"), exported, tmp_path / "log")
    with pytest.raises(RuntimeError, match=f"did not start; see {tmp_path / 'log'}"):
        engine.wait()
    engine.close()
    assert (tmp_path / "log").read_text() == "no such option\n"


def test_no_process_of_an_engine_is_left(script, interpreter, exported, tmp_path):
    engine = script.Engine(interpreter(WITH_CHILD), exported, tmp_path / "log")
    child = int(until(lambda: (tmp_path / "log").read_text().strip(), "the child's process id"))
    os.kill(child, 0)
    engine.close()
    until(lambda: not is_running(child), "the end of the child")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.soak
@pytest.mark.parametrize(("shift", "agrees"), [(0.0, True), (0.1, False)])
def test_a_table_of_random_checkpoints(script, interpreter, tmp_path, capsys, shift, agrees):
    python = interpreter(ENGINE.format(root=str(ROOT), shift=shift))
    words = ["--families", "qwen3_vl", "--taps", "last:-1", "--dtypes", "float32", "--keep", str(tmp_path / "kept")]
    assert script.main(["--python", python, *words]) == (0 if agrees else 1)
    versions, _, _, _, row = capsys.readouterr().out.splitlines()
    assert "vllm 0.32.0+cpu, torch 2.13.0, transformers 5.19.0" in versions
    name, tap, kind, spread, verdict, *numbers = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, tap, kind) == ("Qwen3-VL", "`last:-1`", "float32")
    least, most = map(float, spread.split(" to "))
    assert most - least > 0.2  # a table of equal probabilities would show nothing
    assert (verdict == "8 of 8") is agrees
    texts, sized, _, at_once = map(float, numbers)
    assert (max(texts, sized, at_once) < 1e-5) is agrees


def test_classifiers_of_the_user(script, tiny_backbone, tmp_path):
    Classifier.zero_shot(tiny_backbone).save(tmp_path / "own")
    (case,) = script.own_classifiers([str(tmp_path / "own")])
    assert case.name == f"{tiny_backbone.family.name} | `last:-1` | float32"
