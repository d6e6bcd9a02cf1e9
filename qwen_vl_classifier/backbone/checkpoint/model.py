"""Load a checkpoint: configuration, weights, tokeniser and picture settings, all checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qwen_vl_classifier.backbone.checkpoint.adapter_layout import refuse_adapter
from qwen_vl_classifier.backbone.checkpoint.config_bounds import check_heads, check_numbers
from qwen_vl_classifier.backbone.checkpoint.expert_arrays import match_experts
from qwen_vl_classifier.backbone.checkpoint.picture_settings import (
    MOST_LARGEST,
    MOST_SMALLEST,
    load_image_processor,
)
from qwen_vl_classifier.backbone.checkpoint.quantisation import (
    Quantization,
    loading_options,
    refuse_quantised,
    weight_bytes,
)
from qwen_vl_classifier.backbone.checkpoint.stored import check_settings, read_json, refuse_malformed, short_message
from qwen_vl_classifier.backbone.checkpoint.tokeniser_checks import check_tokeniser
from qwen_vl_classifier.backbone.checkpoint.weight_files import StoredWeight, StoredWeights, read_headers, read_tensors
from qwen_vl_classifier.backbone.checkpoint.weight_names import EMBEDDINGS, HEAD
from qwen_vl_classifier.backbone.devices import free_memory, is_out_of_memory
from qwen_vl_classifier.backbone.families import FAMILIES, Family, family_of
from qwen_vl_classifier.backbone.layers.kinds import MASKS
from qwen_vl_classifier.backbone.placement import loads_to_devices, place, remove_hooks
from qwen_vl_classifier.backbone.processor import Processor, renders_nothing
from qwen_vl_classifier.backbone.prompts.text_tokens import position_limit
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import CheckpointError, ConfigError, first_of, one_line

_PAD_TOKENS = ("<|image_pad|>", "<|video_pad|>")
_TOKENISERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # files of which one set is needed
_SLOW_BYTES = 10**9  # of weights; loading more takes long enough to show progress
_FEW_LAYERS = 128  # of which a model without weights is built in a moment
_AXES = 3  # of a position: time, height and width
_FLOATS = ("F", "BF")  # types of safetensors
_JOINED = re.compile(r"\.(qkv_proj|gate_up_proj)\.")  # no decoder of these families has such a layer
# Fields of a `config.json` that could make transformers load something else than the files.
_HOW_TO_LOAD = {"transformers_weights", "fusion_config", "attn_implementation", "experts_implementation"}


def check_config(content: Mapping[str, Any], name: str) -> Family:
    """Check by its `config.json` that this package can load a checkpoint, and return its family.

    Raises:
        CheckpointError: The family is not supported, or the weights are quantised.
    """
    family = family_of(content.get("model_type"), source=name)
    refuse_quantised(content, name)
    check_numbers(content, name)
    return family


def load_config(folder: Path, name: str, num_layers: int | None) -> tuple[Family, Any, int]:
    """Read a checkpoint's configuration.

    Args:
        folder: The checkpoint.
        name: Its name, for messages.
        num_layers: Number of decoder layers to load; `None` for all.

    Returns:
        Family, transformers' configuration, and the checkpoint's number of decoder layers.

    Raises:
        CheckpointError: The configuration cannot be read or is not supported.
        ConfigError: `num_layers` is out of range.
    """
    refuse_adapter(folder, name)
    content = read_json(folder / "config.json", name)
    family = check_config(content, name)
    try:
        config = family.load_class().config_class.from_dict(
            {key: value for key, value in content.items() if key not in _HOW_TO_LOAD}
        )
        text_config = config.get_text_config()
        written = content.get("text_config")
        if "tie_word_embeddings" not in content and isinstance(written, Mapping):
            config.tie_word_embeddings = written.get("tie_word_embeddings") is True  # some say so only there
        total_layers = int(text_config.num_hidden_layers)
    except Exception as error:  # transformers has no common class for what it raises here
        raise CheckpointError(
            f"{name}: transformers {transformers.__version__} cannot read its config.json ({short_message(error)}); "
            "correct that value, or run: pip install -U transformers"
        ) from error
    check_heads(config, name)
    _check_positions(text_config, name)
    config._attn_implementation = "sdpa"  # also of its parts: a name from the file could ask for foreign code
    if num_layers is not None:
        if not 1 <= num_layers <= total_layers:
            raise ConfigError(f"num_layers {num_layers}: {name} has {total_layers}; expected 1 to {total_layers}")
        text_config.num_hidden_layers = num_layers
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:num_layers]
    if others := set(getattr(text_config, "layer_types", None) or ()) - set(MASKS):
        raise CheckpointError(
            f"{name}: it uses {first_of(sorted(others), 4)}, which no published Qwen-VL checkpoint does; expected "
            f"{' or '.join(MASKS)} (set use_sliding_window to false in its config.json if that was "
            "not meant)"
        )
    return family, config, total_layers


def _check_positions(text_config: Any, name: str) -> None:
    """Check that the sections of a rotary position cover half of what is rotated of an attention head.

    Raises:
        CheckpointError: They do not.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    sections = rope.get("mrope_section")
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    half = int(head * rope.get("partial_rotary_factor", 1)) // 2
    three = sections if isinstance(sections, list) and len(sections) == _AXES else [None]
    if not all(is_number(part, 0, half) for part in three) or sum(three) != half:
        raise CheckpointError(
            f"{name}: mrope_section is {one_line(sections, 80)} in its config.json; expected {_AXES} numbers that add "
            f"up to {half}, half of what is rotated of an attention head; correct it"
        )


def load_model(
    family: Family,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    name: str,
    *,
    total_layers: int,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    quantization: Quantization | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Load the weights, and check that the model and the files have the same ones.

    transformers receives the weights, not the folder, so that nothing else in the folder has an effect. With
    accelerate it copies each of them straight to its GPU, so that main memory never holds the model.

    Args:
        family: The checkpoint's family.
        folder: The folder of the checkpoint.
        config: Its configuration, possibly with fewer layers.
        dtype: Type of the loaded weights.
        name: The checkpoint's name, for messages.
        total_layers: Its number of decoder layers; if the configuration has fewer, higher ones are not loaded.
        devices: Where the model lies; decoder layers are spread over several, in their order.
        quantization: How the decoder is quantised.

    Returns:
        The model, and the names of weights that were skipped because they belong to other trainers' heads.

    Raises:
        CheckpointError: No safetensors weights, or one is missing, left over or of another shape.
    """
    stored = read_headers(folder, name)
    _check_depth(stored, config, name)
    expected = _expected_shapes(family, config, name)
    expected, of_model = match_experts(family, expected, stored.of_model)
    stored = replace(stored, of_model=of_model)
    matched = _match(expected, stored, config, name, total_layers=total_layers)
    options = loading_options(quantization, dtype)
    straight = quantization is not None or loads_to_devices(devices)
    if straight:
        weights = {name: weight_bytes(name, shape, dtype, quantization) for name, shape in expected.items()}
        options["device_map"] = place(weights, devices, [free_memory(device) for device in devices])
    size = sum(path.stat().st_size for path in {weight.path for weight in matched.values()})
    try:
        with _quiet(show_progress=size > _SLOW_BYTES):
            model, report = family.load_class().from_pretrained(
                None,
                config=config,
                state_dict=read_tensors(matched, name),
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                **options,
            )
    except CheckpointError:
        raise
    except Exception as error:  # transformers has no common class for what it raises here
        if is_out_of_memory(error):
            raise
        raise _unbuildable(name, error) from error
    lost = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if lost:
        raise CheckpointError(
            f"{name}: transformers {transformers.__version__} did not load {len(lost)} weight(s), first {lost[0]}; "
            "run: pip install -U transformers"
        )
    loaded: nn.Module = model
    if not straight:
        loaded = loaded.to(devices[0])
    elif len(set(options["device_map"].values())) > 1:
        remove_hooks(loaded)
    return loaded, stored.passed_over


def loaded_bytes(
    folder: Path, name: str, num_layers: int | None, dtype: torch.dtype, quantization: Quantization | None
) -> int:
    """Return how much memory the weights of a checkpoint take once they are loaded, from the headers of its files.

    Args:
        folder: The folder of the checkpoint.
        name: Its name, for messages.
        num_layers: Number of decoder layers to load; `None` for all.
        dtype: Type of the loaded weights.
        quantization: How the decoder is quantised.

    Raises:
        CheckpointError: The files have no sound headers.
    """
    weights = read_headers(folder, name).of_model
    return sum(
        weight_bytes(key, weight.shape, dtype, quantization)
        for key, weight in weights.items()
        if key != HEAD and not (num_layers is not None and _is_above(key, num_layers))
    )


def _check_depth(stored: StoredWeights, config: Any, name: str) -> None:
    """Check that the files have as many layers as the configuration, before a model of very many is built.

    Raises:
        CheckpointError: They have fewer.
    """
    for asked, prefix, what in (
        (config.get_text_config().num_hidden_layers, "language_model.layers.", "decoder layers"),
        (config.vision_config.depth, "visual.blocks.", "blocks of the vision tower"),
    ):
        numbers = {key.removeprefix(prefix).partition(".")[0] for key in stored.of_model if key.startswith(prefix)}
        if asked > max(len(numbers), _FEW_LAYERS):  # the names of a few that are missing say more
            raise CheckpointError(
                f"{name}: its config.json asks for {asked:,} {what}, and its files have {len(numbers):,} (missing "
                "weights); give the config.json that was saved with these weights, or save or download the whole model "
                "again"
            )


def _expected_shapes(family: Family, config: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a configuration's model, without allocating any."""
    try:
        with torch.device("meta"), _quiet(show_progress=False):
            model = family.load_class()(config)
    except Exception as error:  # transformers has no common class for what it raises here
        raise _unbuildable(name, error) from error
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _unbuildable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name}: transformers {transformers.__version__} cannot build a model from its config.json "
        f"({short_message(error)}); give the config.json that was saved with these weights"
    )


def _match(
    expected: Mapping[str, tuple[int, ...]], stored: StoredWeights, config: Any, name: str, *, total_layers: int
) -> dict[str, StoredWeight]:
    """Find the stored weight of every weight of the model, and check that none is left over."""
    of_model = dict(stored.of_model)
    head = of_model.pop(HEAD, None)
    if EMBEDDINGS not in of_model and head is not None and config.tie_word_embeddings:
        of_model[EMBEDDINGS] = head  # tied weights are stored once, under either name
    loaded = config.get_text_config().num_hidden_layers
    left_over = [
        weight
        for key, weight in of_model.items()
        if key not in expected and not (loaded < total_layers and _is_above(key, loaded))
    ]
    left_over += stored.unknown
    files = first_of(sorted({weight.path.name for weight in (*stored.of_model.values(), *stored.unknown)}), 4)
    if missing := sorted(expected.keys() - of_model.keys()):
        raise CheckpointError(
            f"{name}: {len(missing)} missing weight(s), first {missing[0]} of shape {list(expected[missing[0]])}, "
            f"which its config.json asks for; {files or 'no file'} has {_instead(left_over)}; give the "
            "config.json that was saved with these weights, or save or download the whole model again"
        )
    if left_over:
        first = min(left_over, key=lambda weight: weight.name)
        raise CheckpointError(
            f"{name}: {len(left_over)} unexpected weight(s), first {first.name} of shape {list(first.shape)} in "
            f"{first.path.name}, which the model of its config.json does not have; give the config.json that was saved "
            "with these weights, or take them out of the file"
        )
    for key, shape in expected.items():
        weight = of_model[key]
        if weight.shape != shape:
            raise CheckpointError(
                f"{name}: {weight.name} in {weight.path.name} has shape {list(weight.shape)}, expected {list(shape)} "
                "by its config.json (shapes differ); give the config.json that was saved with these weights"
            )
        if not weight.dtype.startswith(_FLOATS):
            raise CheckpointError(
                f"{name}: {weight.name} in {weight.path.name} is of type {weight.dtype}, expected floating-point "
                "numbers; save the model again in float32 or bfloat16"
            )
    return {key: of_model[key] for key in expected}


def _instead(left_over: Sequence[StoredWeight]) -> str:
    """Describe the stored weights that are there instead of missing ones."""
    if not left_over:
        return "none of them"
    joined = [weight for weight in left_over if _JOINED.search(weight.name)]
    first = min(joined or left_over, key=lambda weight: weight.name)
    why = ", which joins several (as inference servers do)" if joined else ""
    return f"{len(left_over)} other(s), first {first.name} of shape {list(first.shape)}{why}"


def _is_above(key: str, layers: int) -> bool:
    """Tell whether a weight belongs to a decoder layer above the first `layers`."""
    part, _, rest = key.partition(".layers.")
    number = rest.split(".", maxsplit=1)[0]
    return part == "language_model" and number.isdigit() and int(number) >= layers


@contextmanager
def _quiet(*, show_progress: bool) -> Iterator[None]:
    """Keep transformers from printing its own report of weight names, which are checked here."""
    logging = transformers.utils.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if not show_progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def load_processor(
    folder: Path,
    config: Any,
    name: str,
    min_pixels: int | None,
    max_pixels: int | None,
    chat_template: str | None = None,
    max_text_tokens: int | None = None,
) -> Processor:
    """Load tokeniser, picture settings and chat template; none of them needs torchvision.

    Args:
        folder: The checkpoint.
        config: Its configuration.
        name: Its name, for messages.
        min_pixels: Fewest pixels of a picture after resizing; `None` for those of the checkpoint.
        max_pixels: Most pixels; `None` for those of the checkpoint.
        chat_template: A chat template instead of the checkpoint's own.
        max_text_tokens: Most tokens of a text; `None` for as many as the model has positions.

    Raises:
        CheckpointError: They are missing or malformed.
        ConfigError: Pixel limits that contradict each other.
    """
    if not any(all((folder / file).is_file() for file in files) for files in _TOKENISERS):
        raise CheckpointError(f"{name}: no tokenizer.json in it; copy the tokeniser files of its base model into it")
    check_settings(folder, name)
    check_tokeniser(folder, name)
    try:
        tokenizer_class = getattr(transformers, FAMILIES[config.model_type].tokenizer_class)
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer.convert_tokens_to_ids(list(_PAD_TOKENS))
        int(tokenizer.model_max_length)
    except Exception as error:  # the tokenizers library raises plain `Exception`
        refuse_malformed(folder, name)
        raise CheckpointError(
            f"{name}: its tokeniser or chat template cannot be read ({short_message(error)}); "
            "give a folder in the hub's layout"
        ) from error
    if ids != [config.image_token_id, config.video_token_id]:  # a missing tokeniser comes back as an empty one
        raise CheckpointError(
            f"{name}: its tokeniser has {' and '.join(_PAD_TOKENS)} at {ids}, and image_token_id and video_token_id of "
            f"its config.json are {[config.image_token_id, config.video_token_id]}; give the tokeniser files that were "
            "saved with that config.json"
        )
    image_processor, limits = load_image_processor(folder, config, name)
    smallest = min_pixels if min_pixels is not None else limits[0]
    largest = max_pixels if max_pixels is not None else limits[1]
    if not 0 < smallest <= largest:
        raise ConfigError(f"min_pixels {smallest}, max_pixels {largest}: expected 0 < min_pixels <= max_pixels")
    if smallest > MOST_SMALLEST or largest > MOST_LARGEST:
        raise ConfigError(
            f"{spelled('min_pixels', smallest)}, {spelled('max_pixels', largest)}: expected at most "
            f"{MOST_SMALLEST:,} and {MOST_LARGEST:,}; a picture of more costs minutes and gigabytes"
        )
    image_processor.size = {"shortest_edge": int(smallest), "longest_edge": int(largest)}
    template = tokenizer.chat_template
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json", name).get("chat_template")
    if isinstance(template, dict):  # several by name, as tokenisers may have
        template = template.get("default")
    if not isinstance(template, (str, type(None))):
        raise CheckpointError(
            f"{name}: its chat template is of type {type(template).__name__}, expected a text; correct chat_template "
            "in its tokenizer_config.json or chat_template.json"
        )
    if template is not None and renders_nothing(tokenizer, template):
        template = None
    return Processor(
        tokenizer,
        image_processor,
        chat_template=chat_template or template,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        brings_template=chat_template is None,
        positions=position_limit(config.get_text_config()),
        max_text_tokens=max_text_tokens,
        vocab_size=config.get_text_config().vocab_size,
    )
