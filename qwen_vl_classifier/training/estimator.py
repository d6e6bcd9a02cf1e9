"""VLClassifier: `train` as an estimator of scikit-learn."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.probabilities import check_numbers
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example, Prediction
from qwen_vl_classifier.data.labels import label_text
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.rows import plain_value
from qwen_vl_classifier.errors import ArtifactError, ConfigError, DataError, first_of, shown
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.probe.candidates import candidate_taps
from qwen_vl_classifier.training.probe.probe import train
from qwen_vl_classifier.training.probe.result import TrainResult
from qwen_vl_classifier.training.reuse import MODEL_LOCK, share_features, shared_backbone, temporary_features

Rows: TypeAlias = Any
"""A DataFrame of pandas or polars, a list or object array of dicts or examples, or paths of pictures."""

KEPT_BYTES = 1 << 30
"""Predictions with more bytes of features at all taps keep none, and read only what they need."""

_WEIGHTS = "sample_weight"  # the column that `fit` gives to examples
_BYTES = 4  # of a number of a feature
_SMALLEST = 1e-12  # log odds are finite


class VLClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Train on image and text as any classifier of scikit-learn, by the same code as `train`.

    `X` holds one row for each example: a DataFrame of pandas or polars with the columns `image` and `text`, a list or
    an object array of dicts or of `Example`, or a list of pictures where `text` is one text for all. `y` holds two
    classes, by any names; the last of `classes_`, which are sorted, is the positive one.

    The backbone is loaded once in a process, however many clones there are, and stays loaded until an estimator needs
    another one. It runs once for each distinct example: features at all layers that `taps="auto"` would try are kept,
    so that folds and other `taps` and `heads` need no pass of their own.

    For predictions in production use `classifier_`: it reads only the layers that it needs, and can be saved, exported
    and served.

    Args:
        model: Name or folder of a checkpoint, as in `Backbone.load`, or a backbone that is loaded already.
        taps: Taps to try, as in `TrainConfig`: "auto", a list as text, or a sequence.
        heads: Heads to try, as in `TrainConfig`: "auto", a list as text, or a sequence.
        features: Folder in which features are kept. `None` keeps them in a temporary folder until the process ends;
            processes that scikit-learn starts share it.
        text: One text for all rows, in place of the text column.
        image_column: Column of the picture(s).
        text_column: Column of the text.
        objective: What the threshold optimises, as in `TrainConfig`.
        class_weight: Weights of the classes: `None`, "balanced", or a weight for each of `classes_`.
        folds: Folds of the cross-validation inside `fit` that chooses tap and head.
        random_state: Seed of that cross-validation and of initial weights: a number, a `RandomState` or `None`.
        options: Further options of `TrainConfig`, such as `{"exportable": True}`.
        device: As in `Backbone.load`, of a `model` that is loaded here; so are the next five.
        dtype: As in `Backbone.load`.
        min_pixels: As in `Backbone.load`.
        max_pixels: As in `Backbone.load`.
        revision: As in `Backbone.load`.
        quantization: As in `Backbone.load`.
        progress: Show progress bars on what takes more than two seconds.

    Attributes:
        classes_: The two classes, sorted, in the order of the columns of `predict_proba`.
        classifier_: The `Classifier` that `fit` made.
        n_features_in_: Number of columns of `X`, where it was a DataFrame.
        feature_names_in_: Names of these columns.

    Example:
        >>> from PIL import Image
        >>> colours = ("red", "blue", "orange", "navy", "gold", "teal")
        >>> rows = [{"image": Image.new("RGB", (64, 64), colour), "text": "It is warm."} for colour in colours]
        >>> y = ["warm", "cold"] * 3
        >>> estimator = VLClassifier(taps="mean:-1", heads="linear").fit(rows, y)
        >>> estimator.predict_proba(rows).shape
        (6, 2)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Backbone = "builtin:tiny",
        *,
        taps: str | Tap | Sequence[str | Tap] = "auto",
        heads: str | Sequence[str] = "auto",
        features: str | os.PathLike[str] | None = None,
        text: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        objective: str = "accuracy",
        class_weight: str | Mapping[Any, float] | None = None,
        folds: int = 5,
        random_state: int | np.random.RandomState | None = 0,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
        quantization: str | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.taps = taps
        self.heads = heads
        self.features = features
        self.text = text
        self.image_column = image_column
        self.text_column = text_column
        self.objective = objective
        self.class_weight = class_weight
        self.folds = folds
        self.random_state = random_state
        self.options = options
        self.device = device
        self.dtype = dtype
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.revision = revision
        self.quantization = quantization
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.two_d_array = False
        tags.input_tags.dict = True
        return tags

    def fit(self, X: Rows, y: Any, sample_weight: Any = None) -> VLClassifier:  # noqa: N803 (scikit-learn's name)
        """Choose tap and head by cross-validation within these rows, and train on all of them, as `train` does.

        Rows with the same picture stay in one fold of that cross-validation. A cross-validation around this estimator
        is scikit-learn's: give it `groups` where pictures repeat.

        Args:
            X: The rows, n of them; a column or field `label` is not looked at.
            y: Shape (n,): the label of each row, of exactly two classes.
            sample_weight: Shape (n,): how much each row counts, from 0; `None` counts every row once.

        Returns:
            The estimator itself.

        Raises:
            DataError: Rows that cannot be used, labels that do not fit them, one class only, or too few rows.
            ConfigError: A parameter is out of its range.
            CheckpointError: The backbone cannot be loaded.
        """
        classes, encoded = self._classes_of(y)
        examples = self._examples(X)
        if len(examples) != len(encoded):
            raise DataError(f"X has {len(examples):,} rows and y {len(encoded):,} labels; expected one for each row")
        config = self._config(classes)
        examples = [replace(row, label=int(label)) for row, label in zip(examples, encoded, strict=True)]
        if sample_weight is not None:
            examples, config = _weighted(examples, sample_weight, config)
        with MODEL_LOCK:
            backbone = self._backbone()
            result = train(
                examples,
                backbone=backbone,
                config=config,
                store=self._store(),
                label_names=_names_of(classes),
                keep_taps=self._read_taps(backbone),
                progress=self.progress,
            )
        self.classes_ = classes
        self.classifier_ = result.classifier
        self._note_columns(X)
        return self

    def predict_proba(self, X: Rows) -> npt.NDArray[np.float64]:  # noqa: N803 (scikit-learn's name)
        """Return calibrated probabilities: float64, shape (n, 2), in the order of `classes_`.

        Raises:
            NotFittedError: `fit` comes first.
            DataError: Rows that cannot be used.
        """
        check_is_fitted(self)
        examples = self._examples(X)
        classifier = self.classifier_
        with MODEL_LOCK:
            taps = self._read_taps(classifier.backbone)
            store: FeatureStore | None = self._store()
            if len(examples) * len(taps) * classifier.backbone.hidden_size * _BYTES > KEPT_BYTES:
                taps, store = [classifier.tap], None  # no fold of a cross-validation: nobody needs more of these rows
            features = extract_features(examples, classifier.backbone, taps, store=store, progress=self.progress)
            return check_numbers(classifier.probabilities_of(features[:, taps.index(classifier.tap)]))

    def predict(self, X: Rows) -> npt.NDArray[Any]:  # noqa: N803 (scikit-learn's name)
        """Return the class of each row, shape (n,), one of `classes_`: by the classifier's threshold, not by 0.5."""
        chosen = self.predict_proba(X)[:, 1] >= self.classifier_.threshold
        labels: npt.NDArray[Any] = self.classes_[chosen.astype(np.intp)]
        return labels

    def decision_function(self, X: Rows) -> npt.NDArray[np.float64]:  # noqa: N803 (scikit-learn's name)
        """Return the log odds of the positive class less those of the threshold, shape (n,).

        They are not negative where `predict` returns the positive class.
        """
        return _log_odds(self.predict_proba(X)[:, 1]) - _log_odds(np.float64(self.classifier_.threshold))

    def decide(self, X: Rows) -> list[Prediction]:  # noqa: N803 (scikit-learn's name)
        """Return label, probability and decision of each row, as `Classifier.decide`; it may abstain."""
        return [self.classifier_.decision_of(float(p)) for p in self.predict_proba(X)[:, 1]]

    @property
    def result_(self) -> TrainResult:
        """What `fit` tried and found, as `train` returns it."""
        check_is_fitted(self)
        record = self.classifier_.training
        return TrainResult(self.classifier_, record["table"], record["held_out_rows"], record["estimate"])

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self.model, Backbone):
            raise ConfigError(
                "model= is a backbone that is loaded, which no pickle and no other process can hold; give its name or "
                "folder, or leave n_jobs out"
            )
        state: dict[str, Any] = {**super().__getstate__(), "_features": None}
        if self.features is None:
            state["_features"] = str(temporary_features())  # for processes that scikit-learn starts
        if "classifier_" in state:  # without its backbone, which is loaded again
            classifier = copy.copy(self.classifier_)
            state["_fingerprint"] = classifier.backbone.fingerprint
            classifier.backbone = None  # type: ignore[assignment]
            state["classifier_"] = classifier
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        folder, fingerprint = state.pop("_features", None), state.pop("_fingerprint", None)
        super().__setstate__(state)
        if folder is not None:
            share_features(Path(folder))
        if fingerprint is not None:
            self.classifier_.backbone = self._backbone()
            if self.classifier_.backbone.fingerprint != fingerprint:
                raise ArtifactError(
                    f"this estimator was fitted on another backbone than {self.classifier_.backbone.name} is here "
                    f"(fingerprint {fingerprint[:12]}, here {self.classifier_.backbone.fingerprint[:12]}); expected "
                    "the same files, dtype and versions; fit it again"
                )

    def _examples(self, rows: Rows) -> list[Example]:
        if isinstance(rows, np.ndarray):
            if rows.ndim != 1:
                raise DataError(
                    f"X is an array of {rows.ndim} dimensions; expected rows with the columns {self.image_column!r} "
                    f"and {self.text_column!r}: a DataFrame, or a list of dicts"
                )
            rows = rows.tolist()
        elif _is_series(rows):
            rows = list(rows)
        if isinstance(rows, (list, tuple)) and rows and all(map(_is_picture, rows)):
            if self.text is None:
                raise DataError(
                    f"X holds {len(rows):,} of type {type(rows[0]).__name__}; expected a DataFrame or dicts with "
                    f"{self.image_column!r} and {self.text_column!r}; if these are pictures, give text= for all"
                )
            rows = [{self.image_column: picture} for picture in rows]
        return load_examples(
            rows,
            image_column=self.image_column,
            text_column=self.text_column,
            text=self.text,
            read_labels=False,
        )

    def _classes_of(self, y: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.intp]]:
        """Return the two classes, sorted, and the number of the class of each row."""
        if y is None:
            raise DataError(
                "requires y to be passed, but the target y is None; give the label of each row, such as "
                'fit(frame, frame["label"])'
            )
        labels = validate_data(self, y=_plain_labels(y))
        check_classification_targets(labels)
        if (kind := type_of_target(labels, input_name="y")) != "binary":
            raise DataError(
                f"Only binary classification is supported. The type of the target is {kind}: "
                f"{first_of([shown(label) for label in np.unique(labels).tolist()])}; expected two classes"
            )
        classes, encoded = np.unique(labels, return_inverse=True)
        if len(classes) == 1:
            raise DataError(f"y holds one class only, {shown(classes.tolist()[0])}; expected rows of two classes")
        return classes, encoded

    def _config(self, classes: npt.NDArray[Any]) -> TrainConfig:
        given: dict[str, Any] = {
            "taps": _listed(self.taps),
            "heads": _listed(self.heads),
            "objective": self.objective,
            "class_weight": self.class_weight,
            "folds": self.folds,
            "seed": self.random_state,
        }
        if self.random_state is None or not isinstance(self.random_state, (int, np.integer)):
            given["seed"] = int(check_random_state(self.random_state).randint(2**31 - 1))
        if isinstance(self.class_weight, Mapping):
            numbers = {label: number for number, label in enumerate(classes.tolist())}
            if set(self.class_weight) != set(numbers):
                raise ConfigError(
                    f"class_weight is for {first_of([shown(one) for one in self.class_weight])}; expected a weight for "
                    f"each class of y: {first_of([shown(one) for one in numbers])}"
                )
            given["class_weight"] = {numbers[label]: weight for label, weight in self.class_weight.items()}
        options = dict(self.options or {})
        if twice := given.keys() & options.keys():
            raise ConfigError(f"options has {min(twice)!r}, a parameter of its own; give it there")
        try:
            return TrainConfig(**given, **options)
        except TypeError as error:
            raise ConfigError(f"options: {error}; expected names of TrainConfig") from None

    def _backbone(self) -> Backbone:
        if isinstance(self.model, Backbone):
            return self.model
        return shared_backbone(
            os.fspath(self.model),
            device=self.device,
            dtype=self.dtype,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            revision=self.revision,
            quantization=self.quantization,
        )

    def _store(self) -> FeatureStore:
        return FeatureStore(temporary_features() if self.features is None else self.features)

    def _read_taps(self, backbone: Backbone) -> list[Tap]:
        """Return the taps at which features are kept: the same for all values of `taps` among those of "auto"."""
        return list(dict.fromkeys([*candidate_taps("auto", backbone), *candidate_taps(_listed(self.taps), backbone)]))

    def _note_columns(self, rows: Rows) -> None:
        columns = getattr(rows, "columns", None)
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)
        if columns is not None:
            self.feature_names_in_ = np.array([str(name) for name in columns], dtype=object)
            self.n_features_in_ = len(self.feature_names_in_)


def _weighted(
    examples: Sequence[Example], sample_weight: Any, config: TrainConfig
) -> tuple[list[Example], TrainConfig]:
    """Give examples their weights, in a column."""
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (len(examples),):
        raise DataError(
            f"sample_weight has shape {weights.shape}; expected ({len(examples)},), one weight for each row of X"
        )
    if not weights.any():
        raise DataError("sample_weight is zero in every row; expected some above zero")
    if config.weight_column:
        raise ConfigError(
            f"sample_weight beside options weight_column={config.weight_column!r}; expected weights from one place; "
            "leave one out"
        )
    weighted = [
        replace(row, fields={**row.fields, _WEIGHTS: weight})
        for row, weight in zip(examples, weights.tolist(), strict=True)
    ]
    return weighted, replace(config, weight_column=_WEIGHTS)


def _plain_labels(y: Any) -> Any:
    """Return labels as a list where they are Python's objects, such as in a column of a DataFrame; else unchanged.

    NumPy would turn a missing one among words into the word "nan", and numbers among words into words.

    Raises:
        DataError: One is missing, or numbers stand among words.
    """
    if _is_series(y):
        y = y.to_list()
    elif isinstance(y, np.ndarray) and y.dtype == object:
        y = y.tolist()
    if isinstance(y, (list, tuple)):
        missing = [row for row, label in enumerate(y) if plain_value(label) is None]
        if missing:
            raise DataError(
                f"Input y contains NaN, None or NA in row {first_of(missing)}; expected a label in each row; leave "
                "such rows out"
            )
        words = sum(isinstance(label, str) for label in y)
        if 0 < words < len(y):
            raise DataError(f"y holds {words:,} words among {len(y):,} labels; expected words only, or numbers only")
    return y


def _names_of(classes: Iterable[Any]) -> tuple[str, str]:
    negative, positive = (label_text(label) or str(label) for label in np.asarray(classes).tolist())
    return negative, positive


def _listed(names: str | Tap | Sequence[str | Tap]) -> str:
    return ",".join(map(str, names)) if isinstance(names, (list, tuple, np.ndarray)) else str(names)


def _log_odds(probability: npt.NDArray[np.float64] | np.float64) -> npt.NDArray[np.float64]:
    clipped = np.clip(probability, _SMALLEST, 1 - _SMALLEST)
    odds: npt.NDArray[np.float64] = np.log(clipped / (1 - clipped))
    return odds


def _is_picture(row: object) -> bool:
    return isinstance(row, (str, os.PathLike, bytes, Image.Image))


def _is_series(rows: object) -> bool:
    return type(rows).__name__ == "Series" and type(rows).__module__.partition(".")[0] in ("pandas", "polars")
