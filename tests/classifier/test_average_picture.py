"""The average training picture of a saved classifier: what it shows, what it never shows, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, TrainConfig, train
from qwen_vl_classifier.classifier.average_picture import AVERAGE, FEWEST_PICTURES, average_of, read_average
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.images.look_alikes import Looks, look_of
from qwen_vl_classifier.training.finetuning.starting_point import trainable_copy

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = TrainConfig(taps="mean:1", heads="linear", folds=2)


def pictures_of(count: int, size: tuple[int, int] = (56, 56)) -> list[Image.Image]:
    """Return plain pictures of different colours."""
    return [Image.new("RGB", size, (60 + 3 * number, 200 - 2 * number, 90)) for number in range(count)]


def rows_of(pictures: list[Image.Image], repeats: int = 1) -> list[Example]:
    """Return rows about pictures, of both classes."""
    return [Example(picture, f"text {number}", number % 2) for number, picture in enumerate(pictures * repeats)]


def trained(backbone: Backbone, rows: list[Example]) -> Classifier:
    """Train a small classifier."""
    return train(rows, backbone=backbone, config=QUICK, progress=False).classifier


def test_the_average_of_the_training_pictures_is_kept(tiny_backbone, tmp_path):
    pictures = pictures_of(FEWEST_PICTURES, (70, 42))
    classifier = trained(tiny_backbone, rows_of(pictures))
    assert classifier.average.size == (8, 8)
    expected = np.mean([np.asarray(picture)[0, 0] for picture in pictures], axis=0)
    np.testing.assert_allclose(np.asarray(classifier.average), np.broadcast_to(expected, (8, 8, 3)), atol=0.51)
    loaded = Classifier.load(classifier.save(tmp_path / "c"), backbone=tiny_backbone)
    np.testing.assert_array_equal(np.asarray(loaded.average), np.asarray(classifier.average))
    again = Classifier.load(loaded.save(tmp_path / "c"), backbone=tiny_backbone)
    np.testing.assert_array_equal(np.asarray(again.average), np.asarray(classifier.average))


def test_few_pictures_are_not_averaged_however_many_rows_they_are_in(tiny_backbone, tmp_path):
    classifier = trained(tiny_backbone, rows_of(pictures_of(FEWEST_PICTURES - 1), repeats=3))
    assert classifier.average is None
    folder = classifier.save(tmp_path / "c")
    assert not (folder / AVERAGE).exists()
    assert Classifier.load(folder, backbone=tiny_backbone).average is None


def test_text_alone_has_no_average(tiny_backbone):
    assert trained(tiny_backbone, [Example(None, f"text {n}", n % 2) for n in range(40)]).average is None


def test_each_picture_counts_once():
    pictures = pictures_of(FEWEST_PICTURES)
    rng = np.random.default_rng(0)
    pictures[0] = Image.fromarray(rng.integers(0, 255, (90, 30, 3), dtype=np.uint8))
    average = np.asarray(average_of(Looks.joined([look_of(picture) for picture in pictures])), dtype=float)
    small = [np.asarray(one.resize((8, 8), Image.Resampling.BOX), dtype=float) for one in pictures]
    np.testing.assert_allclose(average, np.mean(small, axis=0), atol=0.51)


def test_a_classifier_that_is_calibrated_again_keeps_it(tiny_backbone):
    rows = rows_of(pictures_of(FEWEST_PICTURES))
    classifier = trained(tiny_backbone, rows)
    assert classifier.calibrate(rows).average is classifier.average


def test_what_fine_tuning_starts_from_hands_it_on(tiny_backbone):
    classifier = trained(tiny_backbone, rows_of(pictures_of(FEWEST_PICTURES)))
    assert trainable_copy(classifier, FinetuneConfig(method="full", towers="llm")).average is classifier.average


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "cannot be read"),
        (b"", "cannot be read"),
        ((65, 8), "65 x 8 pixels; expected at most 64 x 64"),
        ((4000, 3000), "4000 x 3000 pixels; expected at most 64 x 64"),
    ],
)
def test_a_file_that_is_no_average_picture_is_refused(tiny_classifier, tmp_path, content, message):
    folder = tiny_classifier.save(tmp_path / "c")
    if isinstance(content, bytes):
        (folder / AVERAGE).write_bytes(content)
    else:
        Image.new("RGB", content).save(folder / AVERAGE)
    with pytest.raises(ArtifactError, match=message) as caught:
        Classifier.load(folder, backbone=tiny_classifier.backbone)
    assert "\n" not in str(caught.value)
    assert "remove the file" in str(caught.value)


def test_any_small_picture_is_read_as_rgb(tmp_path):
    Image.new("L", (64, 1), 7).save(tmp_path / AVERAGE)
    assert read_average(tmp_path).mode == "RGB"
    assert read_average(tmp_path / "elsewhere") is None
