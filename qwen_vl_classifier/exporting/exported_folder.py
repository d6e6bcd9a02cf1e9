"""`export`: write a classifier as a folder that another engine loads, whole or not at all."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from pathlib import Path
from typing import Protocol, cast

from safetensors import SafetensorError

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.export import TARGETS, ExportConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ConfigError, QwenVLClassifierError
from qwen_vl_classifier.exporting.checkpoint import checkpoint_bytes, special_tokens
from qwen_vl_classifier.exporting.export_card import export_card
from qwen_vl_classifier.exporting.export_manifest import ExportManifest, rules_of
from qwen_vl_classifier.exporting.exportable import Exportable, Written, exportable_of
from qwen_vl_classifier.exporting.reference_examples import write_examples
from qwen_vl_classifier.files.pages import page_file
from qwen_vl_classifier.files.room import check_room, check_writable
from qwen_vl_classifier.files.whole import new_folder

_PACKAGE, _DECIDE, _CLIENT = "exporting", "decide.py", "client.py"
_LIBRARIES = ("qwen-vl-classifier", "torch", "transformers")


class _Target(Protocol):
    """What a module of a target has."""

    def refusal(self, exportable: Exportable) -> str | None:
        """Explain why the engine cannot give the same probabilities, and what to do; `None` if it can."""

    def write(self, exportable: Exportable, folder: Path) -> Written:
        """Write what the engine loads into an empty folder."""


def export(
    classifier: Classifier,
    folder: str | os.PathLike[str],
    to: str = "vllm",
    *,
    leave_to_client: bool = False,
    max_model_len: int = 0,
) -> Path:
    """Write a classifier as a folder that another engine loads, and that gives the same probabilities there.

    The folder holds the backbone, an adapter merged into it, with the head; the prompt and the limits of pictures;
    `export.json`, which records what was folded into the files, how to serve them and the probabilities of 8 examples;
    `decision.json` and `decide.py`, what is left to clients; and a model card.

    Args:
        classifier: A classifier with a linear head on a tap that other engines have, as `train` with `exportable`
            makes it, or a zero-shot classifier.
        folder: Path of the new folder; an empty one may exist.
        to: The engine: one of `TARGETS`.
        leave_to_client: Leave isotonic calibration and abstention, which no engine applies, to clients.
            The threshold is left to them in any case.
        max_model_len: Most tokens of a request, pictures included, in the command that serves it; 0 means 8192, or as
            many as the largest picture and a text need.

    Returns:
        The folder.

    Raises:
        ConfigError: The engine would give other probabilities, or the folder exists or cannot be written; nothing of it
            is visible then.
    """
    config = ExportConfig(to=to, leave_to_client=leave_to_client, max_model_len=max_model_len)
    place = check_out(folder)
    exportable = exportable_of(classifier, config)
    target = cast(_Target, importlib.import_module(f"qwen_vl_classifier.exporting.{TARGETS[config.to]}"))
    reason = target.refusal(exportable)
    if reason:
        raise ConfigError(f"{spelled('to', config.to)}: {reason}")
    check_room([(place, checkpoint_bytes(exportable))], "the exported model")
    try:
        with new_folder(place) as partial:
            written = target.write(exportable, partial)
            manifest = _manifest(exportable, partial, config, written)
            manifest.write(partial)
            client = page_file(_PACKAGE, written.client).replace(f"from {__package__}.", "from ")
            card = export_card(manifest, written.card, client)
            for name, text in ((_DECIDE, page_file(_PACKAGE, _DECIDE)), (_CLIENT, client), ("README.md", card)):
                (partial / name).write_text(text, encoding="utf-8")
    except QwenVLClassifierError:
        raise
    except (OSError, SafetensorError) as error:  # a full disk is the latter while weights are written
        raise ConfigError(
            f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error}); give a folder that can be "
            "written, on a disk with room"
        ) from error
    return Path(folder)


def check_out(folder: str | os.PathLike[str]) -> Path:
    """Check that a folder is new or empty and can be written, before long work.

    Returns:
        Its path, links resolved.

    Raises:
        ConfigError: It is not, or cannot.
    """
    place = Path(folder).resolve()
    if place.is_dir() and any(place.iterdir()):
        raise ConfigError(f"{folder}: exists and is not empty; give a new or empty folder")
    check_writable(place, replaced=True)
    return place


def _manifest(exportable: Exportable, folder: Path, config: ExportConfig, written: Written) -> ExportManifest:
    classifier, backbone = exportable.classifier, exportable.backbone
    return ExportManifest(
        target=config.to,
        classifier={
            "backbone": backbone.name if backbone.local_folder is None else backbone.local_folder.name,
            "family": backbone.family.model_type,
            "fingerprint": backbone.fingerprint,
            "tap": str(classifier.tap),
        },
        dtype=exportable.dtype,
        tolerance=written.tolerance,
        resized_tolerance=written.resized_tolerance,
        label_names=classifier.label_names,
        folded=written.folded,
        left_to_client=rules_of(classifier, special_tokens(exportable), written.margin_offset),
        differences=written.differences,
        serve=written.serve,
        ask=written.ask,
        examples=write_examples(classifier, folder),
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
    )
