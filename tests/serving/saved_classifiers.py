"""Saved classifiers of every kind, examples of every form, and what the ones say of the others offline."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, ServeConfig, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.serving.items import Item
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from qwen_vl_classifier.serving.service import Service
from tests import nano
from tests.serving.clock import PATIENT

NAMES = ("mean", "last", "curved", "tuned", "adapted")
"""Probes at three taps, one of them with an isotonic curve; on a fine-tuned backbone; on one with an adapter."""


def save_all(folder: Path, dtype: str = "float32") -> dict[str, Classifier]:
    """Save one classifier of every kind under its name."""
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype=dtype)
    tuned = Backbone.load("builtin:tiny", device="cpu", dtype=dtype)
    adapted = Backbone.load(nano.make_checkpoint("qwen2_5_vl", folder / "nano"), device="cpu", dtype=dtype)
    add_adapter(adapted, towers="llm", tap=Tap(3, "mean"), rank=2, alpha=4)
    with torch.no_grad():
        for name, weight in adapted.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
        for weight in tuned.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    for changed in (tuned, adapted):
        changed.model.requires_grad_(False).eval()
        changed.mark_changed()
    curve = ((0.0, 0.3, 0.6, 1.0), (0.05, 0.2, 0.7, 0.9))
    made = {
        "mean": _classifier(backbone, Tap(-1, "mean")),
        "last": _classifier(backbone, Tap(2, "last"), temperature=0.7, threshold=0.4),
        "curved": _classifier(backbone, Tap(3, "image"), isotonic=curve, abstention=(0.4, 0.6)),
        "tuned": _classifier(tuned, Tap(3, "mean")),
        "adapted": _classifier(adapted, Tap(3, "mean")),
    }
    for name, classifier in made.items():
        classifier.save(folder / name)
    shared = {"mean": backbone, "last": backbone, "curved": backbone}
    return {name: Classifier.load(folder / name, device="cpu", backbone=shared.get(name)) for name in NAMES}


def _classifier(backbone: Backbone, tap: Tap, **settings: object) -> Classifier:
    spec = HeadSpec("mlp", backbone.hidden_size, units=16)
    head = spec.build()
    torch.nn.init.normal_(head[-1].weight, std=0.5)
    return Classifier(backbone, tap, head, spec, **settings)  # type: ignore[arg-type]


def files(count: int) -> list[bytes]:
    """Return image files of several sizes and formats."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(40, 160, 2))
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        stream = io.BytesIO()
        image.save(stream, ("PNG", "WEBP", "JPEG")[number % 3])
        made.append(stream.getvalue())
    return made


def examples() -> list[Example]:
    """Return examples without pictures, with one and with several, some of them shared."""
    first, second, third, fourth = files(4)
    return [
        Example(None, "no picture at all <|image_pad|>"),
        Example(None, "\u4f60\u597d \U0001f600"),
        Example((first,), "It is red."),
        Example((first,), "The same picture, and a longer text about it. " * 3),
        Example((second,), "It is red."),
        Example((first, second), "a pair"),
        Example((second, first), "a pair"),
        Example((third, third), "twice the same"),
        Example((fourth,), "There is 1 tower with at least 2 yellow blocks."),
        Example((first, second, third), "three of them"),
    ]


def item_of(example: Example, *, uploaded: bool = False) -> Item:
    """Item about an example as a request does: with pictures in base64, or as files."""
    data = [picture for picture in example.images if isinstance(picture, bytes)]
    return Item(example.text, tuple(data) if uploaded else tuple(base64.b64encode(file).decode() for file in data))


@contextlib.asynccontextmanager
async def ready(config: ServeConfig) -> AsyncIterator[Service]:
    """Load a service, and close it in the end."""
    failures: list[Exception] = []
    service = Service(config, metrics=Metrics(), on_failure=failures.append)
    await service.load()
    assert not failures, failures
    assert service.state == "ready"
    try:
        yield service
    finally:
        await service.close()


def config_of(folder: Path, names: Sequence[str] = NAMES, **options: object) -> ServeConfig:
    """Return how to serve saved classifiers."""
    classifiers = tuple(str(folder / name) for name in names)
    return ServeConfig(classifiers=classifiers, device="cpu", **PATIENT, **options)  # type: ignore[arg-type]
