"""`VLClassifier`: rows of every kind, labels by name, and one pass of the backbone whatever scikit-learn does."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pandas
import pytest
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from qwen_vl_classifier import Backbone, Example, TrainConfig, VLClassifier, train
from qwen_vl_classifier.training import estimator as module
from qwen_vl_classifier.training.reuse import shared_backbone, temporary_features

TEXT = "The picture is warm."
CHEAP = {"taps": "mean:-1", "heads": "linear", "folds": 2}


def pictures(seed: int, count: int = 12) -> list[Image.Image]:
    """Warm and cold pictures in turn, all different."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        colour = np.array([230, 120, 30] if number % 2 else [30, 120, 230])
        noise = rng.integers(-25, 25, (56, 56, 3))
        made.append(Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)))
    return made


PICTURES = pictures(0)
DICTS = [{"image": picture, "text": TEXT} for picture in PICTURES]
FRAME = pandas.DataFrame({"image": PICTURES, "text": TEXT, "camera": range(12)})
LABELS = np.array(["cold", "warm"] * 6)


@pytest.fixture(scope="module")
def cheap(tiny_backbone) -> VLClassifier:
    return VLClassifier(tiny_backbone, **CHEAP)


@pytest.fixture(scope="module")
def fitted(cheap) -> VLClassifier:
    return clone(cheap).fit(FRAME, LABELS)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many examples each call sent through a backbone."""
    counted: list[int] = []
    encode = Backbone.encode_prepared

    def counting(self, prepared, taps, **options):
        counted.append(len(prepared))
        return encode(self, prepared, taps, **options)

    monkeypatch.setattr(Backbone, "encode_prepared", counting)
    return counted


def test_labels_are_those_of_y(fitted):
    assert fitted.classes_.tolist() == ["cold", "warm"]
    assert fitted.predict(FRAME).tolist() == LABELS.tolist()
    assert fitted.score(FRAME, LABELS) == 1
    assert fitted.classifier_.label_names == ("cold", "warm")
    assert fitted.feature_names_in_.tolist() == ["image", "text", "camera"]
    assert fitted.n_features_in_ == 3


@pytest.mark.parametrize("labels", [[1.0, 2.0], [False, True]], ids=str)
def test_labels_of_any_type_come_back(cheap, labels):
    y = np.array(labels * 6)
    predicted = clone(cheap).fit(DICTS, y).predict(DICTS)
    assert predicted.dtype == y.dtype
    assert predicted.tolist() == y.tolist()


@pytest.mark.soak
def test_labels_may_be_a_column(cheap):
    numbers = pandas.Series([0, 1] * 6, dtype="Int64")
    assert clone(cheap).fit(DICTS, numbers).predict(DICTS).tolist() == numbers.tolist()
    words = pandas.Series(LABELS, dtype="category")
    assert clone(cheap).fit(FRAME, words).classes_.tolist() == ["cold", "warm"]


def test_it_is_the_search_of_train(fitted, tiny_backbone):
    rows = [Example(picture, TEXT, number % 2) for number, picture in enumerate(PICTURES)]
    trained = train(rows, backbone=tiny_backbone, config=TrainConfig(**CHEAP), progress=False)
    assert fitted.result_.table == trained.table
    assert fitted.result_.estimate == trained.estimate
    assert np.array_equal(fitted.predict_proba(FRAME), trained.classifier.predict_proba(rows))


@pytest.mark.parametrize(
    "rows",
    [
        DICTS,
        np.array(DICTS, dtype=object),
        [Example(picture, TEXT, label=0) for picture in PICTURES],
        FRAME[["text", "image"]],
        FRAME.rename(index=lambda row: row + 7),
    ],
    ids=["dicts", "array", "examples", "columns", "index"],
)
def test_rows_of_any_kind_get_the_same_answer(fitted, rows):
    assert np.array_equal(fitted.predict_proba(rows), fitted.predict_proba(FRAME))


def test_pictures_alone_get_one_text(cheap, fitted, tmp_path):
    paths = []
    for number, picture in enumerate(PICTURES):
        paths.append(tmp_path / f"{number:02}.png")
        picture.save(paths[-1])
    one_text = clone(cheap).set_params(text=TEXT)
    expected = fitted.predict_proba(FRAME)
    one_text.fit([str(path) for path in paths], LABELS)
    for rows in (paths, np.array(paths, dtype=object), pandas.Series(paths), PICTURES):
        assert np.array_equal(one_text.predict_proba(rows), expected)
    assert not hasattr(one_text, "feature_names_in_")
    renamed = pandas.DataFrame({"file": paths, "claim": TEXT})
    named = clone(cheap).set_params(image_column="file", text_column="claim").fit(renamed, LABELS)
    assert np.array_equal(named.predict_proba(renamed), expected)


def test_the_backbone_sees_an_example_once_whatever_is_searched(tiny_backbone, passes):
    rows = [{"image": picture, "text": TEXT} for picture in pictures(seed=1)]
    whole = VLClassifier(tiny_backbone, folds=2, heads="linear")
    cross_val_score(clone(whole).set_params(taps="image:1"), rows, LABELS, cv=2)
    assert sum(passes) == len(rows)
    grid = {"taps": ["mean:-1", ["mean:1", "text:2"]], "heads": ["linear"]}
    found = GridSearchCV(whole, grid, cv=2).fit(rows, LABELS)
    assert found.best_score_ > 0.9
    assert sum(passes) == len(rows)


def test_features_are_kept_in_a_folder(cheap, passes, tmp_path):
    rows = [{"image": picture, "text": TEXT} for picture in pictures(seed=2)]
    first = clone(cheap).set_params(features=tmp_path).fit(rows, LABELS).predict_proba(rows)
    assert list(tmp_path.iterdir())
    assert sum(passes) == len(rows)
    shutil.rmtree(tmp_path)
    assert np.allclose(clone(cheap).set_params(features=str(tmp_path)).fit(rows, LABELS).predict_proba(rows), first)
    assert sum(passes) == 2 * len(rows)


@pytest.mark.soak
def test_large_predictions_read_only_what_they_need(fitted, monkeypatch, tmp_path):
    rows = [{"image": picture, "text": TEXT} for picture in pictures(seed=3)]
    fitted = clone(fitted).set_params(features=tmp_path / "small").fit(FRAME, LABELS)
    kept = fitted.predict_proba(rows)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    fitted.set_params(features=tmp_path / "large")
    assert np.allclose(fitted.predict_proba(rows), kept, atol=1e-6)
    assert not list((tmp_path / "large").iterdir())


def test_clones_share_one_backbone(cheap, tiny_backbone, monkeypatch):
    assert clone(cheap).get_params() == cheap.get_params()
    assert clone(cheap).model is tiny_backbone
    loaded = []
    load = Backbone.load
    monkeypatch.setattr(Backbone, "load", lambda *args, **options: loaded.append(args) or load(*args, **options))
    named = VLClassifier(**CHEAP)
    one, other = (clone(named).fit(DICTS, LABELS).classifier_.backbone for _ in range(2))
    assert one is other
    assert len(loaded) <= 1


def test_a_checkpoint_that_was_replaced_is_loaded_again(nano_folder, tmp_path):
    folder = shutil.copytree(nano_folder("qwen2_5_vl"), tmp_path / "checkpoint")
    first = shared_backbone(str(folder), device="cpu")
    assert shared_backbone(str(folder), device="cpu") is first
    shutil.rmtree(folder)
    shutil.copytree(nano_folder("qwen3_vl"), folder)
    assert shared_backbone(str(folder), device="cpu").family.model_type == "qwen3_vl"


def test_a_pickle_holds_no_backbone_and_gives_the_same_answers():
    fitted = VLClassifier(**CHEAP).fit(FRAME, LABELS)
    pickled = pickle.dumps(fitted)
    assert len(pickled) < 100_000
    again = pickle.loads(pickled)
    assert np.array_equal(again.predict_proba(FRAME), fitted.predict_proba(FRAME))
    assert again.predict(FRAME).tolist() == LABELS.tolist()
    assert again.classifier_.backbone is fitted.classifier_.backbone


@pytest.mark.soak
def test_a_pickle_refuses_another_backbone(nano_folder, tmp_path):
    folder = shutil.copytree(nano_folder("qwen2_5_vl"), tmp_path / "checkpoint")
    pickled = pickle.dumps(VLClassifier(str(folder), **CHEAP | {"taps": "mean:1"}, device="cpu").fit(DICTS, LABELS))
    shutil.rmtree(folder)
    shutil.copytree(nano_folder("qwen3_vl"), folder)
    with pytest.raises(ValueError, match=r"fitted on another backbone than .* is here .*; fit it again"):
        pickle.loads(pickled)


def test_a_loaded_backbone_is_not_pickled(cheap):
    with pytest.raises(ValueError, match="no pickle and no other process can hold; give its name or folder"):
        pickle.dumps(cheap)


def test_an_unfitted_pickle_has_the_same_parameters(cheap):
    assert pickle.loads(pickle.dumps(VLClassifier(**CHEAP))).get_params() == VLClassifier(**CHEAP).get_params()


def test_rows_of_weight_zero_do_not_count(cheap):
    counted = np.ones(12)
    counted[[3, 8]] = 0
    weighted = clone(cheap).fit(DICTS, LABELS, sample_weight=counted)
    without = [row for row, weight in zip(DICTS, counted, strict=True) if weight]
    expected = clone(cheap).fit(without, LABELS[counted > 0])
    assert np.allclose(weighted.predict_proba(DICTS), expected.predict_proba(DICTS))
    uneven = clone(cheap).fit(DICTS, LABELS, sample_weight=np.where(LABELS == "warm", 20, 1))
    assert not np.allclose(uneven.predict_proba(DICTS), expected.predict_proba(DICTS))


@pytest.mark.soak
def test_class_weights_go_by_the_names_of_classes(cheap):
    named = clone(cheap).set_params(class_weight={"warm": 5, "cold": 1}).fit(DICTS, LABELS)
    numbered = clone(cheap).set_params(class_weight={0: 1, 1: 5}).fit(DICTS, (LABELS == "warm").astype(int))
    assert np.array_equal(named.predict_proba(DICTS), numbered.predict_proba(DICTS))


def test_decisions_follow_the_threshold(fitted):
    own = clone(fitted).fit(DICTS, LABELS)
    own.classifier_.threshold = float(np.sort(own.predict_proba(DICTS)[:, 1])[9])
    margins = own.decision_function(DICTS)
    assert np.array_equal(margins >= 0, own.predict(DICTS) == "warm")
    assert 0 < (margins >= 0).sum() < 6
    assert np.array_equal(np.argsort(margins), np.argsort(own.predict_proba(DICTS)[:, 1]))
    assert [answer.label for answer in own.decide(DICTS)] == (margins >= 0).astype(int).tolist()


def test_a_pipeline_may_prepare_the_rows(cheap):
    tidy = FunctionTransformer(lambda frame: frame.assign(text=frame["text"].str.strip()))
    assert make_pipeline(tidy, cheap).fit(FRAME, LABELS).score(FRAME, LABELS) == 1


@pytest.mark.soak
def test_what_scikit_learn_puts_around_estimators(cheap):
    assert (cross_val_predict(cheap, FRAME, LABELS, cv=2) == LABELS).mean() > 0.9
    calibrated = CalibratedClassifierCV(cheap, cv=2).fit(FRAME, LABELS)
    assert calibrated.predict(FRAME).tolist() == LABELS.tolist()
    assert CalibratedClassifierCV(FrozenEstimator(calibrated.estimator.fit(FRAME, LABELS))).fit(FRAME, LABELS)


@pytest.mark.parametrize(
    ("parameters", "rows", "y", "message"),
    [
        ({}, DICTS, None, "the target y is None; give the label of each row"),
        ({}, DICTS, [None, *LABELS[1:]], "y contains NaN, None or NA in row 0;"),
        ({}, DICTS, pandas.Series([*LABELS[1:], pandas.NA], dtype="string"), "y contains NaN, None or NA in row 11;"),
        ({}, DICTS, np.array([np.nan, *LABELS[1:]], dtype=object), "y contains NaN, None or NA in row 0;"),
        ({}, DICTS, [1, *LABELS[1:]], "y holds 11 words among 12 labels; expected words only, or numbers only"),
        ({}, DICTS, [*"abc"] * 4, "Only binary classification is supported. .* 'a', 'b', 'c'; expected two classes"),
        ({}, DICTS, ["a"] * 12, "y holds one class only, 'a'; expected rows of two classes"),
        ({}, DICTS[:11], LABELS, "X has 11 rows and y 12 labels; expected one for each row"),
        ({}, ["a.png"] * 12, LABELS, "X holds 12 of type str; expected a DataFrame or dicts .*; .* give text="),
        ({}, np.zeros((12, 2)), LABELS, "X is an array of 2 dimensions; expected rows with the columns 'image'"),
        ({}, [{"text": "no picture column"}] * 12, LABELS, "has no column 'image'.* image_column="),
        ({"class_weight": {0: 1, 1: 5}}, DICTS, LABELS, "class_weight is for 0, 1; .* each class of y: 'cold', 'warm'"),
        ({"options": {"folds": 3}}, DICTS, LABELS, "options has 'folds', a parameter of its own; give it there"),
        ({"options": {"depth": 3}}, DICTS, LABELS, "options: .*'depth'; expected names of TrainConfig"),
        ({"taps": "mean:9"}, DICTS, LABELS, "mean:9"),
        ({"model": "builtin:huge"}, DICTS, LABELS, "builtin:huge"),
    ],
)
def test_errors_are_one_line(cheap, parameters, rows, y, message):
    with pytest.raises((ValueError, OSError), match=message) as raised:
        clone(cheap).set_params(**parameters).fit(rows, y)
    assert "\n" not in str(raised.value)


def test_weights_that_do_not_fit_are_an_error(cheap):
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\); expected \(12,\)"):
        clone(cheap).fit(DICTS, LABELS, sample_weight=[1, 2, 3])
    named = clone(cheap).set_params(options={"weight_column": "camera"})
    with pytest.raises(ValueError, match="weights from one place; leave one out"):
        named.fit(FRAME, LABELS, sample_weight=np.ones(12))


def test_predictions_come_after_fit(cheap):
    with pytest.raises(NotFittedError):
        clone(cheap).predict(DICTS)
    with pytest.raises(NotFittedError):
        clone(cheap).result_  # noqa: B018


@pytest.mark.soak
def test_processes_share_the_features():
    before = set(temporary_features().iterdir())
    rows = [{"image": picture, "text": TEXT} for picture in pictures(seed=4)]
    try:
        scores = cross_val_score(VLClassifier(**CHEAP), rows, LABELS, cv=4, n_jobs=2)
    finally:
        get_reusable_executor().shutdown(wait=True)
    assert scores.mean() > 0.9
    assert set(temporary_features().iterdir()) > before  # written by those processes
