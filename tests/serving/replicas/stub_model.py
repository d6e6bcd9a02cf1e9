"""A process that serves without torch: what is said of a text is a number made of its letters."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.serving.http import server
from qwen_vl_classifier.serving.models import registry
from qwen_vl_classifier.serving.models.model_set import ModelSet, Version
from qwen_vl_classifier.serving.replicas import replica
from tests.waiting import LIMIT

HANGING = "a text over which the model hangs"


def probability(text: str) -> float:
    return sum(map(ord, text)) % 100 / 100


class StubProcessor:
    """Makes texts ready."""

    def join_pictures(self, pictures: Any) -> Any:
        return pictures

    def encode(self, example: Any, pictures: Any) -> Any:
        nothing = SimpleNamespace(key="")
        return SimpleNamespace(ids=[1] * 8, text=example.text, pictures=nothing, prefix_key="", prefix_length=0)


class StubPanel:
    """What a service asks of the classifiers of a backbone."""

    def __init__(self, names: Any) -> None:
        backbone = SimpleNamespace(family=SimpleNamespace(model_type="stub"), fingerprint="f" * 64)
        model = SimpleNamespace(
            backbone=backbone,
            tap="mean:-1",
            spec=SimpleNamespace(kind="linear"),
            label_names=("no", "yes"),
            threshold=0.5,
            abstention=None,
            training={},
            training_text=None,
            decision_of=lambda value: Prediction(value >= 0.5, value, ("no", "yes")[value >= 0.5]),
        )
        self.classifiers = dict.fromkeys(names, model)
        self.saved: dict[str, Any] = {}
        self.backbone = backbone
        self.processor = StubProcessor()

    def has(self, name: str) -> bool:
        return name in self.classifiers

    def score(self, scorings: Any) -> Any:
        if any(example.text == HANGING for example, _ in scorings):
            threading.Event().wait()
        return [
            {name: (1 - probability(example.text), probability(example.text)) for name in names}
            for example, names in scorings
        ]

    def score_example(self, _example: Any, names: Any) -> Any:
        return dict.fromkeys(names, (0.5, 0.5))


def load(_served: ModelSet, folders: Any, _config: Any) -> tuple[ModelSet, dict[str, Exception]]:
    fault = os.environ.get("STUB_LOAD", "")
    if fault == "refuse":
        return ModelSet(), dict.fromkeys(folders, ArtifactError("claims: no classifier here; give one that is"))
    if fault == "fail":
        raise LookupError("a defect of loading")
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return ModelSet([StubPanel(folders)], dict.fromkeys(folders, Version("0123456789ab", 0))), {}  # type: ignore[list-item]


if __name__ == "__main__":
    server._TRANSIT_SECONDS = server._CLOSE_SECONDS = server._EXIT_SECONDS = LIMIT
    if "real" not in sys.argv:
        registry._load = load
    replica.main()
