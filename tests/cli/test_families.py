"""A day with checkpoints of each family, as a user has it: train, look, explain, score, fine-tune, serve."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.scenes.statements import write_dataset
from tests import nano
from tests.waiting import LIMIT, until

LINEAR = "linear attention (Gated DeltaNet)"
PLAIN = ("4: full attention", "3 of 4: full attention")
LAYERS = {
    "qwen3_vl_moe": tuple(f"{layers}; 8 experts, 2 per token" for layers in PLAIN),
    "qwen3_5": (f"4: 3 {LINEAR}, 1 full attention", f"3 of 4: {LINEAR}"),
    "qwen3_5_moe": tuple(
        f"{layers}; 8 experts, 2 per token and a shared one"
        for layers in (f"4: 3 {LINEAR}, 1 full attention", f"3 of 4: {LINEAR}")
    ),
}
"""The layers of the checkpoint, and those that the classifier needs, in words."""

EXAMPLE_USAGE = Path(__file__).resolve().parents[2] / "example_usage.py"

# Command after command in one process: `score` without processes of workers, `example_usage.py` on few pictures.
PROGRAM = """
import io, json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scenes import statements
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.jobs import Task

def score(job, todo, config, on_report, should_stop, on_rows):
    for report in job.worker().run_all(map(Task, todo)):
        on_report(report)

def run(command):
    if not command[0].endswith(".py"):
        return main(command)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code

local.run = score
write = statements.write_dataset
fewer = {"train": 8, "test": 2}
statements.write_dataset = lambda folder, **options: write(folder, **{**options, "scenes": fewer[options["name"]]})
said = []
for command in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        status = run(command)
    assert status == 0, (command, out.getvalue(), errors.getvalue())
    said.append(out.getvalue())
print(json.dumps(said))
"""

SERVER = """
import os, sys
from qwen_vl_classifier.cli.main import main
sys.stdout = open(sys.argv[1], "w", buffering=1)
print(os.getpid())
sys.exit(main(["serve", *sys.argv[2:], "--port", "0", "--device", "cpu"]))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Twelve rows: two statements about each of six scenes."""
    return write_dataset(tmp_path_factory.mktemp("scenes"), scenes=6, per_scene=2, kinds=("existence",))


def commands(folder: Path, checkpoint: str, rows: Path, picture: Path, text: str) -> dict[str, list[str]]:
    """Return what is run for one checkpoint, by name, in order."""
    classifier, example = str(folder / "classifier"), [str(picture), text]
    probe = ["--taps", "last:3", "--heads", "linear", "--folds", "2", "--dtype", "float32"]
    tuning = ["--epochs", "1", "--batch-size", "6", "--learning-rate", "1e-3", "--report-to", "none"]
    report = ["--out", str(folder / "report"), "--resamples", "100"]
    shards = ["--out", str(folder / "scores"), "--format", "jsonl"]
    every: dict[str, list[str]] = {
        "train": ["train", str(rows), "--model", checkpoint, "--out", classifier, *probe],
        "evaluate": ["evaluate", classifier, str(rows), *report],
        "predict": ["predict", classifier, *example, "--json"],
        "explain": ["explain", classifier, *example, "--json", "--out", str(folder / "heat.png")],
        "score": ["score", classifier, str(rows), *shards],
        "finetune": ["finetune", str(rows), "--from", classifier, "--out", str(folder / "tuned"), *tuning],
    }
    return {
        **{name: [*command, "--device", "cpu"] for name, command in every.items()},
        "info on the checkpoint": ["info", checkpoint],
        "info on the classifier": ["info", classifier],
        "example_usage.py": [str(EXAMPLE_USAGE), "--model", checkpoint],
    }


@pytest.mark.soak
@pytest.mark.parametrize(
    "families",
    [
        pytest.param(nano.FAMILIES[:3], id="older"),
        pytest.param(nano.FAMILIES[3:], id="newer"),
    ],
)
def test_a_day(families, rows, tmp_path, fresh):
    first = json.loads(rows.read_text().splitlines()[0])
    picture, text = rows.parent / first["image"], first["text"]
    folders = {family: tmp_path / family for family in families}
    of = {}
    for family, folder in folders.items():
        checkpoint = nano.make_checkpoint(family, folder / "checkpoint", tied=True)
        of[family] = commands(folder, str(checkpoint), rows, picture, text)
    done = fresh.run(PROGRAM, json.dumps([command for family in families for command in of[family].values()]))
    assert done.returncode == 0, done.stdout + done.stderr
    said = iter(json.loads(done.stdout))
    answers = {}
    for family, folder in folders.items():
        answers[family] = check(family, folder, dict(zip(of[family], said, strict=False)))
    renamed = {family: (folder / "classifier").rename(folder / family) for family, folder in folders.items()}
    assert served(fresh, renamed, picture, text, tmp_path / "said") == pytest.approx(answers, abs=1e-6)


def check(family: str, folder: Path, said: dict[str, str]) -> float:
    """Compare what the commands say of one row with each other, and return its probability."""
    probability = json.loads(said["predict"])["probability"]
    assert json.loads(said["explain"])["probability"] == pytest.approx(probability, abs=1e-6)
    evaluated = json.loads((folder / "report" / "evaluation.json").read_text())
    (shard,) = (folder / "scores" / "shards").iterdir()
    scored = [json.loads(line) for line in shard.read_text().splitlines()]
    for found in (evaluated["predictions"], scored):
        assert len(found) == 12
        assert found[0]["probability"] == pytest.approx(probability, abs=1e-6)
    for what, layers in zip(("checkpoint", "classifier"), LAYERS.get(family, PLAIN), strict=True):
        facts = said[f"info on the {what}"]
        assert FAMILIES[family].name in facts
        assert re.search(f"^decoder layers +{re.escape(layers)}$", facts, re.MULTILINE)
    assert "saved" in said["finetune"]
    assert "same probabilities: True" in said["example_usage.py"]
    return probability


def served(fresh, classifiers: dict[str, Path], picture: Path, text: str, said: Path) -> dict[str, float]:
    """Return the score of each classifier by one server of all, in a process of its own; it also explains it."""
    fresh.start(SERVER, said, *classifiers.values())
    until(lambda: said.exists() and "serving" in said.read_text(), "a server that is ready")
    process, *_, url = said.read_text().split()
    item: dict[str, Any] = {"text": text, "image": base64.b64encode(picture.read_bytes()).decode()}
    scores = {}
    try:
        with httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client:
            for name in classifiers:
                asked = {"model": name, "input": [item, {**item, "text": "Another text."}]}
                answer = client.post("/v1/classify", json=asked)
                explained = client.post("/v1/explain", json={"model": name, **item, "method": "gradients"})
                assert (answer.status_code, explained.status_code) == (200, 200), (answer.text, explained.text)
                scores[name] = answer.json()["data"][0]["score"]
                assert explained.json()["probability"] == pytest.approx(scores[name], abs=1e-6)
    finally:
        os.kill(int(process), signal.SIGTERM)
        ended = fresh.wait()
    assert ended.returncode == 0, ended.stderr
    return scores
