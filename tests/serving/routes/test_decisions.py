"""`/v1/systemone`, as clients of other servers of this dialect use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap
from tests.serving.client import base64_of, check_problem, data_uri, picture
from tests.serving.clock import PATIENT
from tests.serving.served import Served, ready_client

RED, BLUE = picture("red"), picture("blue", size=(60, 120))
ASSETS = {
    "img-1": {"type": "image", "format": "png", "data_base64": base64_of(RED)},
    "<image:b>": {"data_base64": data_uri(BLUE)},
}
ASKED = {"type": "noul", "instructions": "Is it red?", "criteria": {"true": "It is.", "false": None}}


def ask(served: Served, state: Any, questions: Any, model: str | None = "second", **more: Any) -> Any:
    response = served.post("/v1/systemone", {"model": model, "state": state, "questions": questions, **more})
    assert response.status_code == 200, response.text
    return response.json()


def expected(served: Served, name: str, example: Example) -> float:
    return float(served.classifiers[name].predict_proba([example])[0, 1])


class TestYesAndNo:
    @pytest.mark.parametrize(
        ("state", "example"),
        [
            ("It is red.", Example(None, "It is red.")),
            ("  as it\nstands ", Example(None, "  as it\nstands ")),
            ({"a": "one", "b": {"c": ["two", None, 3, True]}, "d": ""}, Example(None, "one\ntwo\n3\ntrue")),
            ({"photo": "img-1", "text": "It is red."}, Example(RED, "It is red.")),
            ("Compare img-1 with <image:b> !", Example((RED, BLUE), "Compare  with  !")),
            (["<image:b>", "both of", "img-1"], Example((BLUE, RED), "both of")),
            ("img-1 and img-1", Example((RED, RED), "and")),
        ],
    )
    def test_the_example_is_the_state(self, served: Served, state: Any, example: Example) -> None:
        assets = {name: asset for name, asset in ASSETS.items() if name in json.dumps(state)}
        answer = ask(served, state, {"q": ASKED}, assets=assets)
        assert answer["answers"].keys() == {"q"}
        found = answer["answers"]["q"]
        probability = expected(served, "second", example)
        assert found["noul"] == pytest.approx(probability, abs=1e-6)
        assert found["type"] == "noul"
        reading = found["classifier"]
        assert reading["text_from"] == "state"
        assert reading["ignored"] == ["instructions", "criteria"]

    def test_what_only_a_classifier_can_tell(self, served: Served) -> None:
        reading = ask(served, "It is red.", {"q": {"type": "noul"}})["answers"]["q"]["classifier"]
        classifier = served.classifiers["second"]
        probability = reading["probability"]
        label = int(probability >= classifier.threshold)
        assert reading == {
            "model": "second",
            "version": served.client.get("/v1/models/second").json()["version"],
            "probability": probability,
            "label": label,
            "label_name": classifier.label_names[label],
            "threshold": classifier.threshold,
            "decision": ("no", "yes")[label],
            "text_from": "state",
            "ignored": [],
        }

    def test_a_state_of_pictures_alone_takes_its_text_from_the_instructions(self, served: Served) -> None:
        questions = {text: {"type": "noul", "instructions": text} for text in ("It is red.", "It is blue.")}
        answer = ask(served, {"photo": "img-1"}, questions, assets={"img-1": ASSETS["img-1"]})
        for text, found in answer["answers"].items():
            assert found["noul"] == pytest.approx(expected(served, "second", Example(RED, text)), abs=1e-6)
            assert found["classifier"]["text_from"] == "instructions"
            assert found["classifier"]["ignored"] == []

    def test_pictures_before_the_state(self, served: Served) -> None:
        answer = ask(served, "It is red.", {"q": {"type": "noul"}}, images=[data_uri(BLUE), base64_of(RED)])
        probability = expected(served, "second", Example((BLUE, RED), "It is red."))
        assert answer["answers"]["q"]["noul"] == pytest.approx(probability, abs=1e-6)

    def test_the_whole_answer(self, served: Served) -> None:
        answer = ask(served, "It is red.", {"b": {"type": "noul"}, "a": {"type": "noul", "instructions": "Again?"}})
        assert answer.keys() == {"id", "object", "created", "model", "answers", "usage"}
        assert list(answer["answers"]) == ["b", "a"]
        assert answer["model"] == "second"
        single = served.post("/v1/classify", {"model": "second", "input": [{"text": "It is red."}]}).json()
        assert answer["usage"] == {"input_tokens": single["usage"]["prompt_tokens"], "output_tokens": 0}


class TestClassifiersAsOptions:
    def test_each_is_an_option(self, served: Served) -> None:
        question = {"type": "choice", "instructions": "Which?", "criteria": {"second": "The second", "first": None}}
        found = ask(served, "It is red.", {"q": question}, model="first")["answers"]["q"]
        alone = [expected(served, name, Example(None, "It is red.")) for name in ("second", "first")]
        shares = [one / sum(alone) for one in alone]
        assert list(found["probabilities"]) == ["second", "first"]
        assert list(found["probabilities"].values()) == pytest.approx(shares, abs=1e-6)
        assert found["choice"] == ("second", "first")[shares.index(max(shares))]
        assert found["confidence"] == pytest.approx(2 * max(shares) - 1, abs=1e-6)
        assert [one["model"] for one in found["classifiers"]] == ["second", "first"]
        assert [one["probability"] for one in found["classifiers"]] == pytest.approx(alone, abs=1e-6)

    def test_other_options_are_for_the_backbone(self, served: Served) -> None:
        question = {"type": "choice", "criteria": {"first": None, "third": None}}
        found = ask(served, "It is red.", {"q": question})["answers"]["q"]
        assert found.keys() == {"type", "choice", "confidence", "probabilities"}

    def test_a_name_for_the_backbone_alone(self, served: Served) -> None:
        questions = {"n": {"type": "noul"}, "c": {"type": "choice", "criteria": {"first": None, "second": None}}}
        answer = ask(served, "It is red.", questions, model="first/zero-shot")
        assert answer["model"] == "first/zero-shot"
        assert answer["answers"]["n"].keys() == {"type", "noul"}
        assert "classifiers" not in answer["answers"]["c"]


def form(request: Any, **parts: bytes) -> dict[str, Any]:
    files = {name: (name, data, "image/png") for name, data in parts.items()}
    return {"request": (None, json.dumps(request).encode(), "application/json"), **files}


class TestForms:
    def test_pictures_are_parts(self, served: Served) -> None:
        request = {
            "model": "second",
            "state": {"photo": "<image:0>", "text": "It is red."},
            "questions": {"q": {"type": "noul"}},
            "assets": {"<image:0>": {"type": "image", "part": "asset-0"}},
        }
        response = served.client.post("/v1/systemone", files=form(request, **{"asset-0": RED}))
        assert response.status_code == 200, response.text
        probability = expected(served, "second", Example(RED, "It is red."))
        assert response.json()["answers"]["q"]["noul"] == pytest.approx(probability, abs=1e-6)
        check_problem(served.client.post("/v1/systemone", files=form(request)), 422, "invalid_request")
        del request["state"]
        check_problem(served.client.post("/v1/systemone", files=form(request)), 422, "invalid_request")

    def test_a_form_without_request(self, served: Served) -> None:
        response = served.client.post("/v1/systemone", files={"asset-0": ("a", RED, "image/png")})
        check_problem(response, 400, "invalid_form")


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "first", "state": "a", "questions": {"secret": {"type": "noul"}}, **changes}


def with_question(**question: Any) -> dict[str, Any]:
    return body(questions={"fine": {"type": "noul"}, "secret": question})


def with_assets(state: Any = "secret", **asset: Any) -> dict[str, Any]:
    return body(state=state, assets={"secret": asset})


MANY = [str(number) for number in range(27)]
DEEP: Any = "a"
for _ in range(40):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("sent", "status", "code", "param"),
    [
        (body(model="secret"), 404, "model_not_found", "model"),
        (body(model="first/zero-shot/zero-shot"), 404, "model_not_found", "model"),
        (body(model=None), 400, "model_missing", "model"),
        (body(state=None), 422, "invalid_request", None),
        (body(state=5), 422, "invalid_request", None),
        (body(state=DEEP), 422, "invalid_request", None),
        (body(state="x" * 8001), 413, "text_too_large", "state"),
        (body(state={"a": ["x" * 4000, "y" * 4000]}), 413, "text_too_large", "state"),
        (body(questions={"secret\ud800": {"type": "noul"}}), 422, "invalid_request", "questions.0"),
        (with_question(type="choice", criteria={"\ud800": None}), 400, "invalid_item", "questions.1"),
        (body(state="\ud800"), 400, "invalid_item", "state"),
        (body(state=" "), 400, "invalid_item", "questions.0"),
        (body(secret=1), 422, "invalid_request", None),
        (body(questions={}), 422, "invalid_request", None),
        (body(questions=[]), 422, "invalid_request", None),
        (body(questions={str(n): {"type": "noul"} for n in range(65)}), 422, "invalid_request", None),
        (body(questions={str(n): {"type": "noul"} for n in range(17)}), 413, "too_many_items", "questions"),
        (body(questions={"secret": "secret"}), 422, "invalid_request", "questions.0"),
        (with_question(type="box"), 422, "invalid_request", "questions.1"),
        (with_question(type="noul", secret=1), 422, "invalid_request", "questions.1"),
        (with_question(type="noul", instructions=1), 422, "invalid_request", "questions.1"),
        (with_question(type="noul", criteria={"secret": "a"}), 422, "invalid_request", "questions.1"),
        (with_question(type="choice"), 422, "invalid_request", "questions.1"),
        (with_question(type="choice", criteria={}), 422, "invalid_request", "questions.1"),
        (with_question(type="choice", criteria={"secret": 1}), 422, "invalid_request", "questions.1"),
        (with_question(type="choice", criteria=["secret"]), 422, "invalid_request", "questions.1"),
        (
            with_question(type="choice", criteria=dict.fromkeys(map(str, range(27)))),
            422,
            "invalid_request",
            "questions.1",
        ),
        (with_question(type="score", criteria=[]), 422, "invalid_request", "questions.1"),
        (with_question(type="score", criteria=[None]), 422, "invalid_request", "questions.1"),
        (with_question(type="score", criteria=["a"] * 27), 422, "invalid_request", "questions.1"),
        (with_question(type="score", criteria=["x" * 8001]), 413, "text_too_large", "questions.1"),
        (with_assets(), 422, "invalid_request", "assets.0"),
        (with_assets(state="a", data_base64=base64_of(RED)), 422, "invalid_request", "assets.0"),
        (with_assets(data_base64=base64_of(RED), url="secret"), 422, "invalid_request", "assets.0"),
        (with_assets(part="secret"), 422, "invalid_request", "assets.0"),
        (with_assets("secret a", data_base64="secret"), 422, "image_refused", "state"),
        (with_assets("secret a", data_base64="https://example.org/secret.png"), 422, "image_refused", "state"),
        (with_assets("secret a", data_base64=base64_of(RED[:90])), 422, "image_damaged", "state"),
        (with_assets("secret" * 9 + "a", data_base64=base64_of(RED)), 400, "invalid_item", "state"),
        (body(assets={" ": {"data_base64": base64_of(RED)}}), 422, "invalid_request", "assets.0"),
        (body(assets={str(n): {} for n in range(5)}), 422, "invalid_request", None),
    ],
)
def test_refusals(served: Served, sent: Any, status: int, code: str, param: str | None) -> None:
    response = served.post("/v1/systemone", sent)
    check_problem(response, status, code)
    assert response.json()["error"]["param"] == param
    assert "secret" not in response.text


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[TestClient]:
    """A server of one classifier whose tap needs no more than two layers."""
    classifier = Classifier(tiny_classifier.backbone, Tap(2, "mean"), tiny_classifier.head, tiny_classifier.spec)
    folder = classifier.save(tmp_path_factory.mktemp("cut") / "only")
    with ready_client(ServeConfig(classifiers=(str(folder),), device="cpu", **PATIENT)) as client:
        yield client


def test_a_backbone_that_is_cut_answers_nothing_in_words(cut: TestClient) -> None:
    sent: dict[str, Any] = {"state": "It is red.", "questions": {"q": {"type": "score", "criteria": ["a", "b"]}}}
    assert "loaded only up to" in check_problem(cut.post("/v1/systemone", json=sent), 400, "no_zero_shot")
    sent["questions"] = {"q": {"type": "noul"}}
    assert cut.post("/v1/systemone", json=sent).json()["model"] == "only"
    check_problem(cut.post("/v1/systemone", json={**sent, "model": "only/zero-shot"}), 400, "no_zero_shot")


def test_requests_and_answers_are_those_of_transformers(served: Served) -> None:
    """What its schema takes, it answers by its own definition of a question; it knows no client of its own."""
    systemone = pytest.importorskip("transformers.cli.serving.systemone", reason="new in transformers 5.23")
    from transformers.decision import DecisionConfig, parse_questions

    sent = {
        "model": "first",
        "state": {"photo": "img-1", "text": "It is red."},
        "questions": {
            "n": ASKED,
            "c": {"type": "choice", "criteria": {"calm": "Polite", "angry": None, "sad": ["x"]}},
            "s": {"type": "score", "instructions": "How much?", "criteria": ["none", {"some": 1}, "all"]},
        },
        "assets": {"img-1": ASSETS["img-1"]},
    }
    asked = systemone.SystemOneRequest.model_validate(sent, strict=True)
    answer = ask(served, **asked.model_dump())
    for question in parse_questions(asked.questions, DecisionConfig()):
        found = answer["answers"][question.name]
        probabilities = found.get("probabilities") or {"true": found["noul"], "false": 1 - found["noul"]}
        theirs = question.answer([probabilities[option] for option in question.options])
        ours = {name: found[name] for name in theirs}
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value) if isinstance(value, float) else value)


def tokens_of_passes(served: Served) -> float:
    (line,) = re.findall(r"^classifier_batch_tokens_sum (\S+)$", served.client.get("/metrics").text, re.MULTILINE)
    return float(line)


def test_what_questions_begin_with_is_read_once(served: Served) -> None:
    questions = {str(number): {"type": "noul", "instructions": f"Is it {number}?"} for number in range(10)}
    before = tokens_of_passes(served)
    answer = ask(served, "It is red. " * 60, questions, model="first/zero-shot")
    read = tokens_of_passes(served) - before
    assert read < 0.3 * answer["usage"]["input_tokens"]
    alone = ask(served, "It is red. " * 60, {"3": questions["3"]}, model="first/zero-shot")
    assert answer["answers"]["3"]["noul"] == pytest.approx(alone["answers"]["3"]["noul"], abs=1e-6)


def test_requests_at_the_same_time_get_their_own_answers(served: Served) -> None:
    """Passes of classifiers and of words take turns, and each batch holds questions of several requests."""
    questions = {
        "n": {"type": "noul"},
        "c": {"type": "choice", "criteria": {"calm": None, "angry": None}},
        "p": {"type": "choice", "criteria": {"first": None, "second": None}},
    }
    states = [f"It is {colour} {number}." for number in range(4) for colour in ("red", "blue")]
    alone = [ask(served, state, questions)["answers"] for state in states]
    with ThreadPoolExecutor(len(states)) as threads:
        together = list(threads.map(lambda state: ask(served, state, questions)["answers"], states))
    for one, other in zip(alone, together, strict=True):
        assert other["n"]["noul"] == pytest.approx(one["n"]["noul"], abs=1e-6)
        for name in ("c", "p"):
            assert other[name]["probabilities"] == pytest.approx(one[name]["probabilities"], abs=1e-6)
    assert len({answer["n"]["noul"] for answer in alone}) == len(states)


def shape(value: Any) -> Any:
    """Return what an answer has at which place, without its values."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    return [shape(one) for one in value] if isinstance(value, list) else type(value)


def test_the_request_of_the_documentation(served: Served) -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "decisions.md").read_text(encoding="utf-8")
    request, answer = (
        json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    )
    (asset,) = request["assets"].values()
    asset["data_base64"] = base64_of(RED)
    assert shape(ask(served, **{**request, "model": "first"})) == shape(answer)
