"""scikit-learn's own checks of an estimator. They feed arrays of numbers, so rows of numbers become pictures here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from qwen_vl_classifier import VLClassifier

SIDE = 56  # pixels

EXPECTED_TO_FAIL = {
    "check_methods_subset_invariance": "heads compute in float32, whose last digits depend on how many rows there are; "
    "the check allows a difference of 1e-7 of log odds",
    "check_sample_weight_equivalence_on_dense_data": "its 9 distinct rows, 3 of them of one class, are too few for the "
    "cross-validation within fit",
}
CHEAP = {
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
}


class OfNumbers(VLClassifier):
    """Sees a row of numbers as a picture of squares, one for each number."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags

    def fit(self, X, y, sample_weight=None):  # noqa: N803
        numbers = validate_data(self, X, dtype="numeric")
        super().fit(drawn(numbers), y, sample_weight)
        self.n_features_in_ = numbers.shape[1]
        return self

    def predict_proba(self, X):  # noqa: N803
        check_is_fitted(self)
        return super().predict_proba(drawn(validate_data(self, X, dtype="numeric", reset=False)))


def drawn(table):
    across = math.ceil(math.sqrt(table.shape[1]))
    rows = []
    for row in table.astype(np.float64):
        squares = np.zeros((across * across, 3))
        squares[: len(row)] = np.stack([np.tanh(row / 4), np.sin(row), np.cos(row)], axis=1) + 1
        colours = (squares.reshape(across, across, 3) * 127).astype(np.uint8)
        rows.append({"image": Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.NEAREST), "text": "Low?"})
    return rows


@pytest.mark.parametrize("name", sorted(CHEAP))
def test_checks_that_fit_nothing(name):
    checks = [check for _, check in estimator_checks_generator(OfNumbers()) if name in str(check)]
    assert checks
    for check in checks:
        check(OfNumbers())


@pytest.mark.soak
@parametrize_with_checks(
    [OfNumbers(taps="mean:1", heads="linear", folds=2)], expected_failed_checks=lambda _: EXPECTED_TO_FAIL
)
def test_all_checks(estimator, check):
    check(estimator)
