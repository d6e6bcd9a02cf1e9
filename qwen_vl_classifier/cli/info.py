"""`info`: describe a saved classifier or panel, a backbone or a folder of features."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.errors import one_line

_LONGEST_NAME = 60  # characters
_LIBRARIES = ("qwen-vl-classifier", "torch", "transformers", "pillow", "numpy", "scikit-learn")


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "info",
        help="describe a classifier, a backbone or this installation",
        description="Describe a classifier, a backbone, kept features or, without an argument, this installation.",
        usage="%(prog)s [WHAT] [options]",
        example="qwen-vl-classifier info demo/classifier",
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="WHAT",
        help="folder of a classifier, a panel, features or a checkpoint; a name on the hub; or builtin:tiny",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Print facts, one in a line."""
    from qwen_vl_classifier.classifier.panel_folder import is_panel

    if flags.what is None:
        facts = _installation()
    elif (Path(flags.what) / "classifier.json").is_file():
        facts = _classifier(flags.what)
    elif is_panel(flags.what):
        facts = _panel(flags.what)
    elif any(Path(flags.what).glob("*.parquet*")):
        facts = _features(flags.what, flags.progress)
    else:
        facts = _backbone(flags.what)
    facts = {one_line(name, _LONGEST_NAME): value for name, value in facts.items()}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {one_line(value)}")
    return 0


def _installation() -> dict[str, Any]:
    import torch

    from qwen_vl_classifier.backbone.devices import device_name, gpu_names

    devices = [device_name(torch.device(name)) for name in gpu_names()]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "GPUs": ", ".join(devices) or "none",
        "CPU threads": torch.get_num_threads(),
    }


def _classifier(folder: str) -> dict[str, Any]:
    from qwen_vl_classifier.backbone.families import FAMILIES
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.model_card import training_facts

    manifest = read_manifest(folder)
    backbone = manifest.backbone
    training = {name.replace("_", " "): value for name, value in training_facts(manifest.training).items()}
    return {
        "classifier": folder,
        "backbone": f"{backbone['name']} ({FAMILIES[backbone['family']].name}, {backbone['dtype']})",
        **({"decoder layers": backbone["layers"]} if backbone.get("layers") else {}),
        "where it was": backbone.get("folder") or backbone["revision"] or "as named",
        "quantised": f"to {backbone['quantization']}" if backbone["quantization"] else "no",
        "fine-tuned": manifest.tuning,
        "fingerprint": backbone["fingerprint"],
        "tap": manifest.tap,
        "head": manifest.head.kind,
        "labels": f"0 = {manifest.label_names[0]}, 1 = {manifest.label_names[1]}",
        "threshold": f"{manifest.threshold:g}",
        "temperature": f"{manifest.temperature:.4g}",
        "isotonic": "none" if manifest.isotonic is None else f"a curve of {len(manifest.isotonic[0])} knots",
        "abstains": "never"
        if manifest.abstention is None
        else f"from {manifest.abstention[0]} to {manifest.abstention[1]}",
        "pixel limits": f"{manifest.pixel_limits[0]} to {manifest.pixel_limits[1]}",
        **_thinking(manifest.prompt),
        **training,
        **{f"made with {name}": version for name, version in manifest.versions.items()},
    }


def _panel(folder: str) -> dict[str, Any]:
    from qwen_vl_classifier.backbone.families import FAMILIES
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.model_card import accuracy_text, training_facts
    from qwen_vl_classifier.classifier.panel_folder import read_panel

    panel = read_panel(folder)
    classifiers = [read_manifest(one) for one in panel.folders]
    backbone = classifiers[0].backbone
    kind = "class" if panel.one_of else "label"
    lines = {}
    for number, one in enumerate(classifiers):
        parts = [f"{panel.names[number]} in {panel.folders[number].name}/", f"{one.head.kind} head at {one.tap}"]
        parts += [] if panel.one_of else [f"threshold {one.threshold:g}"]
        lines[f"{kind} {number + 1}"] = ", ".join(filter(None, [*parts, accuracy_text(one.training.get("estimate"))]))
    return {
        "panel": folder,
        "answers": f"one of {len(classifiers)} classes"
        if panel.one_of
        else f"{len(classifiers)} labels, each for itself",
        "backbone": f"{backbone['name']} ({FAMILIES[backbone['family']].name}, {backbone['dtype']})",
        "fingerprint": backbone["fingerprint"],
        **({"temperature": f"{panel.temperature:.4g}"} if panel.one_of else {}),
        **lines,
        **{name.replace("_", " "): value for name, value in training_facts(panel.training).items()},
        **{f"made with {name}": version for name, version in panel.versions.items()},
    }


def _features(folder: str, progress: bool) -> dict[str, Any]:
    from qwen_vl_classifier.features.folder_contents import summarise

    summary = summarise(folder, progress=progress)
    return {
        "features": folder,
        "shards": f"{summary['shards']:,}",
        "bytes": f"{summary['bytes']:,}",
        **{f"rows at {tap}": f"{count:,}" for tap, count in summary["taps"].items()},
        **{f"features in {kind}": f"{count:,}" for kind, count in summary["types"].items()},
        "backbones": ", ".join(summary["backbones"]) or "none",
        "damaged": ", ".join(summary["damaged"]) or "none",
        **({"not read": ", ".join(summary["foreign"])} if summary["foreign"] else {}),
    }


def _backbone(name: str) -> dict[str, Any]:
    from qwen_vl_classifier.backbone.backbone import Backbone

    backbone = Backbone.load(name, device="cpu")
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    return {
        "backbone": name,
        "family": backbone.family.name,
        "decoder layers": backbone.describe_layers(),
        "hidden size": backbone.hidden_size,
        "parameters": f"{parameters / 1e6:,.1f} million, without language head",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "pixel limits": f"{backbone.pixel_limits[0]} to {backbone.pixel_limits[1]}",
        "chat template": "the checkpoint's own" if backbone.processor.brings_template else "a default",
        **_thinking(backbone.processor.chat_template),
        "longest text": f"{backbone.processor.max_text_tokens or 'any number of'} tokens",
        "passed over": _parts(backbone.passed_over) or "no weights",
        "fingerprint": backbone.fingerprint,
    }


def _thinking(template: str) -> dict[str, str]:
    from qwen_vl_classifier.backbone.prompts.thinking import thinking_in

    said = thinking_in(template)
    return {"thinking": said} if said else {}


def _parts(names: Sequence[str]) -> str:
    """Name the parts of a model to which weights belong, and how many each has."""
    from qwen_vl_classifier.backbone.checkpoint.weight_names import part_passed_over

    return ", ".join(f"{part} ({count})" for part, count in Counter(map(part_passed_over, names)).items())
