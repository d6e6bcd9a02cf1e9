"""The page in a real browser against the real application over saved classifiers."""

from __future__ import annotations

import io
import re

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from qwen_vl_classifier import Example, ServeConfig, create_app
from qwen_vl_classifier.config.serve import API_KEY_VARIABLE
from qwen_vl_classifier.evaluation.explanation import explain as explain_offline
from qwen_vl_classifier.scenes.statements import scene_examples
from tests.serving.clock import PATIENT
from tests.serving.page.actions import answers, classify, explain, upload
from tests.serving.page.stub import running
from tests.serving.served import NAMES, save_two

KEY = "a-key-of-the-tests"
TEXT = "There is 1 tower.\nIt is not blue. "


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny_classifier):
    """Two classifiers, the second of which abstains on everything, behind a key: their address and themselves."""
    folder = tmp_path_factory.mktemp("real")
    classifiers = save_two(folder, tiny_classifier)
    classifiers["second"].abstention = (0.0, 1.0)
    classifiers["second"].save(folder / "second")
    (folder / "key").write_text(KEY)
    config = ServeConfig(
        classifiers=tuple(str(folder / name) for name in NAMES),
        device="cpu",
        api_key_file=str(folder / "key"),
        **PATIENT,
    )
    with running(create_app(config)) as address:
        yield address, classifiers


@pytest.fixture(scope="module")
def scene() -> bytes:
    (image, _, _), *_ = scene_examples("test", scenes=1, per_scene=1)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def opened(open_page, real):
    return open_page(at=real[0], http_credentials={"username": "x", "password": KEY}, fails=[401, 422, 503])


def test_the_page_says_what_the_classifiers_say_offline(opened, real, scene):
    upload(opened, ("scene.png", scene, "image/png"))
    classify(opened, TEXT, which="")
    shown = answers(opened)
    for text, (name, classifier) in zip(shown, real[1].items(), strict=True):
        (prediction,) = classifier.decide([Example(scene, TEXT)])
        (value,) = re.findall(r"Probability of .*? ([\d.]+) threshold", text)
        digits = len(value.partition(".")[2])
        assert float(value) == pytest.approx(prediction.probability, abs=0.51 * 10**-digits + 1e-6)
        decision = {"yes": "Yes", "no": "No", "abstain": "Undecided"}[prediction.decision]
        assert re.match(rf"{name} version [0-9a-f]+ {decision}\b", text)
    assert "the classifier abstains" not in shown[0]
    assert "From 0.000 to 1.000 the classifier abstains." in shown[1]
    assert API_KEY_VARIABLE in opened.text_content("#curl")
    assert KEY not in opened.content()


def test_the_heat_map_is_that_of_explain(opened, real, scene):
    upload(opened, ("scene.png", scene, "image/png"))
    classify(opened, TEXT, which="first")
    explain(opened)
    expected = explain_offline(real[1]["first"], Example(scene, TEXT))
    rows, columns = expected.patches[0].shape
    assert opened.locator(".map canvas").evaluate("({ width, height }) => [width, height]") == [columns, rows]
    assert opened.locator(".word").all_inner_texts() == [word for word, _ in expected.words]
    assert opened.locator(".words").evaluate("(words) => words.textContent") == TEXT
    shown = [
        title.replace("−", "-") for title in opened.locator(".word").evaluate_all("(all) => all.map((w) => w.title)")
    ]
    for title, (_, value) in zip(shown, expected.words, strict=True):
        assert float(title.split()[0]) == pytest.approx(value, abs=0.006)


def test_a_picture_that_is_none_is_an_error_in_its_place(opened):
    upload(opened, ("broken.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "image/png"))
    classify(opened, which="first")
    expect(opened.locator(".answer .failed")).to_have_count(1)
    expect(opened.locator("#chosen")).to_contain_text("No preview")
