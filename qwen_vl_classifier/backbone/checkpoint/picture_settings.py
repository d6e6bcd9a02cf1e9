"""Load and check the settings by which a checkpoint prepares its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vl_classifier.backbone.checkpoint.stored import is_there, read_json, refuse_malformed, short_message
from qwen_vl_classifier.backbone.processor import PICTURE_SETTINGS
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import CheckpointError, one_line

MOST_SMALLEST = 1 << 21
"""Pixels to which a picture may be enlarged at most; published checkpoints have 65,536."""

MOST_LARGEST = 1 << 24
"""Pixels that a picture may have at most after resizing, as in the checkpoints that were published with the most."""

_OWN_FILE, _SHARED_FILE = "preprocessor_config.json", "processor_config.json"  # transformers 5 writes the latter
_WITHIN = "image_processor"
_CHANNELS = 3
_MOST_COLOUR, _LEAST_SPREAD = 1e4, 1e-4
_SIZES = ("size", "min_pixels", "max_pixels")


def read_picture_settings(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the file with the settings of pictures, and the settings.

    Args:
        folder: The checkpoint.
        name: Its name, for messages.

    Raises:
        CheckpointError: The settings are missing or cannot be read.
    """
    if is_there(folder / _SHARED_FILE):
        settings = read_json(folder / _SHARED_FILE, name).get(_WITHIN)
        if isinstance(settings, dict):
            return _SHARED_FILE, settings
    if not is_there(folder / _OWN_FILE):
        raise CheckpointError(f"{name}: no {_OWN_FILE} in it; copy the one of its base model into it")
    return _OWN_FILE, read_json(folder / _OWN_FILE, name)


def load_image_processor(folder: Path, config: Any, name: str) -> tuple[Any, tuple[int, int]]:
    """Load the image processor, which is the same for all families, and check its settings.

    Args:
        folder: The checkpoint.
        config: Its configuration.
        name: Its name, for messages.

    Returns:
        transformers' image processor, and the fewest and most pixels of a picture after resizing.

    Raises:
        CheckpointError: Its settings are missing, malformed, impossible or another model's.
    """
    file, settings = read_picture_settings(folder, name)
    try:
        # The class is fixed: some files name one that transformers never had. Other settings than those that the
        # fingerprint covers have no effect: each would become an attribute, in the place of a method too.
        names = (*PICTURE_SETTINGS, *_SIZES)
        processor = Qwen2VLImageProcessorPil(**{name: settings[name] for name in names if name in settings})
        limits = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
        patches = [getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")]
    except Exception as error:  # transformers has no common class for what it raises here
        refuse_malformed(folder, name)
        raise CheckpointError(
            f"{name}: its {file} cannot be read ({short_message(error)}); give the one of its base model"
        ) from error
    vision = config.vision_config
    expected = [vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size]
    if patches != expected:
        raise CheckpointError(
            f"{name}: patch, temporal and merge size are {one_line(patches, 80)} in its {file} and {expected} in its "
            f"config.json, which do not belong together; give the {file} that was saved with that config.json"
        )
    _check_switches(processor, file, name)
    _check_kind(settings.get("image_processor_type"), file, name)
    if not processor.do_resize:
        raise CheckpointError(
            f"{name}: do_resize is false in its {file}, and only pictures that are resized fit into whole patches; "
            "set it to true"
        )
    if processor.do_normalize:
        _check_colours(processor, file, name)
    return processor, limits


def _check_kind(kind: object, file: str, name: str) -> None:
    """Check that the settings are not those of another kind of image processor.

    Raises:
        CheckpointError: They name another image processor of transformers.
    """
    own = Qwen2VLImageProcessorPil.__name__.removesuffix("Pil")
    known = {processor for backends in IMAGE_PROCESSOR_MAPPING_NAMES.values() for processor in backends.values()}
    if str(kind).removesuffix("Fast") in known - {own, f"{own}Pil"}:
        raise CheckpointError(
            f"{name}: image_processor_type is {kind} in its {file}, expected {own}; give the {file} of its base model"
        )


def _check_switches(processor: Any, file: str, name: str) -> None:
    """Check the settings that are true or false, and the factor before normalisation.

    Raises:
        CheckpointError: One of them is something else.
    """
    for setting in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample"):
        value = getattr(processor, setting)
        usable = type(value) is bool if setting.startswith("do_") else is_number(value, 0, _MOST_COLOUR)
        if not usable and value is not None:
            raise CheckpointError(
                f"{name}: {setting} is {one_line(value, 80)} in its {file}; give the one of its base model"
            )


def _check_colours(processor: Any, file: str, name: str) -> None:
    """Check mean and standard deviation of colours: one number for each channel, or one for all.

    Raises:
        CheckpointError: They are not usable.
    """
    for setting in ("image_mean", "image_std"):
        value = getattr(processor, setting)
        numbers = list(value) if isinstance(value, (list, tuple)) else [value] * _CHANNELS
        usable = all(is_number(number, -_MOST_COLOUR, _MOST_COLOUR) for number in numbers)
        if len(numbers) != _CHANNELS or not usable or (setting == "image_std" and min(numbers) < _LEAST_SPREAD):
            raise CheckpointError(
                f"{name}: {setting} is {one_line(value, 80)} in its {file}, expected {_CHANNELS} numbers, for red, "
                f"green and blue{' and above 0' * (setting == 'image_std')}; give the one of its base model"
            )
