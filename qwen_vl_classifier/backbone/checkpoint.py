"""The files of a checkpoint: configuration, weights, tokeniser, picture settings; all checked on reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from qwen_vl_classifier.backbone.adapter_layout import base_weights
from qwen_vl_classifier.backbone.encoder import is_out_of_memory
from qwen_vl_classifier.backbone.families import Family, family_of
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.errors import CheckpointError, ConfigError

_LM_HEAD = "lm_head.weight"
_PAD_TOKENS = ("<|image_pad|>", "<|video_pad|>")
_SLOW_BYTES = 10**9  # from here on loading takes long enough to show progress


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of the checkpoint called `name`.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no {path.name} in it; give a folder in the hub's layout") from None
    except OSError as error:
        raise CheckpointError(
            f"{name}: its {path.name} cannot be read ({error.strerror}); give a folder in the hub's layout"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: its {path.name} is not valid JSON; fetch the checkpoint again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: its {path.name} holds no JSON object; fetch the checkpoint again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint, in order of their names."""
    return sorted(folder.glob("*.safetensors"))


def load_config(folder: Path, name: str, num_layers: int | None) -> tuple[Family, Any, int]:
    """Read a checkpoint's configuration.

    Args:
        folder: The checkpoint.
        name: Its name, for messages.
        num_layers: How many decoder layers the configuration is to have; `None` for all.

    Returns:
        Family, transformers' configuration, and how many decoder layers there are in all.

    Raises:
        CheckpointError: It cannot be read, or is of a kind that this package does not do.
        ConfigError: More layers than there are.
    """
    content = read_json(folder / "config.json", name)
    family = family_of(content.get("model_type"), source=name)
    try:
        config = family.load_class().config_class.from_dict(content)
        text_config = config.get_text_config()
        total_layers = int(text_config.num_hidden_layers)
    except Exception as error:  # transformers has no common class for what it raises here
        raise CheckpointError(
            f"{name}: transformers {transformers.__version__} cannot read its config.json "
            f"({type(error).__name__}); fetch the checkpoint again, or run: pip install -U transformers"
        ) from error
    if num_layers is not None:
        if not 1 <= num_layers <= total_layers:
            raise ConfigError(f"num_layers {num_layers}: {name} has {total_layers}; give 1 to {total_layers}")
        text_config.num_hidden_layers = num_layers
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:num_layers]
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        raise CheckpointError(
            f"{name}: it uses sliding-window attention, which no published Qwen-VL checkpoint does; "
            "set use_sliding_window to false in its config.json if that was not meant"
        )
    return family, config, total_layers


def load_model(
    family: Family,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    name: str,
    *,
    total_layers: int,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Load the weights and make sure that every one of them found its place.

    Args:
        family: Its family.
        folder: The checkpoint.
        config: Its configuration, possibly with fewer layers.
        dtype: Type of the loaded weights.
        name: The checkpoint's name, for messages.
        total_layers: Of the checkpoint; where the configuration has fewer, weights of higher layers are left over.
        options: More that transformers' `from_pretrained` is told, such as how to quantise.

    Raises:
        CheckpointError: No safetensors weights, or one is missing, left over or of another shape.
    """
    if not weight_files(folder):
        raise CheckpointError(
            f"{name}: no .safetensors weights in it; other formats are not read, because they can run code"
        )
    try:
        with _quiet(show_progress=_total_bytes(folder) > _SLOW_BYTES):
            model, report = family.load_class().from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{name}: its weights cannot be read ({type(error).__name__}); fetch the checkpoint again"
        ) from error
    except Exception as error:  # transformers has no common class for what it raises here
        if is_out_of_memory(error):
            raise
        if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
            raise CheckpointError(
                f"{name}: weights whose shapes differ from its config.json; fetch the checkpoint again"
            ) from error
        raise CheckpointError(
            f"{name}: transformers {transformers.__version__} cannot build a model from its config.json and weights "
            f"({type(error).__name__}); fetch the checkpoint again"
        ) from error
    left_over = [key for key in report["unexpected_keys"] if not key.startswith("lm_head.")]
    if config.get_text_config().num_hidden_layers < total_layers:
        left_over = [key for key in left_over if not _is_higher_layer(key, config)]
    problems = {"missing": sorted(report["missing_keys"]), "unexpected": sorted(left_over)}
    for what, keys in problems.items():
        if keys:
            raise CheckpointError(
                f"{name}: {len(keys)} {what} weight(s), first {keys[0]}; "
                "its config.json and its weights do not belong together: fetch the checkpoint again"
            )
    loaded: nn.Module = model
    return loaded


def _total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


@contextmanager
def _quiet(*, show_progress: bool) -> Iterator[None]:
    """Keep transformers from printing its own report of the keys, which are checked here."""
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


def _is_higher_layer(key: str, config: Any) -> bool:
    _, found, rest = key.partition("layers.")
    number = rest.split(".", maxsplit=1)[0]
    return bool(found) and number.isdigit() and int(number) >= config.get_text_config().num_hidden_layers


def load_processor(folder: Path, config: Any, name: str, min_pixels: int | None, max_pixels: int | None) -> Processor:
    """Load tokeniser, picture settings and chat template; none of them needs torchvision.

    Raises:
        CheckpointError: They are missing or malformed.
        ConfigError: Pixel limits that contradict each other.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Taken from its own module: by its short name, transformers 5.17 asks for torchvision.
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        limits = [int(image_processor.size[name]) for name in ("shortest_edge", "longest_edge")]
        patches = [getattr(image_processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")]
        ids = tokenizer.convert_tokens_to_ids(list(_PAD_TOKENS))
        int(tokenizer.model_max_length)
    except Exception as error:  # the tokenizers library raises plain `Exception`
        raise CheckpointError(
            f"{name}: its tokeniser or preprocessor_config.json cannot be read ({type(error).__name__}); "
            "give a folder in the hub's layout"
        ) from error
    if ids != [config.image_token_id, config.video_token_id]:  # a missing tokeniser comes back as an empty one
        raise CheckpointError(
            f"{name}: its tokeniser has {' and '.join(_PAD_TOKENS)} at {ids}, its config.json at "
            f"{[config.image_token_id, config.video_token_id]}: fetch the checkpoint again"
        )
    vision = config.vision_config
    wanted = [vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size]
    if patches != wanted:
        raise CheckpointError(
            f"{name}: patch, temporal and merge size are {patches} in its preprocessor_config.json and {wanted} in its "
            "config.json, which do not belong together: fetch the checkpoint again"
        )
    smallest = min_pixels if min_pixels is not None else limits[0]
    largest = max_pixels if max_pixels is not None else limits[1]
    if not 0 < smallest <= largest:
        raise ConfigError(f"min_pixels {smallest}, max_pixels {largest}: give 0 < min_pixels <= max_pixels")
    image_processor.size = {"shortest_edge": int(smallest), "longest_edge": int(largest)}
    template = tokenizer.chat_template
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json", name).get("chat_template")
    if isinstance(template, dict):  # several by name, as tokenisers may have
        template = template.get("default")
    if not isinstance(template, (str, type(None))):
        raise CheckpointError(f"{name}: its chat template is no text; fetch the checkpoint again")
    return Processor(
        tokenizer,
        image_processor,
        chat_template=template,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )


def head_row(folder: Path, token: int, name: str) -> Tensor:
    """Read one row of the language head from the weight files; nothing else of the head is loaded.

    Raises:
        CheckpointError: The checkpoint has no language head.
    """
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if _LM_HEAD in file.keys():  # noqa: SIM118 - not a dictionary
                row: Tensor = file.get_slice(_LM_HEAD)[token : token + 1][0]
                return row
    raise CheckpointError(
        f"{name}: no {_LM_HEAD} among its weights, so it has no zero-shot answer; train a classifier on it instead"
    )


def copy_settings(source: Path, folder: Path, name: str, num_layers: int) -> None:
    """Copy everything of a checkpoint but its weights.

    Args:
        source: The checkpoint.
        folder: Where to; it exists.
        name: The checkpoint's name, for messages.
        num_layers: How many decoder layers the copy's configuration speaks of.
    """
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = read_json(source / "config.json", name)
    text_config = config.get("text_config", config)
    text_config["num_hidden_layers"] = num_layers
    if text_config.get("layer_types"):
        text_config["layer_types"] = text_config["layer_types"][:num_layers]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(model: nn.Module, family: Family, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model's weights, an adapter's left out, under the names of published checkpoints.

    Args:
        model: The model without language head.
        family: Its family.
        folder: Gets a `model.safetensors`.
        dtype: Type to write, `None` for that of the weights.
    """
    weights = {
        family.published_name(name): tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in base_weights(model).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
