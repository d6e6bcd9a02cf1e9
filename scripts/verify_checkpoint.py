"""Compare a checkpoint's features with transformers' own, and print a table to paste into an issue.

    python scripts/verify_checkpoint.py Qwen/Qwen2.5-VL-3B-Instruct
    python scripts/verify_checkpoint.py FOLDER --device cpu --dtype float32

The model is held in memory twice. Exit status: 0 if all agrees, 1 if something differs, 2 where nothing was compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from qwen_vl_classifier import Backbone, Classifier, Example, QwenVLClassifierError, Tap
from qwen_vl_classifier.backbone.devices import device_name
from qwen_vl_classifier.config.fields import DEVICES
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.scenes.statements import scene_examples

FLOAT32_DIFFERENCE = 1e-5  # most, of the largest entry of a feature
BFLOAT16_COSINE = 0.9995  # least
REPEATS = 3
SIZES = ((448, 336), (644, 140), (112, 112), (336, 448))

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TapResult:
    """How far features at one tap are from transformers' own: at most, and in cosine at least."""

    tap: Tap
    difference: float
    cosine: float


class Reference:
    """transformers' own processor and model, one example at a time.

    Attributes:
        way: How the processor was made.
    """

    def __init__(self, backbone: Backbone, max_pixels: int | None) -> None:
        folder = backbone.folder
        self.processor, self.way = own_processor(backbone)
        if max_pixels is not None:
            self.processor.image_processor.size = {
                "shortest_edge": self.processor.image_processor.size["shortest_edge"],
                "longest_edge": max_pixels,
            }
        model = transformers.AutoModel.from_pretrained(folder, dtype=backbone.dtype, local_files_only=True)
        self.model = model.to(backbone.device).eval()

    def inputs(self, example: Example) -> Any:
        """Build the model's inputs from the whole prompt."""
        pictures = list(example.images)
        prompt = self._prompt(example)
        return self.processor(text=[prompt], images=pictures or None, return_tensors="pt")

    def _prompt(self, example: Example) -> str:
        """Render the whole prompt, thinking turned off."""
        content = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.text}]
        prompt: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return prompt + ("\n</think>\n\n" if prompt.endswith("<think>\n") else "")

    @torch.inference_mode()
    def encode(self, examples: Sequence[Example], taps: Sequence[Tap]) -> Array:
        """Read features as `Backbone.encode` does."""
        rows = []
        for example in examples:
            inputs = self.inputs(example)
            output = self.model(**inputs.to(self.model.device), output_hidden_states=True)
            spans = self._spans(inputs["input_ids"][0].cpu(), example)
            row = []
            for tap in taps:
                states = output.last_hidden_state if tap.layer == -1 else output.hidden_states[tap.layer]
                picked = states[0].cpu()[spans[tap.pooling]].double()
                row.append(picked.mean(dim=0) if len(picked) else picked.new_zeros(states.shape[-1]))
            rows.append(torch.stack(row).numpy())
        return np.stack(rows)

    def _spans(self, ids: torch.Tensor, example: Example) -> dict[str, torch.Tensor]:
        """Find the places of each pooling, the text's by the number of tokens behind it."""
        behind = self._prompt(example).rpartition(example.text)[2]
        after, own = (
            len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (behind, example.text)
        )
        length = len(ids)
        places = torch.arange(length)
        return {
            "mean": places,
            "image": places[ids == self.model.config.image_token_id],
            "text": places[length - after - own : length - after],
            "last": places[-1:],
        }


def own_processor(backbone: Backbone) -> tuple[Any, str]:
    """Load transformers' processor with pictures by its PIL backend, and say how."""
    folder = backbone.folder
    pictures = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    if transformers.utils.is_torchvision_available():
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        processor.image_processor = pictures
        way = "AutoProcessor, pictures by its PIL backend"
    else:
        processor = _without_video(backbone, pictures)
        way = f"{type(processor).__name__} from AutoTokenizer and AutoImageProcessor (no torchvision here)"
    if processor.chat_template is None:  # older checkpoints have it with the tokeniser
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        processor.chat_template = backbone.processor.chat_template
        way += ", our chat template as it has none"
    return processor, way


def _without_video(backbone: Backbone, pictures: Any) -> Any:
    """Make the family's own processor without the half that needs torchvision."""
    family_class = getattr(transformers, PROCESSOR_MAPPING_NAMES[backbone.family.model_type])

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return family_class.check_argument_for_proper_class(self, argument_name, argument)

    processor_class = type(family_class.__name__, (family_class,), {"check_argument_for_proper_class": check})
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone.folder, local_files_only=True)
    settings, _ = family_class.get_processor_dict(backbone.folder, local_files_only=True)
    return processor_class(pictures, tokenizer, None, chat_template=settings.get("chat_template"))


def pictures_and_texts() -> list[Example]:
    """Return a few examples: pictures of several shapes, two in one, and none."""
    drawn = [next(scene_examples("test", seed=seed, scenes=1, size=size)) for seed, size in enumerate(SIZES)]
    examples = [Example(picture, lines[0].text) for picture, _, lines in drawn]
    first, second = drawn[0][0], drawn[2][0]
    examples.append(Example((second, first), "Both pictures show a red circle, says the caption: “Круги”."))
    examples.append(Example(None, "Is a square round?"))
    return examples


def compare(seen: Array, wanted: Array, taps: Sequence[Tap]) -> list[TapResult]:
    """Compare features of shape (examples, taps, hidden) tap by tap."""
    scale = np.abs(wanted).max(axis=-1)
    difference = np.abs(seen - wanted).max(axis=-1) / np.where(scale == 0, 1, scale)
    lengths = np.linalg.norm(seen, axis=-1) * np.linalg.norm(wanted, axis=-1)
    products = (seen * wanted).sum(axis=-1)
    cosine = np.where(~seen.any(axis=-1) & ~wanted.any(axis=-1), 1.0, products / np.where(lengths == 0, 1, lengths))
    return [TapResult(tap, float(difference[:, i].max()), float(cosine[:, i].min())) for i, tap in enumerate(taps)]


def same_inputs(backbone: Backbone, reference: Reference, examples: Sequence[Example]) -> tuple[bool, bool]:
    """Tell whether token ids are equal for all examples, and whether pixel values and grids are."""
    ids, pixels = True, True
    for example in examples:
        ours, theirs = backbone.processor([example]), reference.inputs(example)
        ids &= torch.equal(ours["input_ids"], theirs["input_ids"])
        for name in ("pixel_values", "image_grid_thw"):
            if example.images:
                pixels &= torch.equal(ours[name], theirs[name])
    return ids, pixels


def seconds_of(works: Sequence[Callable[[], object]]) -> list[float]:
    """Time some works in turn, `REPEATS` times, and return the median of each."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, times in zip(works, taken, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def zero_shot(backbone: Backbone, rows: int) -> str:
    """Answer true and false statements about scenes without training, and write the accuracy with its error."""
    try:
        classifier = Classifier.zero_shot(backbone)
    except (CheckpointError, ConfigError) as error:
        return f"none: {error}"
    room = {0: rows // 2, 1: rows // 2}
    examples: list[Example] = []
    for seed in itertools.count():
        if len(examples) == rows:
            break
        picture, _, lines = next(scene_examples("evaluation", seed=seed, scenes=1))
        if lines and room[lines[0].label]:
            room[lines[0].label] -= 1
            examples.append(Example(picture, lines[0].text, lines[0].label))
    accuracy = float(np.mean(classifier.predict(examples) == [example.label for example in examples]))
    error = math.sqrt(accuracy * (1 - accuracy) / rows)
    return f"{accuracy:.2f} ± {error:.2f} on {rows} scenes, half of them true"


def commit_of(backbone: Backbone, revision: str | None) -> str:
    """Say which version was loaded: the hub's commit where there is one, and our fingerprint."""
    folder = backbone.folder.resolve()
    commit = f"commit {folder.name}, " if folder.parent.name == "snapshots" else ""
    asked = f"{revision}, " if revision else ""
    return f"{asked}{commit}fingerprint {backbone.fingerprint[:12]}"


def verify(options: argparse.Namespace) -> tuple[str, bool]:
    """Compare one checkpoint; return the table and whether all agrees."""
    if options.rows < 2 or options.rows % 2:
        raise ConfigError(f"--rows {options.rows}: give an even number from 2 on, half of them true")
    backbone = Backbone.load(
        options.name,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        max_pixels=options.max_pixels,
    )
    reference = Reference(backbone, options.max_pixels)
    middle = max(1, backbone.num_layers // 2)
    taps = [Tap.parse(tap) for tap in ("mean:-1", "last:-1", "image:-1", "text:-1", f"mean:{middle}", f"last:{middle}")]
    examples = pictures_and_texts()
    results = compare(backbone.encode(examples, taps).astype(np.float64), reference.encode(examples, taps), taps)
    ids, pixels = same_inputs(backbone, reference, examples)
    theirs, ours = seconds_of([lambda: reference.encode(examples, taps), lambda: backbone.encode(examples, taps)])
    exact = backbone.dtype == torch.float32
    near = [r.difference <= FLOAT32_DIFFERENCE if exact else r.cosine >= BFLOAT16_COSINE for r in results]
    agrees = ids and pixels and all(near)
    wanted = f"difference <= {FLOAT32_DIFFERENCE:.0e} of scale" if exact else f"cosine >= {BFLOAT16_COSINE}"
    advice = "" if exact or all(near) else "; --dtype float32 tells rounding from a defect"
    packages = ("torch", "transformers", "qwen-vl-classifier")
    facts = {
        "checkpoint": Path(options.name).name if Path(options.name).is_dir() else options.name,
        "version": commit_of(backbone, options.revision),
        "family": f"{backbone.family.name}, {backbone.num_layers} layers of {backbone.hidden_size}",
        "computed": f"{device_name(backbone.device)}, {str(backbone.dtype).removeprefix('torch.')}",
        "with": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages),
        "compared with": f"AutoModel; {reference.way}; {len(examples)} examples",
        "token ids": "equal" if ids else "**differ**",
        "pixel values": "equal" if pixels else "**differ**",
        **{
            f"`{r.tap}`": f"difference {r.difference:.1e} of scale, cosine {r.cosine:.6f}{'' if ok else ' **differs**'}"
            for r, ok in zip(results, near, strict=True)
        },
        "seconds": f"{ours:.2f}; transformers, one at a time: {theirs:.2f} ({theirs / ours:.1f}x)",
        "zero-shot": zero_shot(backbone, options.rows),
        "verdict": f"**{'OK' if agrees else 'DIFFERS'}** (expected: equal inputs, {wanted}){advice}",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(lines), agrees


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("name", help="a name on the Hugging Face hub, a folder, or builtin:tiny")
    parser.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--rows", type=int, default=100, help="scenes to score zero-shot (default: %(default)s)")
    parser.add_argument("--max-pixels", type=int, help="shrink pictures to at most this many pixels")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        table, agrees = verify(options)
    except QwenVLClassifierError as error:
        print(error, file=sys.stderr)
        return 2
    print(table)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
