"""A walk through the original API: predict, train in two stages, save and load.

python example_usage.py                  # offline, on the built-in backbone, about a minute
python example_usage.py --model Qwen/Qwen2.5-VL-3B-Instruct
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score

from qwen2_5_vl_classifier import Qwen2_5_VLForBinaryClassification, Qwen2_5_VLTrainer
from qwen_vl_classifier import Example, QwenVLClassifierError, load_examples
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.scenes.statements import write_dataset

BATCH_SIZE = 16


def run_epochs(trainer: Qwen2_5_VLTrainer, examples: list[Example], epochs: int) -> None:
    """Train for some epochs and print the mean loss of each."""
    order = np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        losses = []
        shuffled = order.permutation(len(examples))
        for rows in np.array_split(shuffled, len(examples) // BATCH_SIZE):
            batch = trainer.model.collate([examples[row] for row in rows])
            losses.append(trainer.train_step(batch))
        print(f"   epoch {epoch}: mean loss {np.mean(losses):.4f}")


def accuracy(model: Qwen2_5_VLForBinaryClassification, examples: list[Example]) -> float:
    """Return the share of right answers."""
    predicted = [model.predict(example.images[0], example.text) for example in examples]
    return float(accuracy_score([example.label for example in examples], predicted))


def walk(model_name: str, folder: Path) -> None:
    """Show everything, one step after the other."""
    torch.manual_seed(0)
    print(f"1. Load {model_name} and put a fresh classifier on it")
    model = Qwen2_5_VLForBinaryClassification(model_name=model_name)
    parameters = sum(parameter.numel() for parameter in model.classifier.parameters())
    print(
        f"   {model.backbone.family.name}, hidden size {model.backbone.hidden_size}; classifier of {parameters} weights"
    )

    print("2. Make data: pictures of shapes, and whether a statement about them is true")
    training = load_examples(write_dataset(folder, name="train", scenes=80, per_scene=2, kinds=("existence",)))
    test = load_examples(write_dataset(folder, name="test", seed=1, scenes=40, per_scene=2, kinds=("existence",)))
    print(f"   {len(training)} rows to train on, {len(test)} to test on")

    print("3. Predict with the untrained classifier")
    image, text = open_image(test[0].images[0]), test[0].text
    print(f"   {text!r}: class {model.predict(image, text, return_probs=False)}")
    probabilities = model.predict(image, text, return_probs=True)
    print(f"   probabilities {probabilities[0]:.3f} and {probabilities[1]:.3f}")

    print("4. Stage 1: the base model is frozen, learning rate 1e-3")
    model.freeze_base_model()
    run_epochs(Qwen2_5_VLTrainer(model, learning_rate=1e-3), training, epochs=4)
    print(f"   accuracy {accuracy(model, test):.3f}")

    print("5. Save the classifier, and load it into another model")
    weights = folder / "my_classifier.pth"
    model.save_classifier_weights(weights)
    restored = Qwen2_5_VLForBinaryClassification(model_name=model_name)
    restored.load_pretrained_weights(weights)
    same = restored.predict(image, text, return_probs=True) == model.predict(image, text, return_probs=True)
    print(f"   same probabilities: {same}")

    print("6. Stage 2: the whole model, learning rate 1e-5")
    restored.unfreeze_base_model()
    run_epochs(Qwen2_5_VLTrainer(restored, learning_rate=1e-5), training, epochs=1)
    print(f"   accuracy {accuracy(restored, test):.3f}")

    print("7. A batch that does not fit together is refused, and nothing is changed")
    batch = restored.collate(training[:2])
    del batch["image_grid_thw"]
    try:
        Qwen2_5_VLTrainer(restored, learning_rate=1e-5).train_step(batch)
    except QwenVLClassifierError as error:
        print(f"   {error}")


def main() -> int:
    """Run the walk; an expected error is one line."""
    parser = argparse.ArgumentParser(description="A walk through the original API.")
    parser.add_argument(
        "--model", default="builtin:tiny", help="hub name, local folder or builtin:tiny (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            walk(options.model, Path(folder))
    except QwenVLClassifierError as error:
        print(f"example_usage.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
