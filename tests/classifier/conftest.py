"""A saved classifier to read, to change and to replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_vl_classifier.classifier.artifact import write_manifest
from tests.classifier.saved_folder import MANIFEST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved classifier, without its backbone."""
    written = tmp_path / "saved"
    written.mkdir()
    write_manifest(written, MANIFEST, MANIFEST.head.build().state_dict())
    return written
