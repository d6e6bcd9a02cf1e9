"""The pool: each content once, keys that outlast names and order, features in a file that is gone at the end."""

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example, FeatureStore, Tap, TrainConfig, load_examples, train
from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import margins_of
from qwen_vl_classifier.errors import ConfigError, ImageError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.labelling.answers.journal import Journal
from qwen_vl_classifier.labelling.asking import LabelSpec
from qwen_vl_classifier.labelling.pool import Pool
from qwen_vl_classifier.labelling.session import Session

TAPS = [Tap(-1, "mean"), Tap(2, "image")]
TEXT = "The picture is red."


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 24 small pictures, red and blue in turn, and one that is broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        colour = np.array([200, 40, 40] if number % 2 else [40, 40, 200])
        pixels = np.clip(colour + rng.integers(-30, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "99.png").write_bytes((folder / "00.png").read_bytes()[:300])
    return folder


def rows_of(folder):
    return [Example(str(path), TEXT, origin=path.name) for path in sorted(folder.glob("*.png"))]


@pytest.fixture
def encoded(monkeypatch):
    """Count the examples that go through the model."""
    counts = []
    encode = Backbone.encode_prepared

    def counting(self, prepared, *arguments, **options):
        counts.append(len(prepared))
        return encode(self, prepared, *arguments, **options)

    monkeypatch.setattr(Backbone, "encode_prepared", counting)
    return counts


def make(rows, backbone, folder, **options):
    options = {"taps": TAPS, "store": FeatureStore(folder / "features"), "progress": False} | options
    return Pool.encode(rows, backbone, **options)


def test_every_content_is_there_once(photos, tiny_backbone, tmp_path):
    rows = rows_of(photos)
    rows = [*rows[:3], Example(rows[1].image, TEXT, id="again"), Example(rows[1].image, "Another text."), rows[24]]
    pool = make(rows, tiny_backbone, tmp_path)
    assert [example.image for example in pool.examples] == [rows[row].image for row in (0, 1, 2, 4)]
    assert pool.numbers.tolist() == [0, 1, 2, 1, 3]
    assert pool.groups.tolist() == [0, 1, 2, 1]
    assert (pool.indices.tolist(), pool.positions.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert (pool.left_out["total"], pool.left_out["of"]) == (1, 6)
    assert pool.left_out["lines"][0].startswith("99.png: ")
    expected = extract_features(pool.examples, tiny_backbone, TAPS, progress=False)
    np.testing.assert_allclose(pool.features, expected, rtol=1e-3, atol=1e-4)
    assert all(pool.features[:, tap].flags["C_CONTIGUOUS"] for tap in range(2))
    with pytest.raises(ImageError, match="1 of 6 rows cannot be used"):
        make(rows, tiny_backbone, tmp_path, max_errors=0)


def test_keys_are_by_content(photos, tiny_backbone, tmp_path):
    pool = make(rows_of(photos)[:6], tiny_backbone, tmp_path)
    again = [
        Example(Image.open(row.image).convert("RGB"), TEXT, id=f"{number}")
        for number, row in enumerate(rows_of(photos)[5::-1])
    ]
    other = make([*again, Example(None, TEXT)], tiny_backbone, tmp_path)
    assert other.keys[:6] == pool.keys[::-1]
    assert other.row_of(pool.keys[5]) == 0
    assert (pool.row_of(other.keys[6]), pool.row_of("none")) == (None, None)
    order = [pool.keys[row] for row in pool.order(3)]
    assert [other.keys[row] for row in other.order(3) if row < 6] == order  # also where there are more rows
    assert order != [pool.keys[row] for row in pool.order(4)]


def test_nothing_is_encoded_twice_and_no_file_stays(photos, tiny_backbone, tmp_path, encoded):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    first = make(rows_of(photos)[:5], tiny_backbone, tmp_path, scratch=scratch)
    assert sum(encoded) == 5
    assert list(scratch.iterdir()) == []  # it has no name from the start
    second = make(rows_of(photos)[:7], tiny_backbone, tmp_path, scratch=scratch)
    assert sum(encoded) == 7
    np.testing.assert_array_equal(second.features[:5], first.features)
    first.close()
    first.close()
    assert first.features.shape == (0, 2, tiny_backbone.hidden_size)


def test_margins_by_a_classifier(photos, tiny_backbone, tmp_path):
    classifier = Classifier.zero_shot(tiny_backbone)
    pool = make(rows_of(photos)[:4], tiny_backbone, tmp_path, keep_taps=[classifier.tap])
    features = pool.features[:, pool.taps.index(classifier.tap)]
    np.testing.assert_allclose(pool.margins_by(classifier), margins_of(classifier.logits_of(features)))
    with pytest.raises(ConfigError, match="was not read"):
        make(rows_of(photos)[:4], tiny_backbone, tmp_path).margins_by(classifier)


def test_train_reads_the_data_set_and_the_features(photos, tiny_backbone, tmp_path, encoded):
    out = photos / "labels.jsonl"
    store = FeatureStore(tmp_path / "features")
    pool = make(rows_of(photos), tiny_backbone, tmp_path, store=store)
    labels = [LabelSpec(no="blue", yes="red")]
    session = Session(pool, labels, Journal.at(out, labels=labels, question=TEXT), annotator="ann")
    while questions := session.questions("one"):
        number = int(pool.examples[questions[0].row].origin[:2])
        session.answer("one", questions[0].key, "label", "yes" if number % 2 else "no")
    given = session.labelled()
    session.close()
    encoded.clear()
    config = TrainConfig(taps="mean:-1", heads="linear", sampled_column="sampled")
    for rows, names in ((given, ("blue", "red")), (load_examples(out), ("0", "1"))):
        assert len(rows) == 24
        result = train(rows, backbone=tiny_backbone, config=config, store=store, progress=False)
        assert result.classifier.label_names == names
    assert encoded == []
