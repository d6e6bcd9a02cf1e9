"""The page of a comparison: what it claims, that nobody's words can run in it, and that it stays small."""

import json
import re

import pytest

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.evaluation.compare import compare
from qwen_vl_classifier.evaluation.report import render_comparison, write_comparison
from qwen_vl_classifier.evaluation.report.cards import MOST_CARDS
from qwen_vl_classifier.evaluation.report.words import printable
from tests.evaluation.pages import Page, check_inert
from tests.evaluation.sample import HOSTILE, pictures
from tests.evaluation.sample_comparison import make_comparison


def page_of(comparison, **options) -> Page:
    return Page(render_comparison(comparison, **options))


def test_what_compare_returns_can_be_shown(tiny_classifier, scene_rows):
    other = Classifier(
        tiny_classifier.backbone, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec, threshold=0.0
    )
    examples = scene_rows[:20]
    comparison = compare([tiny_classifier, other], examples, config=EvaluateConfig(resamples=20))
    sample = make_comparison(names=("A", "B"))
    assert set(comparison) == set(sample)
    assert set(comparison["pairs"][0]) == set(sample["pairs"][0])
    assert set(comparison["differing"][0]) == set(sample["differing"][0])
    assert set(sample["classifiers"][0]) <= set(comparison["classifiers"][0])
    page = page_of(comparison, examples=examples)
    assert page.texts["p.lead"] == [comparison["sentence"]]
    assert page.tags.count("img") == len(comparison["differing"])


def test_files_are_the_comparison_and_its_page(tmp_path):
    comparison = make_comparison()
    assert write_comparison(comparison, tmp_path / "new", examples=pictures(60)) == tmp_path / "new" / "comparison.html"
    assert json.loads((tmp_path / "new" / "comparison.json").read_text(encoding="utf-8")) == comparison
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["comparison.html", "comparison.json"]
    again = render_comparison(comparison, examples=pictures(60))
    assert (tmp_path / "new" / "comparison.html").read_text(encoding="utf-8") == again


def test_head_and_title_say_what_was_measured():
    content = render_comparison(make_comparison())
    page = Page(content)
    assert page.texts["title"][0].strip() == page.texts["h1"][0] == "Comparison of 3 classifiers on test.csv"
    assert "Measured on 28 November 2026, 20:50 (UTC). 60 rows: 30 of “matching”" in page.texts["p.note"][0]
    assert "secret" not in content
    unknown = make_comparison() | {"measured": {"data": None, "date": None}}
    assert page_of(unknown).texts["h1"] == ["Comparison of 3 classifiers"]


@pytest.mark.parametrize(
    ("better", "guess", "badges"),
    [
        (None, 0.5, ["None is shown to be the best"]),
        ("a", 0.5, ["Shown to be the best: one"]),
        ("a", 0.99, ["None is shown to be better than guessing", "Shown to be the best: one"]),
    ],
)
def test_badges_claim_what_was_measured(better, guess, badges):
    comparison = make_comparison(better=better)
    comparison["baselines"]["majority"]["accuracy"] = guess
    assert [text.strip() for text in page_of(comparison).texts["bdi"] if "shown" in text.lower()] == badges


def test_pairs_have_differences_in_points_and_a_verdict():
    rows = [text.split() for text in page_of(make_comparison(names=("one", "two"))).texts["tr"]]
    (pair,) = [" ".join(row) for row in rows if row[:3] == ["A", "against", "B"]]
    assert pair == "A against B +10.0 points −5.0 to +20.0 9 7 0.8 no difference shown"
    (pair,) = [
        text for text in page_of(make_comparison(names=("one", "two"), better="a")).texts["tr"] if "against" in text
    ]
    assert pair.strip().endswith("A is better")


def test_only_corrected_p_values_are_called_so():
    assert "Holm's method" in render_comparison(make_comparison())
    assert "Holm" not in render_comparison(make_comparison(names=("one", "two")))


def test_cards_have_the_answer_of_each():
    comparison = make_comparison(names=("one", "two"))
    (row, *_) = comparison["differing"]
    first, second = [" ".join(text.split()) for text in page_of(comparison).texts["li"] if "0." in text][:2]
    words = {True: "correct", False: "wrong"}
    for text, mark, place in ((first, "A one", 0), (second, "B two", 1)):
        answer = "“matching”" if row["labels"][place] else "“mixed”"
        right = words[row["labels"][place] == row["label"]]
        assert text.startswith(f"{mark}: {row['probabilities'][place]:.3f}, {answer} {right}")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nobodys_words_run(hostile):
    comparison = make_comparison(names=(hostile, hostile + "2", "x"), better="a", texts=[hostile], ids=[hostile])
    comparison |= {"sentence": hostile, "notes": [hostile], "label_names": [hostile, hostile]}
    comparison["measured"]["data"] = hostile
    page = page_of(comparison, examples=pictures(60))
    check_inert(page, hostile)
    assert set(page.texts["p.text"]) == {printable(hostile)}
    rows, *scripts = page.texts["script"]
    assert "<" not in rows
    assert json.loads(rows)[0]["export"] == {"id": hostile}
    assert len(scripts) == 2


def test_many_rows_and_classifiers_stay_within_bounds():
    comparison = make_comparison(1500, names=("one", "two", "three", "four"), texts=["x" * 5000])
    content = render_comparison(comparison)
    assert f"This page holds {MOST_CARDS} of" in content
    assert len(content) < 1_000_000
    places = [float(place) for place in re.findall(r'<circle class="dot" cx="([\d.]+)" cy="\d+" r="5.5"', content)]
    assert len(places) == 4
    assert all(62 <= place <= 346 for place in places)


def test_classifiers_that_agree_have_no_gallery():
    page = page_of(make_comparison() | {"differing": []})
    assert "All classifiers give the same answer to every row." in page.texts["p"]
    assert "dialog" not in page.tags


def test_what_has_no_value_is_a_dash():
    comparison = make_comparison()
    for pair in comparison["pairs"]:
        pair["metrics"]["auroc"] |= {"difference": None, "low": None, "high": None}
    for one in comparison["classifiers"]:
        one["metrics"]["auroc"] = {"value": None, "low": None, "high": None}
    assert "None" not in " ".join(page_of(comparison).texts["td.number value"])


def test_other_examples_than_those_compared_are_refused():
    with pytest.raises(ConfigError, match=r"^3 examples for a comparison of 60 rows; "):
        render_comparison(make_comparison(), examples=pictures(3))
    left_out = make_comparison() | {"left_out": {"total": 1, "positions": [60]}}
    assert page_of(left_out, examples=pictures(61)).tags.count("img") == len(left_out["differing"])
