"""Fixtures of the tests of serving: a service that needs no files, and a pass under their control."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from qwen_vl_classifier import Classifier, Panel, ServeConfig
from qwen_vl_classifier.serving import decoding_process
from qwen_vl_classifier.serving import service as service_module
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import (
    Gate,
    Score,
)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier) -> ServeConfig:
    """A configuration whose classifiers are there at once: one in memory for each name."""

    def load(config: ServeConfig) -> Panel:
        return Panel([tiny_classifier] * len(config.classifiers))

    monkeypatch.setattr(service_module, "_load_panel", load)
    return ServeConfig(classifiers=("claims",))


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], None]:
    """Return a function that puts another in the place of the model."""

    def replace(score: Score) -> None:
        monkeypatch.setattr(Service, "_score", staticmethod(score))

    return replace


@pytest.fixture
def gate(loaded: ServeConfig, scoring: Callable[[Score], None]) -> Iterator[Gate]:
    gate = Gate()
    scoring(gate)
    yield gate
    gate.open.set()


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that decode do what the pictures say."""
    monkeypatch.setattr(decoding_process, "CHILD", "tests.serving.hostile_child")
