"""Five checks of the original API, as a script and under pytest.

python test_classifier.py                  # offline, on the built-in backbone
python test_classifier.py --model NAME     # on any other: a hub name or a local folder
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from qwen2_5_vl_classifier import Qwen2_5_VLForBinaryClassification, Qwen2_5_VLTrainer
from qwen_vl_classifier import QwenVLClassifierError, load_examples
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.scenes.statements import write_dataset

MODEL = os.environ.get("QWEN_VL_CLASSIFIER_TEST_MODEL", "builtin:tiny")


def make_model() -> Qwen2_5_VLForBinaryClassification:
    """Load the model under test."""
    return Qwen2_5_VLForBinaryClassification(model_name=MODEL)


def test_initialisation() -> None:
    """The model has the original architecture: Linear(hidden, 512), ReLU, Dropout(0.1), Linear(512, 2)."""
    model = make_model()
    first, activation, dropout, last = model.classifier
    assert (first.in_features, first.out_features) == (model.backbone.hidden_size, 512)
    assert isinstance(activation, torch.nn.ReLU)
    assert dropout.p == 0.1
    assert (last.in_features, last.out_features) == (512, 2)


def test_prediction() -> None:
    """Pictures on disk give a class, and two probabilities that add up to 1."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        for example in load_examples(write_dataset(folder, scenes=3, per_scene=1)):
            image = open_image(example.images[0])
            label = model.predict(image, example.text)
            probabilities = model.predict(image, example.text, return_probs=True)
            assert label in (0, 1)
            assert len(probabilities) == 2
            assert abs(sum(probabilities) - 1) < 1e-6
            assert label == int(probabilities[1] >= probabilities[0])


def test_weights() -> None:
    """Weights that were saved give the same probabilities in another model."""
    first, second = make_model(), make_model()
    with tempfile.TemporaryDirectory() as folder:
        (example,) = load_examples(write_dataset(folder, scenes=1, per_scene=1))
        image = open_image(example.images[0])
        wanted = first.predict(image, example.text, return_probs=True)
        assert second.predict(image, example.text, return_probs=True) != wanted
        for name in ("my_classifier.pth", "my_classifier.safetensors"):
            path = Path(folder) / name
            first.save_classifier_weights(path)
            third = make_model()
            third.load_pretrained_weights(path)
            assert third.predict(image, example.text, return_probs=True) == wanted


def test_freezing() -> None:
    """Frozen, exactly the classifier's parameters train; unfrozen, all do."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        batch = model.collate(load_examples(write_dataset(folder, scenes=2, per_scene=1)))
        model.freeze_base_model()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
        Qwen2_5_VLTrainer(model, learning_rate=1e-4).train_step(batch)
        assert all(parameter.grad is None for parameter in model.base_model.parameters())
        assert all(parameter.grad is not None for parameter in model.classifier.parameters())
        model.unfreeze_base_model()
        assert all(parameter.requires_grad for parameter in model.parameters())
        Qwen2_5_VLTrainer(model, learning_rate=1e-5).train_step(batch)
        assert any(parameter.grad is not None for parameter in model.base_model.parameters())


def test_demo_data() -> None:
    """The demo data set is pictures and a JSONL file, with both labels."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_dataset(folder, scenes=20, per_scene=2)
        examples = load_examples(path, require_labels=True)
        assert len(examples) == len(path.read_text(encoding="utf-8").splitlines())
        assert {example.label for example in examples} == {0, 1}
        assert len(list((Path(folder) / "images").glob("*.png"))) == 20


CHECKS: dict[str, Callable[[], None]] = {
    "initialisation": test_initialisation,
    "prediction on real pictures": test_prediction,
    "saving and loading of weights": test_weights,
    "freezing and unfreezing": test_freezing,
    "making a demo data set": test_demo_data,
}


def main() -> int:
    """Run the checks and say how each went."""
    global MODEL
    parser = argparse.ArgumentParser(description="Five checks of the original API.")
    parser.add_argument("--model", default=MODEL, help="hub name, local folder or builtin:tiny (default: %(default)s)")
    MODEL = parser.parse_args().model
    failed = 0
    for number, (name, check) in enumerate(CHECKS.items(), start=1):
        try:
            check()
        except QwenVLClassifierError as error:
            failed += 1
            print(f"{number}. {name}: FAILED: {error}")
        except Exception:
            failed += 1
            print(f"{number}. {name}: FAILED")
            traceback.print_exc()
        else:
            print(f"{number}. {name}: passed")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed on {MODEL}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
