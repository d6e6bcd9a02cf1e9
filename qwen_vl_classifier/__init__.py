"""Turn a Qwen vision-language model into a trustworthy binary classifier of image + text.

    from qwen_vl_classifier import Backbone, Classifier, load_examples, train

    backbone = Backbone.load("Qwen/Qwen2.5-VL-3B-Instruct")
    result = train(load_examples("train.jsonl"), backbone=backbone)
    result.classifier.predict_proba(load_examples("dev.jsonl"))

Names are imported when they are first used: `import qwen_vl_classifier` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.backbone.taps import Tap
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel import Panel
    from qwen_vl_classifier.config.evaluate import EvaluateConfig
    from qwen_vl_classifier.config.finetune import FinetuneConfig
    from qwen_vl_classifier.config.score import ScoreConfig
    from qwen_vl_classifier.config.serve import ServeConfig
    from qwen_vl_classifier.config.train import TrainConfig
    from qwen_vl_classifier.data.example import Example, PanelPrediction, Prediction
    from qwen_vl_classifier.data.loading import load_examples
    from qwen_vl_classifier.errors import QwenVLClassifierError
    from qwen_vl_classifier.evaluation.compare import compare
    from qwen_vl_classifier.evaluation.evaluation import evaluate
    from qwen_vl_classifier.evaluation.explanation import explain
    from qwen_vl_classifier.evaluation.panels.panel_evaluation import evaluate_panel
    from qwen_vl_classifier.evaluation.report import write_report
    from qwen_vl_classifier.exporting.exported_folder import export
    from qwen_vl_classifier.features.extraction import extract_features
    from qwen_vl_classifier.features.store import FeatureStore
    from qwen_vl_classifier.scoring.run import score
    from qwen_vl_classifier.serving.app import create_app
    from qwen_vl_classifier.training.estimator import VLClassifier
    from qwen_vl_classifier.training.finetuning.finetuning import finetune
    from qwen_vl_classifier.training.probe.panel_training import train_panel
    from qwen_vl_classifier.training.probe.probe import train

__version__ = "0.1.0"

_MODULES = {
    "Backbone": "backbone.backbone",
    "Classifier": "classifier.classifier",
    "EvaluateConfig": "config.evaluate",
    "Example": "data.example",
    "FeatureStore": "features.store",
    "FinetuneConfig": "config.finetune",
    "Panel": "classifier.panel",
    "PanelPrediction": "data.example",
    "Prediction": "data.example",
    "QwenVLClassifierError": "errors",
    "ScoreConfig": "config.score",
    "ServeConfig": "config.serve",
    "Tap": "backbone.taps",
    "TrainConfig": "config.train",
    "VLClassifier": "training.estimator",
    "compare": "evaluation.compare",
    "create_app": "serving.app",
    "evaluate": "evaluation.evaluation",
    "evaluate_panel": "evaluation.panels.panel_evaluation",
    "explain": "evaluation.explanation",
    "export": "exporting.exported_folder",
    "extract_features": "features.extraction",
    "finetune": "training.finetuning.finetuning",
    "load_examples": "data.loading",
    "score": "scoring.run",
    "train": "training.probe.probe",
    "train_panel": "training.probe.panel_training",
    "write_report": "evaluation.report",
}

__all__ = [
    "Backbone",
    "Classifier",
    "EvaluateConfig",
    "Example",
    "FeatureStore",
    "FinetuneConfig",
    "Panel",
    "PanelPrediction",
    "Prediction",
    "QwenVLClassifierError",
    "ScoreConfig",
    "ServeConfig",
    "Tap",
    "TrainConfig",
    "VLClassifier",
    "__version__",
    "compare",
    "create_app",
    "evaluate",
    "evaluate_panel",
    "explain",
    "export",
    "extract_features",
    "finetune",
    "load_examples",
    "score",
    "train",
    "train_panel",
    "write_report",
]

if importlib.util.find_spec("fastapi") is None:
    __all__.remove(
        "create_app"
    )  # else `import *` fails without the extra "serve"; asked for by name, it names the extra


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First: else transformers is the one to import the bars of notebooks, and warns where they need ipywidgets.
    importlib.import_module(f"{__name__}.progress_bars")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return __all__
