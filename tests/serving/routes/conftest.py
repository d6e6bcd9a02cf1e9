"""One application for all tests of routes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen_vl_classifier import Classifier, ServeConfig
from tests.serving.house import NAMES, House, living, save_two


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[House]:
    """Two classifiers, called first and second, behind an application."""
    folder = tmp_path_factory.mktemp("house")
    classifiers = save_two(folder, tiny_classifier)
    config = ServeConfig(classifiers=tuple(str(folder / name) for name in NAMES), device="cpu", max_items=16)
    with living(config) as client:
        yield House(client, classifiers, config)
