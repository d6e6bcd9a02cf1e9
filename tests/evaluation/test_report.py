"""The report: what it says, that nobody's words can run in it, and that files are there whole or not at all."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.evaluation.metrics import compute_metrics
from qwen_vl_classifier.evaluation.report import write_report
from qwen_vl_classifier.evaluation.report.summary import percent, summarise

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"><svg/onload=alert(1)>'",
    "</p></li></ol><iframe src=//example.com></iframe>",
    "{{ 7 * 7 }}{% raw %}{# gone #}",
    "&lt;b&gt; &amp;amp; &#x3c;",
    "<!-- --><base href=//example.com>]]>",
    "javascript:alert(1)",
    "\u202eright to left\u202c, мир, 图片 🙂\nsecond line",
)
DOCUMENT_TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer"}
CONTENT_TAGS = {"h1", "h2", "h3", "p", "b", "bdi", "ol", "li", "table", "tr", "th", "td", "div"}
PLOT_TAGS = {"figure", "figcaption", "svg", "title", "path", "text", "rect", "polyline", "circle"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page, as a browser would read them.

    `texts` has the text inside of each element, by tag ("p") and by tag and class ("p.text").
    """

    VOID = ("meta",)

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[list[str]] = []
        self.feed(content)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            kind = dict(attrs).get("class")
            self._open.append([tag, f"{tag}.{kind}"] if kind else [tag])
            for key in self._open[-1]:
                self.texts.setdefault(key, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for key in itertools.chain.from_iterable(self._open):
            self.texts[key][-1] += data


def make_evaluation(labels, probabilities, *, texts=("a text",), ids=(None,), threshold=0.5, **classifier):
    labels, probabilities = np.array(labels), np.array(probabilities, dtype=np.float64)
    return {
        "schema_version": 1,
        "metrics": compute_metrics(labels, probabilities, threshold),
        "classifier": {
            "backbone": "builtin:tiny",
            "tap": "mean:-1",
            "head": "mlp",
            "label_names": ["0", "1"],
            "threshold": threshold,
            "temperature": 1.0,
            **classifier,
        },
        "predictions": [
            {
                "row": row,
                "id": ids[row % len(ids)],
                "text": texts[row % len(texts)],
                "label": int(label),
                "probability": float(probability),
                "decision": "yes" if probability >= threshold else "no",
            }
            for row, (label, probability) in enumerate(zip(labels, probabilities, strict=True))
        ],
    }


def random_evaluation(rows=200, **options):
    rng = np.random.default_rng(0)
    labels = (rng.random(rows) < 0.4).astype(int)
    return make_evaluation(labels, rng.beta(1 + 2 * labels, 3 - 2 * labels), **options)


def page_of(evaluation, folder: Path) -> Page:
    return Page(write_report(evaluation, folder).read_text(encoding="utf-8"))


def test_the_first_sentence_says_how_good_it_is(tmp_path):
    page = page_of(make_evaluation([1, 0, 1, 0, 0, 1, 0, 0], [0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.1, 0.6]), tmp_path)
    assert page.texts["p"][0] == (
        "Right on 87.5 % of 8 examples; always answering the majority class would be right on 62.5 %."
    )
    assert [text.strip() for text in page.texts["td.number"]] == ["87.5 %", "62.5 %", "0.857", "1.000", "0.299", "8"]
    assert page.texts["td.right"] + page.texts["td.wrong"] == ["4", "3", "1", "0"]


def test_evaluation_json_is_the_evaluation(tmp_path):
    evaluation = random_evaluation(texts=HOSTILE, ids=[*HOSTILE, "half a pair \ud83d", None])
    assert write_report(evaluation, tmp_path) == tmp_path / "report.html"
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == evaluation
    assert "мир" in (tmp_path / "evaluation.json").read_text(encoding="utf-8")  # people read it too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "report.html"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nobodys_words_run(tmp_path, hostile):
    evaluation = random_evaluation(
        20, texts=[hostile], ids=[hostile], label_names=[hostile, f"{hostile}!"], backbone=hostile
    )
    page = page_of(evaluation, tmp_path)
    assert set(page.tags) <= DOCUMENT_TAGS | CONTENT_TAGS | PLOT_TAGS
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("href", "src", "style", "srcdoc", "action", "xlink:href"), (tag, name)
        assert hostile not in value
    wrong = sum((row["probability"] >= 0.5) != row["label"] for row in evaluation["predictions"])
    assert page.texts["p.text"] == [hostile] * (wrong + 10)
    assert {hostile, f"{hostile}!"} == set(page.texts["bdi"])


def test_the_policy_lets_nothing_through_but_the_own_style_sheet(tmp_path):
    page = page_of(random_evaluation(texts=HOSTILE), tmp_path)
    policies = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    (sheet,) = page.texts["style"]
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert policies == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]
    assert page.tags.index("style") > page.tags.index("meta") + 1
    assert "prefers-color-scheme: dark" in sheet
    assert "@media print" in sheet
    assert not re.search(r"url\(|@import", sheet)


def test_rows_come_in_order_of_interest():
    labels = [1, 0, 1, 0, 1] * 4
    probabilities = [0.9, 0.2, 0.1, 0.95, 0.51] * 4
    summary = summarise(make_evaluation(labels, probabilities))
    assert [row["row"] for row in summary["wrong"]] == [3, 8, 13, 18, 2, 7, 12, 17]
    assert [row["row"] for row in summary["uncertain"]] == [4, 9, 14, 19, 1, 6, 11, 16, 0, 2]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_right_and_wrong_follow_the_threshold(tmp_path):
    summary = summarise(make_evaluation([0, 1, 0], [0.6, 0.7, 0.75], threshold=0.7))
    assert [row["row"] for row in summary["wrong"]] == [2]
    assert [row["row"] for row in summary["uncertain"]] == [1, 2, 0]


@pytest.mark.parametrize(("labels", "named"), [([0, 0, 0], 0), ([1, 1, 1], 1), ([1], 1)])
def test_one_class_alone_still_makes_a_report(tmp_path, labels, named):
    page = page_of(make_evaluation(labels, [0.0, 1.0, 0.5][: len(labels)]), tmp_path)
    assert f"Every example is of class {named}" in page.texts["body"][0]
    assert "Only one class occurs" in page.texts["body"][0]
    assert page.tags.count("svg") == 2


def test_no_mistakes_are_said_to_be_none(tmp_path):
    page = page_of(make_evaluation([0, 1], [0.2, 0.7]), tmp_path)
    assert "No mistakes." in page.texts["p"]
    assert len(page.texts["p.text"]) == 2


def test_abstentions_are_counted(tmp_path):
    evaluation = random_evaluation(30)
    for row in evaluation["predictions"][:3]:
        row["decision"] = "abstain"
    assert any(text.startswith("It abstains on 3 of them") for text in page_of(evaluation, tmp_path).texts["p"])


def test_names_of_classes_are_shown_where_there_are_some(tmp_path):
    page = page_of(random_evaluation(label_names=["absent", "1"]), tmp_path)
    headings = [text for text in page.texts["th"] if "predicted" in text]
    assert headings == ["predicted 0 (absent)", "predicted 1"]


def test_long_texts_are_cut_in_the_page_alone(tmp_path):
    evaluation = random_evaluation(10, texts=["x" * 5000])
    page = page_of(evaluation, tmp_path)
    assert set(page.texts["p.text"]) == {"x" * 600 + " …"}
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == evaluation


@pytest.mark.parametrize("rows", [1, 2, 7, 3000])
def test_plots_stay_inside_their_frames(tmp_path, rows):
    path = write_report(random_evaluation(rows), tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 60_000
    for tag, name, value in page.attributes:
        if name in ("x", "cx"):
            assert 0 <= float(value) <= 360
        elif name in ("y", "cy"):
            assert 0 <= float(value) <= 274
        elif name in ("width", "height", "r") and tag in ("rect", "circle"):
            assert 0 < float(value) <= 284
        elif name == "points":
            points = [tuple(map(float, point.split(","))) for point in value.split()]
            assert all(62 <= x <= 346 and 10 <= y <= 230 for x, y in points)


def test_bars_are_as_long_as_their_counts(tmp_path):
    page = page_of(make_evaluation([1, 1, 1, 1, 0, 0], [0.9] * 4 + [0.1] * 2), tmp_path)
    heights = [float(value) for tag, name, value in page.attributes if (tag, name) == ("rect", "height")]
    assert heights == [pytest.approx(0.48 * 220, abs=0.06), pytest.approx(0.24 * 220, abs=0.06)]


@pytest.mark.parametrize(("share", "written"), [(0, "0.0 %"), (0.8734, "87.3 %"), (1, "100.0 %"), (0.99999, "99.9 %")])
def test_a_share_is_never_rounded_up_to_all(share, written):
    assert percent(share) == written


def test_a_report_is_replaced(tmp_path):
    write_report(random_evaluation(30), tmp_path / "new" / "folder")
    write_report(random_evaluation(40), tmp_path / "new" / "folder")
    assert "of 40 examples" in (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    before = write_report(random_evaluation(30), tmp_path).read_bytes()

    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device") as caught:
        write_report(random_evaluation(40), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "report.html"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(random_evaluation(10), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
