"""Checks: no row keeps its own, blind and deaf classifiers are found out, and what cannot be checked says why."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Classifier, Example, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.evaluation.checks import (
    CHECKS,
    derangement,
    judge_checks,
    not_made,
    plan_checks,
    with_grey_pictures,
    with_other_pictures,
    with_other_texts,
)
from qwen_vl_classifier.training.splitting import groups_of


class Scripted:
    """Stands in for a classifier: its probability is a function of the example."""

    threshold = 0.5

    def __init__(self, probability):
        self.probability = probability
        self.seen = []

    def predict_proba(self, examples, *, store=None, progress=False):
        self.seen.append(list(examples))
        p = np.array([self.probability(example) for example in examples], dtype=np.float64)
        return np.stack([1 - p, p], axis=1)


def coloured(shade):
    return Image.new("RGB", (8, 6), (shade, shade, shade))


def brightness(example):
    return example.images[0].getpixel((0, 0))[0] / 255 if example.images else 0.5


def spoken(example):
    return 0.9 if "yes" in example.text else 0.1


def made(count=80):
    """Rows whose picture and text both tell the label; two rows share a picture."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count // 2):
        label = number % 2
        picture = coloured(int(rng.integers(0, 100) + 150 * label))
        words = "yes" if label else "no"
        rows += [Example(picture, f"{words} {number} {turn}", label, id=f"{number} {turn}") for turn in "ab"]
    return rows


def check(classifier, examples, **options):
    labels = np.array([example.label for example in examples])
    probabilities = classifier.predict_proba(examples)[:, 1]
    everything = np.arange(len(examples))
    sizes = read_sizes(examples, BadRows())
    planned = plan_checks(examples, sizes, everything, **({"most_rows": 500} | options))
    after = {
        name: classifier.predict_proba(altered.examples)[:, 1]
        for name, altered in planned.items()
        if not isinstance(altered, str)
    }
    return judge_checks(
        planned,
        after,
        labels,
        probabilities,
        groups_of(examples),
        positions=everything,
        threshold=classifier.threshold,
        resamples=200,
    )


def test_a_derangement_leaves_nothing_in_its_place():
    for seed in range(50):
        found = derangement([*range(7)], np.random.default_rng(seed))
        assert sorted(found) == sorted(found.values()) == [*range(7)]
        assert all(one != other for one, other in found.items())
    assert derangement(["alone"], np.random.default_rng(0)) == {}
    assert derangement([0, 1], np.random.default_rng(0)) == {0: 1, 1: 0}


def test_no_row_keeps_its_picture():
    shades = [10, 10, 20, 30, 30, 40]
    pictures = {shade: coloured(shade) for shade in shades}
    examples = [Example(pictures[shade], str(row), 1) for row, shade in enumerate(shades)]
    altered = with_other_pictures(examples, np.arange(6), np.random.default_rng(0))
    new = [example.images[0].getpixel((0, 0))[0] for example in altered.examples]
    assert all(one != other for one, other in zip(new, shades, strict=True))
    assert sorted(set(new)) == sorted(set(shades))
    assert new[0] == new[1]  # rows of one picture get one other picture
    assert [example.text for example in altered.examples] == [example.text for example in examples]


def test_pictures_go_to_rows_with_as_many():
    one, two, three, four = (coloured(shade) for shade in (10, 20, 30, 40))
    examples = [
        Example(one, "a", 1),
        Example((one, two), "b", 0),
        Example(three, "c", 1),
        Example((three, four), "d", 1),
    ]
    examples += [Example(None, "e", 0), Example((one, two, three), "alone with three", 0)]
    altered = with_other_pictures(examples, np.arange(6), np.random.default_rng(0))
    assert altered.rows.tolist() == [0, 1, 2, 3]
    assert [len(example.images) for example in altered.examples] == [1, 2, 1, 2]


def test_grey_pictures_have_the_same_sizes():
    buffer = io.BytesIO()
    Image.new("RGB", (5, 9)).save(buffer, "PNG")
    examples = [Example((coloured(1), buffer.getvalue()), "a", 1), Example(None, "b", 0), Example(coloured(2), "c", 0)]
    altered = with_grey_pictures(examples, read_sizes(examples, BadRows()), np.arange(3))
    assert altered.rows.tolist() == [0, 2]
    assert [[picture.size for picture in example.images] for example in altered.examples] == [
        [(8, 6), (5, 9)],
        [(8, 6)],
    ]
    assert {picture.getcolors()[0][1] for row in altered.examples for picture in row.images} == {(128, 128, 128)}


def test_no_row_keeps_its_text():
    examples = [Example(None, text, 1) for text in ("a", "b", "a", "c")]
    altered = with_other_texts(examples, np.arange(4), np.random.default_rng(0))
    assert all(new.text != old.text for new, old in zip(altered.examples, examples, strict=True))


def test_a_classifier_that_looks_loses_by_other_pictures_alone():
    found = check(Scripted(brightness), made())
    assert not found["images_permuted"]["free"]
    assert not found["images_grey"]["free"]
    assert found["texts_permuted"]["free"]
    drop = found["images_permuted"]["auroc"]
    assert drop["before"] == 1.0
    assert drop["drop"] == drop["before"] - drop["after"]
    assert drop["low"] <= drop["drop"] <= drop["high"]
    assert found["texts_permuted"]["auroc"]["drop"] == found["texts_permuted"]["accuracy"]["high"] == 0.0


def test_a_classifier_that_reads_alone_is_found_out():
    found = check(Scripted(spoken), made())
    assert found["images_permuted"]["free"]
    assert found["images_grey"]["free"]
    assert not found["texts_permuted"]["free"]


def test_at_most_so_many_rows_are_scored_again_and_always_the_same():
    classifier = Scripted(spoken)
    first = check(classifier, made(), most_rows=30)
    assert [len(rows) for rows in classifier.seen[1:]] == [30, 30, 30]
    assert first["images_permuted"]["rows"] == 30
    assert check(classifier, made(), most_rows=30) == first


def test_what_cannot_be_checked_says_why():
    alone = [Example(None, "same", row % 2) for row in range(6)]
    found = check(Scripted(spoken), alone)
    assert found["images_permuted"] == found["images_grey"] == not_made("no row has a picture")
    assert found["texts_permuted"] == not_made("all rows have the same text")
    picture = coloured(3)
    found = check(Scripted(brightness), [Example(picture, f"{row}", row % 2) for row in range(6)])
    assert found["images_permuted"]["reason"] == "all rows have the same picture"
    assert found["images_grey"]["reason"] is None


def test_one_class_alone_is_judged_by_accuracy():
    examples = [row for row in made() if row.label == 1]
    found = check(Scripted(brightness), examples)
    assert found["images_permuted"]["auroc"] is None
    assert found["images_permuted"]["free"]  # other pictures of the same class serve as well
    assert not found["images_grey"]["free"] or found["images_grey"]["accuracy"]["drop"] == 0


def test_rows_that_were_left_out_do_not_count():
    examples, classifier = made(), Scripted(brightness)
    labels = np.array([row.label for row in examples])
    good = np.arange(len(examples)) >= 6
    planned = plan_checks(examples, read_sizes(examples, BadRows()), np.arange(len(examples)), most_rows=500)
    after = {name: classifier.predict_proba(altered.examples)[:, 1] for name, altered in planned.items()}
    after["images_permuted"][10:14] = np.nan
    found = judge_checks(
        planned,
        after,
        labels[good],
        classifier.predict_proba(examples)[good, 1],
        groups_of(examples)[good],
        positions=np.where(good, np.cumsum(good) - 1, -1),
        threshold=0.5,
        resamples=100,
    )
    assert [found[name]["rows"] for name in CHECKS] == [70, 74, 74]
    assert found["images_grey"]["auroc"]["before"] == 1.0


def test_a_real_classifier_whose_head_sees_no_picture_is_found_out(tiny_backbone, scene_rows):
    spec = HeadSpec("linear", tiny_backbone.hidden_size)
    head = spec.build()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    constant = Classifier(tiny_backbone, Tap(-1, "mean"), head, spec)
    found = check(constant, scene_rows[:12])
    assert found["images_permuted"]["free"]
    assert found["images_permuted"]["auroc"]["drop"] == pytest.approx(0.0)
