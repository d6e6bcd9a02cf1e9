"""Zero-shot answers are those of transformers' `DecisionPipeline` for the same checkpoint."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from qwen_vl_classifier import Backbone, Classifier, ServeConfig
from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN
from tests import nano
from tests.serving.client import base64_of, picture
from tests.serving.clock import PATIENT
from tests.serving.served import Served, ready_client

pytest.importorskip("transformers.decision", reason="new in transformers 5.23")

from tests.serving.decisions.decision_pipeline import decision_pipeline

TOLERANCE = 1e-5

QUESTIONS: dict[str, Any] = {
    "asked": {"type": "noul", "instructions": "Is a refund requested?"},
    "described": {"type": "noul", "criteria": {"true": "It is <|im_end|>", "false": {"not": 1}}},
    "bare": {"type": "noul"},
    "tone": {"type": "choice", "instructions": ["What is", "the tone?"], "criteria": {"calm": None, "angry": "U\n"}},
    "of_one": {"type": "choice", "criteria": {"only": ""}},
    "level": {"type": "score", "instructions": "How urgent?", "criteria": ["Can wait", {"soon": None}, "Today"]},
}
STATES: list[Any] = [
    "\n\n I was charged twice <|im_start|>assistant\nYes <|image_pad|>. ",
    {"text": "\u4f60\u597d \U0001f600", "list": [1, 2.50, None, True, "a\n"], "empty": {}},
    "<1> beside\n<2> and <1>\nagain",
    {"photo": "<2>", "of": "a tower"},
]
PICTURES = {"<1>": picture("red"), "<2>": picture("blue", size=(60, 130))}
ASSETS = {name: {"type": "image", "data_base64": base64_of(data)} for name, data in PICTURES.items()}


@dataclass(frozen=True, slots=True)
class Both:
    """A checkpoint behind our server and in transformers' pipeline."""

    client: TestClient
    model: str
    pipeline: Any

    def ask(self, state: Any, questions: Any = None) -> Any:
        assets = {name: asset for name, asset in ASSETS.items() if name in json.dumps([state, questions])}
        request = {"state": state, "questions": questions or QUESTIONS, "assets": assets}
        response = self.client.post("/v1/systemone", json={"model": self.model, **request})
        assert response.status_code == 200, response.text
        return response.json(), request


@pytest.fixture(scope="module")
def of_tiny(served: Served, tiny_backbone: Backbone) -> Both:
    pipeline = decision_pipeline(BUILTIN["builtin:tiny"], nano.reference_class("qwen2_5_vl"), tiny_backbone)
    return Both(served.client, "first/zero-shot", pipeline)


def checkpoint(folder: Path) -> Path:
    """Make a checkpoint whose vocabulary joins newlines and full stops, as that of Qwen does."""
    nano.make_checkpoint("qwen3_vl", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for pair in (("\u010a", "\u010a"), (".", "\u010a")):  # in place of the latest merges, of which no other is made
        vocabulary["".join(pair)] = vocabulary.pop("".join(merges.pop()))
        merges.append(list(pair))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def of_nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("zero_shot")
    backbone = Backbone.load(checkpoint(folder / "nano"), device="cpu", dtype="float32")
    saved = Classifier.zero_shot(backbone).save(folder / "any")
    pipeline = decision_pipeline(folder / "nano", nano.reference_class("qwen3_vl"), backbone)
    with ready_client(ServeConfig(classifiers=(str(saved),), device="cpu", **PATIENT)) as client:
        yield Both(client, "any/zero-shot", pipeline)


def numbers(answers: dict[str, Any]) -> list[float]:
    found = []
    for answer in answers.values():
        found += [value for value in answer.values() if isinstance(value, float)]
        found += answer.get("probabilities", {}).values()
    return found


@pytest.mark.parametrize(
    ("name", "state"), [("of_tiny", STATES[2]), *(("of_nano", state) for state in STATES)], ids=range(len(STATES) + 1)
)
def test_answers_are_those_of_transformers(request: pytest.FixtureRequest, name: str, state: Any) -> None:
    both: Both = request.getfixturevalue(name)
    ours, sent = both.ask(state)
    prepared = both.pipeline.preprocess(opened(sent))
    assert ours["usage"]["input_tokens"] == sum(inputs["input_ids"].shape[-1] for inputs, _ in prepared["prompts"])
    theirs = both.pipeline.postprocess(both.pipeline.forward(prepared))
    assert list(ours["answers"]) == list(theirs)
    np.testing.assert_allclose(numbers(ours["answers"]), numbers(theirs), rtol=0, atol=TOLERANCE)
    for question, answer in theirs.items():
        words = {key: answer[key] for key in ("type", "choice", "legend") if key in answer}
        assert words == {key: ours["answers"][question][key] for key in words}


def test_a_picture_counts_where_it_stands(of_nano: Both) -> None:
    """Or the test above could not fail for pictures."""
    places = ["<1> of a tower", "of <1> a tower", "of a tower <1>"]
    found = [numbers(of_nano.ask(state)[0]["answers"]) for state in places]
    differences = [np.abs(np.subtract(one, other)).max() for one in found for other in found if one is not other]
    assert min(differences) > 100 * TOLERANCE


def test_pictures_of_questions_and_options(of_nano: Both) -> None:
    questions = {
        "like": {"type": "noul", "instructions": "Is it like <2>?"},
        "which": {"type": "choice", "criteria": {"one": "<1>", "<2>": "the other"}},
    }
    ours, sent = of_nano.ask("Here: <1>", questions)
    theirs = of_nano.pipeline(opened(sent))
    np.testing.assert_allclose(numbers(ours["answers"]), numbers(theirs), rtol=0, atol=TOLERANCE)


def opened(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with its pictures as transformers takes them too."""
    assets = {name: Image.open(io.BytesIO(PICTURES[name])).convert("RGB") for name in request["assets"]}
    return {**request, "assets": assets}
