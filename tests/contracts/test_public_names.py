"""The public surface, name by name and parameter by parameter."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import qwen2_5_vl_classifier
import qwen_vl_classifier
from qwen_vl_classifier.extras import install_command

NAMES = {
    "Example",
    "Prediction",
    "PanelPrediction",
    "load_examples",
    "Backbone",
    "Tap",
    "FeatureStore",
    "extract_features",
    "Classifier",
    "Panel",
    "VLClassifier",
    "train",
    "train_panel",
    "TrainConfig",
    "finetune",
    "FinetuneConfig",
    "evaluate",
    "evaluate_panel",
    "EvaluateConfig",
    "compare",
    "explain",
    "write_report",
    "score",
    "export",
    "ScoreConfig",
    "create_app",
    "ServeConfig",
    "QwenVLClassifierError",
}

PARAMETERS = {
    "Example": ("image", "text", "label", "id"),
    "Tap": ("layer", "pooling"),
    "Prediction": ("label", "probability", "decision"),
    "Backbone.load": ("name", "device", "dtype", "num_layers", "min_pixels", "max_pixels", "revision"),
    "Backbone.encode": ("self", "examples", "taps", "token_budget", "share_prefixes"),
    "FeatureStore": ("folder",),
    "extract_features": ("examples", "backbone", "taps", "store", "progress"),
    "train": ("train_examples", "validation", "backbone", "config", "store"),
    "PanelPrediction": ("labels", "label_name", "probability"),
    "train_panel": ("rows", "validation", "labels", "one_of", "backbone", "config", "store"),
    "Classifier.load": ("folder",),
    "Classifier.save": ("self", "folder"),
    "Classifier.zero_shot": ("backbone", "yes", "no"),
    "Classifier.predict_proba": ("self", "examples"),
    "Classifier.predict": ("self", "examples"),
    "Classifier.decide": ("self", "examples"),
    "Panel.load": ("folders",),
    "VLClassifier": ("model", "taps", "heads", "features"),
    "VLClassifier.fit": ("self", "X", "y", "sample_weight"),
    "VLClassifier.predict_proba": ("self", "X"),
    "evaluate": ("classifier", "examples"),
    "evaluate_panel": ("panel", "examples"),
    "write_report": ("evaluation", "folder"),
    "export": ("classifier", "folder", "to"),
}

EXTRAS = (
    *("fastapi", "starlette", "uvicorn", "prometheus_client", "multipart"),
    *("accelerate", "peft", "bitsandbytes", "kornia", "matplotlib", "fsspec", "ray", "datasets", "pandas", "polars"),
    "fla",
)
"""Modules that an installation without extras lacks."""

ORIGINAL = {
    "Qwen2_5_VLForBinaryClassification": ("model_name",),
    "Qwen2_5_VLForBinaryClassification.freeze_base_model": ("self",),
    "Qwen2_5_VLForBinaryClassification.unfreeze_base_model": ("self",),
    "Qwen2_5_VLForBinaryClassification.predict": ("self", "image", "text", "return_probs"),
    "Qwen2_5_VLForBinaryClassification.save_classifier_weights": ("self", "path"),
    "Qwen2_5_VLForBinaryClassification.load_pretrained_weights": ("self", "path"),
    "Qwen2_5_VLTrainer": ("model", "learning_rate"),
    "Qwen2_5_VLTrainer.train_step": ("self", "batch"),
}


def parameters(module: object, dotted: str) -> tuple[str, ...]:
    """Return the names of the parameters of something public."""
    found = module
    for part in dotted.split("."):
        found = getattr(found, part)
    return tuple(inspect.signature(found).parameters)


def test_exactly_these_names_are_public():
    assert set(qwen_vl_classifier.__all__) - {"__version__"} == NAMES
    assert sorted(qwen_vl_classifier.__all__) == sorted(dir(qwen_vl_classifier))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_resolves_and_is_documented(name):
    assert inspect.getdoc(getattr(qwen_vl_classifier, name))


@pytest.mark.soak
def test_all_names_are_imported_without_optional_dependencies():
    code = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # as if it were not installed
from qwen_vl_classifier import *
print(*sorted({NAMES!r} - globals().keys()))
try:
    from qwen_vl_classifier import create_app
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "create_app",
        f"fastapi is not installed; run: {install_command('serve')}",
    ], done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        qwen_vl_classifier.no_such_name  # noqa: B018


@pytest.mark.parametrize("dotted", PARAMETERS)
def test_parameters_stay(dotted):
    """Later parameters may be added; those promised stay, in their order."""
    seen = parameters(qwen_vl_classifier, dotted)
    assert seen[: len(PARAMETERS[dotted])] == PARAMETERS[dotted]


@pytest.mark.parametrize("dotted", ORIGINAL)
def test_parameters_of_the_original_api_stay(dotted):
    seen = parameters(qwen2_5_vl_classifier, dotted)
    assert seen[: len(ORIGINAL[dotted])] == ORIGINAL[dotted]


def test_classes_are_zero_and_one():
    assert list(qwen_vl_classifier.Classifier.classes_) == [0, 1]


def test_every_error_is_of_the_one_tree_and_of_a_builtin():
    from qwen_vl_classifier import errors

    tree = [item for item in vars(errors).values() if inspect.isclass(item) and item.__module__ == errors.__name__]
    for item in tree:
        assert issubclass(item, errors.QwenVLClassifierError)
        if item is not errors.QwenVLClassifierError:
            builtins = [base for base in item.__mro__ if base.__module__ == "builtins"]
            assert builtins[0] not in (Exception, object), f"{item.__name__} subclasses no fitting built-in"
        assert item.__name__ in (errors.__doc__ or ""), f"{item.__name__} is not in the drawing"
