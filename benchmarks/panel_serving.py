"""Measure what a panel of 100 labels costs in `serve` against one label: they share the pass of a request.

    python benchmarks/panel_serving.py            # prints requests a second, and their ratio

One application serves both, in this process and without sockets. Clients take turns between them, every text is another
one, so that nothing is kept, and half of the requests hold a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Panel, ServeConfig, Tap, create_app
from qwen_vl_classifier.classifier.head import HeadSpec

_TAPS = (Tap(-1, "mean"), Tap(3, "mean"), Tap(2, "last"))


def save(folder: Path, name: str, labels: int, backbone: Backbone) -> Path:
    """Save a panel of untrained heads at three taps; the first, deepest one is that of a single label."""
    spec = HeadSpec("linear", backbone.hidden_size)
    classifiers = [Classifier(backbone, _TAPS[number % 3], spec.build(), spec) for number in range(labels)]
    return Panel(classifiers, names=[f"label {number}" for number in range(labels)]).save(folder / name)


def bodies(items: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the examples of one request after the other, no two alike."""
    pixels = np.random.default_rng(0)
    for number in count():
        stream = io.BytesIO()
        Image.fromarray(pixels.integers(0, 255, (112, 112, 3), dtype=np.uint8)).save(stream, "PNG")
        image = base64.b64encode(stream.getvalue()).decode() if number % 2 else None
        yield [{"image": image, "text": f"Statement {number}, example {item}."} for item in range(items)]


async def measure(client: httpx.AsyncClient, model: str, requests: list[list[dict[str, Any]]], clients: int) -> float:
    """Return how many requests are answered in a second."""
    waiting = iter(requests)

    async def call() -> None:
        for items in waiting:
            answer = await client.post("/v1/classify", json={"model": model, "input": items})
            answer.raise_for_status()

    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(clients)))
    return len(requests) / (time.perf_counter() - started)


async def run(options: argparse.Namespace) -> None:
    """Serve both, measure in turns and print."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        backbone = Backbone.load(options.model)
        folders = [save(Path(place), f"panel{labels}", labels, backbone) for labels in (1, options.labels)]
        app = create_app(ServeConfig(classifiers=tuple(map(str, folders)), deadline=300.0))
        examples = bodies(options.items)
        async with app.router.lifespan_context(app):
            while app.state.service.state in ("loading", "warming"):
                await asyncio.sleep(0.1)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300.0) as client:
                found: dict[str, list[float]] = {folder.name: [] for folder in folders}
                for turn in range(options.repeats + 1):
                    for name, rates in found.items():
                        requests = [next(examples) for _ in range(options.requests)]
                        rate = await measure(client, name, requests, options.clients)
                        if turn:  # the first one warms up
                            rates.append(rate)
    one, many = (np.array(rates) for rates in found.values())
    ratios = many / one
    print(
        json.dumps(
            {
                "labels": options.labels,
                "requests_a_second": [round(float(np.median(one)), 1), round(float(np.median(many)), 1)],
                "ratio": round(float(np.median(ratios)), 3),
                "ratios": [round(float(ratio), 3) for ratio in ratios],
            }
        )
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--labels", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="in one turn (default: %(default)s)")
    parser.add_argument("--items", type=int, default=1, help="examples of a request (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at the same time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
