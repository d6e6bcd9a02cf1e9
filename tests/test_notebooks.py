"""What notebooks show: short texts, and HTML in which the words of users are only words."""

from __future__ import annotations

import html.parser
import re

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import EvaluateConfig, Example, TrainConfig, compare, evaluate, explain, train
from qwen_vl_classifier.evaluation.evaluation import Evaluation

HOSTILE = "cold <script>alert(1)</script> \"' &amp;"
TEXT = f"It is warm. {HOSTILE}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Example]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    made = []
    for number in range(12):
        colour = np.array([230, 120, 30] if number % 2 else [30, 120, 230])
        path = folder / f"{number}.png"
        Image.fromarray((colour + rng.integers(-25, 25, (56, 56, 3))).astype(np.uint8)).save(path)
        made.append(Example(str(path), TEXT, number % 2))
    return made


@pytest.fixture(scope="module")
def result(tiny_backbone, rows):
    names = (HOSTILE, "warm")
    config = TrainConfig(taps="mean:-1,last:-1", heads="linear,zero-shot", folds=2)
    return train(rows, backbone=tiny_backbone, config=config, label_names=names, progress=False)


@pytest.fixture(scope="module")
def evaluation(result, rows):
    return evaluate(result.classifier, rows, config=EvaluateConfig(checks=False, resamples=50))


class Page(html.parser.HTMLParser):
    """Collects the tags, the attributes and the text of a piece of HTML, and sees that tags close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "link", "br", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def page_of(value) -> Page:
    page = Page(value._repr_html_())
    assert not page.open
    assert "script" not in {tag for tag, _ in page.tags}
    return page


def test_the_backbone_has_a_card(tiny_backbone):
    assert repr(tiny_backbone) == (
        "<Backbone: 'builtin:tiny', Qwen2.5-VL, 6 of 6 layers, hidden size 128, float32, cpu>"
    )
    words = page_of(tiny_backbone).words
    assert "Backbone builtin:tiny" in words
    assert "6 of 6 layers" in words


def test_the_classifier_has_a_card_with_the_names_of_its_classes(result):
    assert repr(result.classifier).startswith("<Classifier: ")
    assert "1 is 'warm'" in repr(result.classifier)
    assert len(repr(result.classifier)) < 250
    words = page_of(result.classifier).words
    assert HOSTILE in words
    assert re.search(r"accuracy \d\.\d{3} \(95 %", words)


def test_a_classifier_without_a_record_has_a_card_too(tiny_classifier):
    assert repr(tiny_classifier) == "<Classifier: mlp head at mean:-1 of 'builtin:tiny', threshold 0.5>"
    assert "never" in page_of(tiny_classifier).words
    assert "accuracy" not in page_of(tiny_classifier).words


def test_training_shows_its_table(result):
    assert re.fullmatch(
        r"<TrainResult: \S+ at \S+, accuracy [\d.]+ \(95 %: [\d.]+ to [\d.]+\) on new rows, best of 3 tried>",
        repr(result),
    )
    page = page_of(result)
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + len(result.table)
    assert all(row["tap"] in page.words and f"{row['log_loss']:.4f}" in page.words for row in result.table)
    assert "Chosen: " in page.words
    assert "zero-shot" in str(result)


def test_an_evaluation_is_a_report_in_a_frame_that_cannot_reach_the_notebook(evaluation):
    assert repr(evaluation) == f"<Evaluation of 12 rows: {evaluation['sentence']}>"
    assert repr(Evaluation()) == "<Evaluation: empty>"
    ((tag, attributes),) = page_of(evaluation).tags
    assert tag == "iframe"
    assert attributes["sandbox"] == "allow-scripts allow-downloads"
    report = attributes["srcdoc"]
    base = report.index('<base href="about:srcdoc">')  # links within the report stay in it
    assert 0 < base < report.index("Content-Security-Policy"), "the policy allows no base after it"
    assert "<script>alert" not in report
    assert evaluation["sentence"] in report


def test_a_comparison_is_its_page(result, tiny_classifier, rows):
    compared = compare([result.classifier, tiny_classifier], rows, config=EvaluateConfig(resamples=50))
    assert repr(compared) == f"<Comparison on 12 rows: {compared['sentence']}>"
    ((tag, attributes),) = page_of(compared).tags
    assert tag == "iframe"
    assert compared["sentence"] in attributes["srcdoc"]


def test_an_explanation_shows_its_picture(result, rows, tmp_path):
    Image.open(rows[1].image).save(tmp_path / "seen.png")
    explained = explain(result.classifier, Example(str(tmp_path / "seen.png"), TEXT))
    assert len(repr(explained)) < 200
    page = page_of(explained)
    (source,) = (attributes["src"] for tag, attributes in page.tags if tag == "img")
    assert source.startswith("data:image/png;base64,")
    assert f"probability {explained.probability:.4f} of class 1 ('warm')" in page.words
    (tmp_path / "seen.png").unlink()
    gone = page_of(explained)
    assert "img" not in {tag for tag, _ in gone.tags}
    assert "seen.png" in gone.words


def test_predictions_name_the_class(result, rows):
    assert {answer.label_name for answer in result.classifier.decide(rows)} == {HOSTILE, "warm"}
    assert all(answer.label_name == (HOSTILE, "warm")[answer.label] for answer in result.classifier.decide(rows))


def test_an_example_does_not_print_the_bytes_of_its_picture():
    assert repr(Example(b"x" * 5000, "Red?", 1)) == "Example(image=<5,000 bytes>, text='Red?', label=1, id=None)"
    assert (
        repr(Example(["a.png", b"x"], "Red?"))
        == "Example(image=['a.png', <1 bytes>], text='Red?', label=None, id=None)"
    )
