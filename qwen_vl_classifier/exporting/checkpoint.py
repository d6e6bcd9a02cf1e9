"""Write a classifier's backbone with a head as a checkpoint that other engines load.

Only the layers that the tap needs are written, adapters are merged, pixel limits and prompt are the classifier's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from qwen_vl_classifier.backbone.adapters import merged_weights
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import base_weights
from qwen_vl_classifier.backbone.checkpoint.expert_arrays import published_array
from qwen_vl_classifier.backbone.checkpoint.picture_settings import read_picture_settings
from qwen_vl_classifier.backbone.checkpoint.stored import read_json
from qwen_vl_classifier.backbone.checkpoint.weight_files import INDEX
from qwen_vl_classifier.backbone.processor import PICTURE_SETTINGS
from qwen_vl_classifier.exporting.exportable import Exportable

_SHARD_BYTES = 2 * 10**9  # merged weights of one shard are in main memory, beside the model
_DECODER_LAYER = "language_model.layers."
_VOCABULARY = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "video_preprocessor_config.json",  # without which processors of Qwen3-VL do not load
)
_TOKENISER, _PICTURES, _PROCESSOR = "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"
_TEMPLATE = "chat_template.jinja"
# Settings in `config.json` of somebody's head, or of code that would be loaded.
_NOT_KEPT = (
    *("id2label", "label2id", "num_labels", "problem_type", "classifier_from_token", "method", "head_dtype"),
    *("is_original_qwen3_reranker", "sentence_transformers", "sbert_ce_default_activation_function", "use_sep_token"),
    *("auto_map", "transformers_weights", "fusion_config", "attn_implementation", "experts_implementation"),
    *("dtype", "torch_dtype", "quantization_config"),
)

ALWAYS_GENERATES = "{% set add_generation_prompt = true %}\n"
"""Put before a chat template, so that its prompt ends as in training: some engines ask for less unless told."""

PROMPT_DIFFERENCES = (
    "special tokens such as <|im_end|> or <|image_pad|> written in a text are read as special tokens, while "
    "qwen-vl-classifier reads them as text; the client refuses such texts",
    "a text without picture that begins with a line break is tokenised together with the line break of the template",
)
"""What changes where texts are tokenised together with the prompt."""


def write_checkpoint(
    exportable: Exportable,
    folder: Path,
    *,
    head: Mapping[str, Tensor],
    changes: Mapping[str, Any],
    text_changes: Mapping[str, Any] | None = None,
    before_template: str = "",
    named: Callable[[str], str] | None = None,
) -> None:
    """Write weights, configuration, tokeniser, picture settings and prompt.

    Args:
        exportable: The classifier.
        folder: An existing, empty folder.
        head: Weights to add, under the names that they have in the files.
        changes: Entries of `config.json` to add or replace.
        text_changes: The same for the part that describes the decoder.
        before_template: Put at the start of the chat template.
        named: Turns the name that a weight has in the model into that in the files; `None` for published names.
    """
    source, name = exportable.backbone.folder, exportable.backbone.name
    for file in _VOCABULARY:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    config = _config(read_json(source / "config.json", name), exportable)
    config.get("text_config", config).update(text_changes or {})
    write_json(folder / "config.json", config | dict(changes))
    settings = read_json(source / _TOKENISER, name) if (source / _TOKENISER).is_file() else {}
    settings.pop("chat_template", None)  # transformers prefers the file of its own
    family = exportable.backbone.family
    if family.tokenizer_class != "AutoTokenizer":  # transformers 5.17 believes the name in the file, which can be wrong
        settings["tokenizer_class"] = family.tokenizer_class
    write_json(folder / _TOKENISER, settings)
    template = before_template + ALWAYS_GENERATES + exportable.backbone.processor.chat_template
    (folder / _TEMPLATE).write_text(template, encoding="utf-8")
    _write_picture_settings(exportable, folder)
    _write_weights(exportable, folder, head, named or family.published_name)


def label_settings(exportable: Exportable) -> dict[str, Any]:
    """Return the entries of `config.json` that name the classes."""
    names = exportable.classifier.label_names
    return {
        "num_labels": len(names),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def folded_parts(exportable: Exportable, head: str) -> tuple[str, ...]:
    """Describe which parts of the classifier a checkpoint contains.

    Args:
        exportable: The classifier.
        head: What the head has become.
    """
    backbone, tap = exportable.backbone, exportable.classifier.tap
    least, most = backbone.pixel_limits
    return (
        f"the head with its temperature {exportable.classifier.temperature:g}, as {head}",
        f"{exportable.depth} of {backbone.total_layers} decoder layers and the final norm, for the tap {tap}",
        *(("the adapter, added to the weights",) if backbone.adapter is not None else ()),
        f"limits of pictures: {least} to {most} pixels",
        "the prompt, as chat template; it always ends as the classifier's prompt does",
    )


def checkpoint_bytes(exportable: Exportable) -> int:
    """Return how many bytes the weights take."""
    weights = base_weights(exportable.backbone.model)
    return sum(weights[name].numel() * weights[name].element_size() for name in _kept(exportable, weights))


def special_tokens(exportable: Exportable) -> list[str]:
    """Return the texts that an engine reads as special tokens, even in a user's text."""
    added = exportable.backbone.processor.tokenizer.added_tokens_decoder.values()
    return sorted(str(token) for token in added if token.special)  # others are tokens here, too


def _config(config: dict[str, Any], exportable: Exportable) -> dict[str, Any]:
    """Return a `config.json` of as many layers as are needed, without settings of another head."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for setting in _NOT_KEPT:
            part.pop(setting, None)
        part["torch_dtype"] = exportable.dtype
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = exportable.depth
        if part.get("layer_types"):
            part["layer_types"] = part["layer_types"][: exportable.depth]
    return config


def _write_picture_settings(exportable: Exportable, folder: Path) -> None:
    """Write the settings of pictures where old and new versions of transformers look for them."""
    source, name = exportable.backbone.folder, exportable.backbone.name
    _, settings = read_picture_settings(source, name)
    least, most = exportable.backbone.pixel_limits
    settings = {key: settings[key] for key in (*PICTURE_SETTINGS, "processor_class") if key in settings}
    settings |= {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": least, "longest_edge": most},
        "min_pixels": least,
        "max_pixels": most,
    }
    write_json(folder / _PICTURES, settings)
    if (source / _PROCESSOR).is_file():
        processor = read_json(source / _PROCESSOR, name)
        processor.pop("chat_template", None)
        write_json(folder / _PROCESSOR, processor | {"image_processor": settings})


def _kept(exportable: Exportable, names: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the weights that the tap needs."""
    for name in names:
        if not name.startswith(_DECODER_LAYER) or int(name.split(".")[2]) < exportable.depth:
            yield name


def _write_weights(
    exportable: Exportable, folder: Path, head: Mapping[str, Tensor], named: Callable[[str], str]
) -> None:
    """Write the weights in shards, with an index if there are several."""
    family, there = exportable.backbone.family, base_weights(exportable.backbone.model)
    own = {named(name): name for name in _kept(exportable, there)}
    sizes = {file_name: there[name].to("meta") for file_name, name in own.items()}
    sizes |= {name: tensor.to("meta") for name, tensor in head.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=_SHARD_BYTES)
    merged = merged_weights(exportable.backbone)
    for file, names in plan.filename_to_tensors.items():
        shard = {
            name: head[name] if name in head else published_array(family, own[name], merged[own[name]]())
            for name in names
        }
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in shard.items()},
            folder / file,
            metadata={"format": "pt"},
        )
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def write_json(path: Path, content: Any) -> None:
    """Write a file of settings."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(
        text + "\n", encoding="utf-8", errors="backslashreplace"
    )  # half a surrogate pair, as JSON spells it
