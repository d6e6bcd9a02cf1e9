"""Show on one page what augmentation does to some pictures.

The page works from a disk, a mail or a bucket: pictures stand in it, and no script or font is loaded. Texts and ids
come from strangers, so all of them are escaped, and a content security policy lets nothing but the page's own style
sheet and pictures through.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.pages import page_templates
from qwen_vl_classifier.files.whole import write_file
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.images.thumbnails import thumbnail
from qwen_vl_classifier.training.finetuning.augmentation import Augmentation, augment_example

_SIDE = 200


def write_augmentation_page(
    examples: Sequence[Example],
    augmentation: Augmentation,
    path: str | os.PathLike[str],
    *,
    rows: int = 6,
    variants: int = 5,
    seed: int = 0,
) -> Path:
    """Write a page that shows examples as they are, and what training sees of them.

    Variant v of the example at index i is `augment_example(examples[i], augmentation, (seed, v, i))`: a loop that
    seeds with (seed, epoch, index) sees these very pictures in its first epochs.

    Args:
        examples: Where to choose from: `rows` of those with a picture, evenly spread.
        augmentation: What is done to them.
        path: The file to write, its folder made if missing; an older one is replaced.
        rows: How many examples to show.
        variants: How many variants of each.
        seed: The seed of the run.

    Returns:
        The path.

    Raises:
        ConfigError: The file cannot be written.
        ImageError: A picture that was chosen cannot be opened.
    """
    path = Path(path)
    page = _render(examples, augmentation, rows, variants, seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(
            f"{path}: the page of augmented pictures cannot be written ({error.strerror or type(error).__name__}); "
            "give a path that can be written, on a disk with room"
        ) from error
    return path


def _render(examples: Sequence[Example], augmentation: Augmentation, rows: int, variants: int, seed: int) -> str:
    with_picture = [index for index, example in enumerate(examples) if example.images]
    shown = min(rows, len(with_picture))
    chosen = [with_picture[row * len(with_picture) // shown] for row in range(shown)]
    template = page_templates("training/finetuning").get_template("augmentation_page.html")
    return template.render(
        level=augmentation.level,
        flips=augmentation.flips,
        operations=augmentation.operations,
        seed=seed,
        examples=[
            _row(examples[index], augmentation, [(seed, variant, index) for variant in range(variants)], index)
            for index in chosen
        ],
    )


def _row(example: Example, augmentation: Augmentation, seeds: list[tuple[int, ...]], index: int) -> dict[str, Any]:
    """Lay out one example: a strip for each of its pictures, the original first."""
    versions = [example, *(augment_example(example, augmentation, seed) for seed in seeds)]
    strips = zip(
        *([thumbnail(open_image(source), _SIDE) for source in version.images] for version in versions), strict=True
    )
    return {"row": index, "id": example.id, "text": example.text, "label": example.label, "strips": list(strips)}
