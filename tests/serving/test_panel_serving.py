"""Panels of labels over HTTP: all labels in one answer, one label by itself, the class of exclusive ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, ServeConfig
from tests.panels import CLASSES, LABELS, make_panel
from tests.serving.client import base64_of, check_problem, picture
from tests.serving.clock import PATIENT
from tests.serving.served import Served, ready_client

RED = picture("red")
EXAMPLES = [Example(RED, "It is red."), Example(None, "No picture at all."), Example(RED, "It is blue.")]
ITEMS: list[dict[str, Any]] = [{"text": one.text, "image": base64_of(RED) if one.images else None} for one in EXAMPLES]


@pytest.fixture(scope="module")
def parts(tiny_backbone: Backbone) -> Panel:
    return make_panel(tiny_backbone)


@pytest.fixture(scope="module")
def animals(tiny_backbone: Backbone) -> Panel:
    return make_panel(tiny_backbone, CLASSES, one_of=True, temperature=1.7, seed=1)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier, parts: Panel, animals: Panel
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("panels")
    saved = {"claims": tiny_classifier, "parts": parts, "animals": animals}
    config = ServeConfig(
        classifiers=tuple(str(one.save(folder / name)) for name, one in saved.items()), device="cpu", **PATIENT
    )
    with ready_client(config) as client:
        yield Served(client, {"claims": tiny_classifier}, config)


def results(served: Served, model: str | list[str], items: list[dict[str, Any]] = ITEMS) -> list[dict[str, Any]]:
    response = served.post("/v1/classify", {"model": model, "input": items})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def test_all_labels_of_a_panel_are_in_one_answer(served: Served, parts: Panel) -> None:
    found = results(served, "parts")
    assert [result.keys() for result in found] == [{"index", "labels"}] * 3
    scores = [[one["score"] for one in result["labels"].values()] for result in found]
    np.testing.assert_allclose(scores, parts.predict_proba(EXAMPLES), rtol=0, atol=1e-6)
    for result, answer in zip(found, parts.decide(EXAMPLES), strict=True):
        assert list(result["labels"]) == list(LABELS)
        for classifier, (name, one) in zip(parts.classifiers, result["labels"].items(), strict=True):
            assert one.keys() == {"label", "score", "threshold", "decision"}
            assert one["threshold"] == classifier.threshold
            assert (one["label"], one["decision"]) == (answer.labels[name].label, answer.labels[name].decision)


def test_exclusive_classes_are_answered_by_the_class_and_all_probabilities(served: Served, animals: Panel) -> None:
    found = results(served, "animals")
    expected = animals.predict_proba(EXAMPLES)
    for result, line in zip(found, expected, strict=True):
        assert result.keys() == {"index", "class", "probability", "probabilities"}
        assert list(result["probabilities"]) == list(CLASSES)
        np.testing.assert_allclose(list(result["probabilities"].values()), line, rtol=0, atol=1e-6)
        assert (result["class"], result["probability"]) == (
            CLASSES[line.argmax()],
            max(result["probabilities"].values()),
        )


def test_a_label_is_answered_by_itself_as_a_classifier_is(served: Served, parts: Panel) -> None:
    named = ["parts/scratch", "parts", "claims"]
    found = results(served, named, ITEMS[:1])
    (own,) = parts.classifiers[1].decide(EXAMPLES[:1])
    assert [result["model"] for result in found] == named
    assert found[0]["score"] == found[1]["labels"]["scratch"]["score"] == pytest.approx(own.probability, abs=1e-6)
    assert (found[0]["decision"], found[0]["threshold"]) == (own.decision, parts.classifiers[1].threshold)
    assert found[2].keys() == {"index", "model", "label", "probs", "score", "threshold", "decision"}


def test_a_bad_item_spoils_no_other_and_a_form_works_too(served: Served) -> None:
    found = results(served, "parts", [ITEMS[0], {"text": " "}, ITEMS[1]])
    assert [sorted(result.keys() - {"index"}) for result in found] == [["labels"], ["error"], ["labels"]]
    form = {"text": "It is red.", "model": "animals"}
    answer = served.client.post("/v1/classify", files=[("image", RED)], data=form).json()
    assert answer["data"][0]["class"] in CLASSES


def test_names_that_are_not_served_say_what_is(served: Served) -> None:
    for model, words in (
        ("parts/rust", "no such label; expected one of parts/defect, parts/scratch, parts/dirty"),
        ("claims/scratch", "not served; expected a name that /v1/models lists"),
        ("rust/parts", "not served"),
    ):
        problem = served.post("/v1/classify", {"model": model, "input": ITEMS[:1]})
        assert words in check_problem(problem, 404, "model_not_found")
    assert "model is missing" in check_problem(served.post("/v1/classify", {"input": ITEMS[:1]}), 400, "model_missing")
    twice = served.post("/v1/classify", {"model": ["parts/dirty", "parts/dirty"], "input": ITEMS[:1]})
    check_problem(twice, 400, "model_twice")


def test_panels_are_listed_and_described_with_their_labels(served: Served, parts: Panel) -> None:
    listed = served.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["claims", "parts", "animals"]
    claims, panel, classes = listed["data"]
    assert "labels" not in claims
    assert (panel["one_of"], classes["one_of"]) == (False, True)
    assert [label["name"] for label in classes["labels"]] == list(CLASSES)
    assert panel["labels"][1] == {
        "id": "parts/scratch",
        "name": "scratch",
        "label_names": ["0", "1"],
        "threshold": parts.classifiers[1].threshold,
        "abstention": [0.45, 0.55],
    }
    assert served.client.get("/v1/models/parts").json() == panel
    label = served.client.get("/v1/models/parts/dirty").json()
    assert (label["id"], label["label_names"], label["version"]) == ("parts/dirty", ["fine", "dirty"], panel["version"])
    check_problem(served.client.get("/v1/models/parts/rust"), 404, "model_not_found")


def test_every_label_is_a_category_of_moderations(served: Served, parts: Panel, animals: Panel) -> None:
    answer = served.post("/v1/moderations", {"input": "No picture at all."}).json()
    (result,) = answer["results"]
    assert list(result["categories"]) == [
        "claims",
        *(f"parts/{label}" for label in LABELS),
        *(f"animals/{name}" for name in CLASSES),
    ]
    shares = [result["category_scores"][f"animals/{name}"] for name in CLASSES]
    np.testing.assert_allclose(shares, animals.predict_proba(EXAMPLES[1:2])[0], rtol=0, atol=1e-6)
    assert sum(result["categories"][f"animals/{name}"] for name in CLASSES) == 1
    assert [result["categories"][f"parts/{label}"] for label in LABELS] == parts.predict(EXAMPLES[1:2])[0].tolist()


def test_a_choice_between_labels_goes_to_the_panel(served: Served, parts: Panel, animals: Panel) -> None:
    def ask(model: str, question: dict[str, Any]) -> Any:
        body = {"model": model, "state": "No picture at all.", "questions": {"q": question}}
        return served.post("/v1/systemone", body)

    every = {"type": "choice", "criteria": dict.fromkeys(CLASSES)}
    answer = ask("animals", every).json()["answers"]["q"]
    (shares,) = animals.predict_proba(EXAMPLES[1:2])
    np.testing.assert_allclose([answer["probabilities"][name] for name in CLASSES], shares, rtol=0, atol=1e-6)
    assert answer["choice"] == CLASSES[shares.argmax()]
    assert [reading["model"] for reading in answer["classifiers"]] == [f"animals/{name}" for name in CLASSES]
    two = ask("animals", {"type": "choice", "criteria": dict.fromkeys(CLASSES[:2])}).json()["answers"]["q"]
    assert two["probabilities"]["cat"] == pytest.approx(shares[0] / shares[:2].sum(), abs=1e-6)
    own = parts.predict_proba(EXAMPLES[1:2])[0]
    chosen = ask("parts", {"type": "choice", "criteria": dict.fromkeys(LABELS)}).json()["answers"]["q"]
    assert chosen["probabilities"]["defect"] == pytest.approx(own[0] / own.sum(), abs=1e-6)
    holds = ask("parts/dirty", {"type": "noul"}).json()["answers"]["q"]
    assert (holds["noul"], holds["classifier"]["label_name"] in ("fine", "dirty")) == (
        pytest.approx(own[2], abs=1e-6),
        True,
    )
    assert "name one of them, such as parts/defect" in check_problem(
        ask("parts", {"type": "noul"}), 400, "label_missing"
    )


def test_one_label_is_explained(served: Served, parts: Panel) -> None:
    problem = served.post("/v1/explain", {"model": "parts", **ITEMS[0]})
    assert "such as parts/defect" in check_problem(problem, 400, "label_missing")
    answer = served.post("/v1/explain", {"model": "parts/defect", **ITEMS[0]}).json()
    assert (answer["model"], answer["probability"]) == (
        "parts/defect",
        pytest.approx(parts.predict_proba(EXAMPLES[:1])[0, 0], abs=1e-6),
    )


def test_each_label_is_counted(served: Served) -> None:
    def count(name: str, **labels: str) -> float:
        told = ",".join(f'{key}="{value}"' for key, value in labels.items())
        lines = served.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{{told}}}"))

    names = [f"animals/{name}" for name in CLASSES]
    before = [count("classifier_decisions_total", decision="yes", model=name) for name in names]
    seen = count("classifier_score_count", model="parts/dirty")
    answers = results(served, "animals", ITEMS * 4)
    results(served, "parts", ITEMS)
    after = [count("classifier_decisions_total", decision="yes", model=name) for name in names]
    chosen = [sum(answer["class"] == name for answer in answers) for name in CLASSES]
    assert [now - then for now, then in zip(after, before, strict=True)] == chosen
    assert count("classifier_score_count", model="parts/dirty") == seen + 3
    assert "classifier_model_info{" in served.client.get("/metrics").text
