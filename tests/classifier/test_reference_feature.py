"""Of versions of libraries, numbers decide: whether the backbone computes here what it did when it was saved."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.checkpoint import fingerprint
from qwen_vl_classifier.classifier import own_backbone
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import ArtifactError

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example(None, "one"), Example(None, "another")]


@pytest.fixture
def checkpoint(kind_checkpoint, tmp_path) -> Path:
    return shutil.copytree(kind_checkpoint[1], tmp_path / "checkpoint")


@pytest.fixture
def classifier(checkpoint) -> Classifier:
    backbone = Backbone.load(checkpoint, device="cpu", dtype="float32")
    spec = HeadSpec("linear", backbone.hidden_size)
    torch.manual_seed(0)
    return Classifier(backbone, Tap(2, "mean"), spec.build(), spec)


@pytest.fixture
def saved(classifier, tmp_path) -> Path:
    return classifier.save(tmp_path / "saved")


@pytest.fixture
def next_major(monkeypatch, saved) -> str:
    """A later version of transformers, as far as the fingerprint can tell."""
    for module in (fingerprint, own_backbone):
        monkeypatch.setattr(module.transformers, "__version__", "6.1.0")
    return "6.1.0"


def refusal(saved: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Classifier.load(saved, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keep(saved: Path, change) -> None:
    """Change what is kept of the feature: `None` takes it away."""
    content = json.loads((saved / "classifier.json").read_text())
    if change is None:
        del content["reference"]
    else:
        feature = np.frombuffer(base64.b64decode(content["reference"]["feature"]), dtype="<f4")
        content["reference"]["feature"] = base64.b64encode(change(feature).tobytes()).decode()
    (saved / "classifier.json").write_text(json.dumps(content))


def test_another_major_version_that_computes_the_same_loads(classifier, saved, next_major):
    loaded = Classifier.load(saved, device="cpu")
    assert loaded.backbone.fingerprint != json.loads((saved / "classifier.json").read_text())["backbone"]["fingerprint"]
    np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), classifier.predict_proba(EXAMPLES))


def test_one_that_computes_something_else_is_refused_with_numbers(saved, next_major):
    keep(saved, lambda feature: feature * np.float32(1.25))
    message = refusal(saved)
    assert "differs by 0.2 of its length, expected at most 0.005" in message
    assert next_major in message
    keep(saved, lambda feature: feature * np.float32("nan"))
    assert "differs by nan" in refusal(saved)


@pytest.mark.parametrize("change", ["weights", "config", "tokeniser", "prompt", "pictures"])
def test_what_no_version_changes_is_as_strict_as_ever(checkpoint, saved, next_major, change):
    if change == "weights":
        weights = load_file(checkpoint / "model.safetensors")
        next(iter(weights.values())).add_(1e-6)
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    elif change == "prompt" and (checkpoint / "chat_template.jinja").exists():
        template = checkpoint / "chat_template.jinja"
        template.write_text("{% if false %}{% endif %}" + template.read_text())
    elif change == "prompt" and (checkpoint / "chat_template.json").exists():
        edit(checkpoint / "chat_template.json", "chat_template", lambda text: "{% if false %}{% endif %}" + text)
    elif change == "prompt":
        edit(checkpoint / "tokenizer_config.json", "chat_template", lambda text: "{% if false %}{% endif %}" + text)
    elif change == "tokeniser":
        edit(checkpoint / "tokenizer.json", "model", lambda model: model | {"merges": model["merges"][:-1]})
    elif change == "config":
        edit(checkpoint / "config.json", "pad_token_id", lambda _: 0)
    else:
        edit(checkpoint / "preprocessor_config.json", "image_mean", lambda _: [0.5, 0.5, 0.49])
    assert "fingerprint" in refusal(saved)


def test_without_a_kept_feature_the_version_decides(saved, next_major):
    keep(saved, None)
    assert "the major version of transformers" in refusal(saved)


def test_a_damaged_one_is_none(saved, next_major):
    keep(saved, lambda feature: feature[:-1])
    assert "the major version of transformers" in refusal(saved)


def test_it_is_read_only_where_it_is_needed(classifier, saved):
    keep(saved, None)
    np.testing.assert_array_equal(
        Classifier.load(saved, device="cpu").predict_proba(EXAMPLES), classifier.predict_proba(EXAMPLES)
    )


def test_a_copy_of_the_checkpoint_is_the_same_content(checkpoint, classifier, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert Backbone.load(copy, device="cpu", dtype="float32").content == classifier.backbone.content


def edit(path: Path, key: str, change) -> None:
    content = json.loads(path.read_text())
    content[key] = change(content.get(key))
    path.write_text(json.dumps(content))
