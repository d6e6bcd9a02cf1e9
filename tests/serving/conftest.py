"""Fixtures of the tests of serving: a service that needs no files, and a pass under their control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_vl_classifier import Classifier, ServeConfig
from qwen_vl_classifier.serving import decoding_process
from qwen_vl_classifier.serving import service as service_module
from qwen_vl_classifier.serving.models import registry
from qwen_vl_classifier.serving.models.model_set import ModelSet, Version
from qwen_vl_classifier.serving.models.panels import Probabilities, Scoring, ServedPanel
from tests.serving.batch_scorer import Scorer
from tests.serving.client import DecoderHere, Gate, Score
from tests.serving.clock import PATIENT
from tests.serving.served import NAMES, Served, ready_client, save_two


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier) -> ServeConfig:
    """A configuration whose classifiers are there at once: one in memory for each name; pictures are decoded here."""

    def load(_: ModelSet, folders: Mapping[str, Path], _config: ServeConfig) -> tuple[ModelSet, dict[str, Exception]]:
        versions = dict.fromkeys(folders, Version("0123456789ab", 1_800_000_000))
        return ModelSet([ServedPanel(dict.fromkeys(folders, tiny_classifier))], versions), {}

    monkeypatch.setattr(registry, "_load", load)
    monkeypatch.setattr(service_module, "DecoderPool", DecoderHere)
    return ServeConfig(classifiers=("claims",), **PATIENT)


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], None]:
    """Return a function that puts another in the place of the model; the first pass, which warms up, is left out."""

    async def no_pass(*_: Any) -> dict[str, Exception]:
        return {}

    def replace(score: Score) -> None:
        def answers(group: ServedPanel, questions: Sequence[Scoring]) -> list[Probabilities]:
            words = []
            for example, _ in questions:
                start, end = example.spans.text
                words.append(group.processor.tokenizer.decode(example.ids[start:end]))
            said = zip(questions, score(words), strict=True)
            return [dict.fromkeys(names, (1 - probability, probability)) for (_, names), probability in said]

        monkeypatch.setattr(ServedPanel, "score", answers)
        monkeypatch.setattr(registry.Registry, "_warm_up", no_pass)

    return replace


@pytest.fixture
def gate(loaded: ServeConfig, scoring: Callable[[Score], None]) -> Iterator[Gate]:
    gate = Gate()
    scoring(gate)
    yield gate
    gate.open.set()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[Served]:
    """Two classifiers, called first and second, behind an application."""
    folder = tmp_path_factory.mktemp("served")
    classifiers = save_two(folder, tiny_classifier)
    config = ServeConfig(classifiers=tuple(str(folder / name) for name in NAMES), device="cpu", max_items=16, **PATIENT)
    with ready_client(config) as client:
        yield Served(client, classifiers, config)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that decode do what the pictures say."""
    monkeypatch.setattr(decoding_process, "CHILD", "tests.serving.hostile_child")


@pytest.fixture
def shut() -> Iterator[Scorer]:
    """A scorer that holds its first call until its gate opens."""
    scorer = Scorer(shut=True)
    yield scorer
    scorer.gate.set()
