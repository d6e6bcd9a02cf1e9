"""Read what a server logged and counted."""

from __future__ import annotations

import io
import json
from typing import Any

from qwen_vl_classifier.serving.observability.prometheus import Metrics


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def samples_of(metrics: Metrics) -> dict[str, float]:
    """Return every sample by its name and labels, as they stand in the text."""
    lines = metrics.exposition()[0].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
