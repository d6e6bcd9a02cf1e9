"""The stream: the same example has the same features to the last bit, and each picture is opened once."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Example, FeatureStore, Tap, extract_features
from qwen_vl_classifier.backbone import processor
from qwen_vl_classifier.backbone import windows as windows_module
from qwen_vl_classifier.backbone.windows import windows
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.features.extraction import keep_features, stream_features
from qwen_vl_classifier.features.reader import FeatureReader
from tests import nano

TAPS = [Tap(-1, "mean"), Tap(2, "last")]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")
    return Backbone.load(folder, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Rows of all lengths, so that what is beside one differs; two of them stand twice, far apart."""
    rng = np.random.default_rng(0)
    rows = [Example(None, " ".join(["word"] * int(rng.integers(1, 40))) + f" {number}") for number in range(600)]
    rows[520] = Example(None, rows[3].text, label=1, id="again")
    rows[599] = rows[0]
    return rows


def extracted(rows, backbone, store):
    return extract_features(rows, backbone, TAPS, store=store, progress=False)


def extracted_from_an_iterator(rows, backbone, store):
    return extract_features(iter(rows), backbone, TAPS, store=store, progress=False)


def streamed(rows, backbone, store):
    return np.concatenate([*stream_features(rows, backbone, TAPS, store=store, progress=False)])


def kept(rows, backbone, store):
    keep_features(rows, backbone, TAPS, store, progress=False)
    return extract_features(rows, backbone, TAPS, store=store, progress=False)


def encoded(rows, backbone, store):
    return backbone.encode(rows, TAPS)


@pytest.mark.parametrize(
    ("way", "stored"),
    [
        (extracted, False),
        (extracted, True),
        (extracted_from_an_iterator, False),
        (streamed, False),
        (kept, True),
        (encoded, False),
    ],
)
def test_the_same_example_has_the_same_features_however_far_apart(backbone, rows, tmp_path, way, stored):
    features = way(rows, backbone, FeatureStore(tmp_path) if stored else None)
    np.testing.assert_array_equal(features[520], features[3])
    np.testing.assert_array_equal(features[599], features[0])
    assert (features[4] != features[3]).any()


def test_beside_other_rows_an_example_would_differ(backbone, rows):
    """Else the test above would show nothing."""
    alone = backbone.encode(rows[500:600], TAPS)
    assert (alone[20] != backbone.encode(rows[:100], TAPS)[3]).any()


def test_what_is_remembered_is_bounded(backbone, rows, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_EXAMPLES", 10)
    passes = []
    encode = backbone.encode_prepared
    monkeypatch.setattr(
        backbone,
        "encode_prepared",
        lambda prepared, *more, **options: passes.append(len(prepared)) or encode(prepared, *more, **options),
    )
    stream = rows[:10] + rows[:10] + rows[10:30] + rows[:10]
    a_window = 10 * len(TAPS) * backbone.hidden_size * 4
    for bound, expected in ((a_window, [10, 10, 10, 10]), (3 * a_window, [10, 10, 10])):
        reader = FeatureReader(backbone, TAPS, recall_bytes=bound)
        passes.clear()
        found = [reader.read(w.prepared, w.ids) for w in windows(backbone.processor, stream, BadRows())]
        assert passes == expected
        np.testing.assert_array_equal(found[1], found[0])


def test_an_example_that_came_again_is_remembered_from_there(backbone, rows, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_EXAMPLES", 10)
    stream = [example for start in range(10, 60, 10) for example in (rows[0], *rows[start : start + 9])]
    reader = FeatureReader(backbone, TAPS, recall_bytes=2 * 10 * len(TAPS) * backbone.hidden_size * 4)
    found = [reader.read(w.prepared, w.ids)[0] for w in windows(backbone.processor, stream, BadRows())]
    assert len(found) == 5
    for feature in found:
        np.testing.assert_array_equal(feature, found[0])


@pytest.fixture
def opened(monkeypatch) -> list[object]:
    """What was opened as a picture, in order."""
    sources: list[object] = []
    open_image = processor.open_image
    monkeypatch.setattr(processor, "open_image", lambda source: sources.append(source) or open_image(source))
    return sources


def test_each_picture_is_opened_once_wherever_its_rows_stand(backbone, tmp_path, monkeypatch, opened):
    monkeypatch.setattr(windows_module, "WINDOW_EXAMPLES", 8)
    for number in range(10):
        Image.new("RGB", (56, 28 + 28 * (number % 3)), (number * 20, 0, 90)).save(tmp_path / f"{number}.png")
    rows = [Example(str(tmp_path / f"{number % 10}.png"), f"text {number}") for number in range(100)]
    order = np.random.default_rng(0).permutation(100)
    features = extract_features([rows[row] for row in order], backbone, TAPS, progress=False)
    assert len(opened) == len(set(opened)) == 10
    opened.clear()
    keep_features([rows[row] for row in order], backbone, TAPS, FeatureStore(tmp_path / "store"), progress=False)
    assert len(opened) == 10
    one_by_one = np.concatenate([backbone.encode([rows[row]], TAPS) for row in order[:20]])
    torch.testing.assert_close(torch.tensor(features[:20]), torch.tensor(one_by_one), rtol=0.1, atol=0.05)


def test_all_bad_pictures_are_listed_once_the_rest_is_kept(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_EXAMPLES", 4)
    good = Image.new("RGB", (56, 56), "teal")
    buffer = io.BytesIO()
    good.save(buffer, "PNG")
    start = buffer.getvalue().index(b"IDAT") + 4
    damaged = buffer.getvalue()[:start] + bytes(20) + buffer.getvalue()[start + 20 :]  # its header is sound
    rows = [Example(damaged if number in (1, 6, 13) else good, f"text {number}") for number in range(15)]
    rows[6] = Example(damaged, "x", origin="line 8")
    for way in (extracted, streamed, kept):
        store = FeatureStore(tmp_path / way.__name__)
        with pytest.raises(ImageError) as caught:
            way(rows, backbone, store)
        assert str(caught.value).splitlines()[0] == "3 of 15 rows cannot be used:"
        assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:4]] == [
            "row 2",
            "line 8",
            "row 14",
        ]
        assert caught.value.code == "image_damaged"
        assert len(store) == 12 * len(TAPS)


def test_rows_that_are_bad_are_left_out_where_that_is_asked_for(backbone, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_EXAMPLES", 4)
    rows = [Example(b"broken" if number in (0, 6, 7, 14) else None, f"text {number}") for number in range(15)]
    bad = BadRows()
    features = extract_features(rows, backbone, TAPS, bad=bad, progress=False)
    assert [row.position for row in bad] == [0, 6, 7, 14]
    alone = [row for number, row in enumerate(rows) if number not in bad]
    assert features.shape == (11, len(TAPS), backbone.hidden_size)
    np.testing.assert_allclose(features, backbone.encode(alone, TAPS), rtol=0.1, atol=0.05)
