"""Summarise a folder of features from its files alone."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from qwen_vl_classifier.features.feature_files import (
    DAMAGED,
    FEATURE_FILE,
    DamagedFileError,
    ForeignFileError,
    read_facts,
)
from qwen_vl_classifier.progress_bars import tqdm


def summarise(folder: str | os.PathLike[str], *, progress: bool = False) -> dict[str, Any]:
    """Count the features in a folder, and check every byte of its files; nothing is changed.

    Args:
        folder: The folder of a `FeatureStore`.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        `shards`, the number of files, and their `bytes` on disk; `taps`, `types` and `backbones`, each with the number
        of features by name (a backbone's name and fingerprint, separated by a space); and the names of files that are
        not used, `damaged` and `foreign`.
    """
    taps: Counter[str] = Counter()
    types: Counter[str] = Counter()
    backbones: Counter[str] = Counter()
    names = sorted(path.name for path in Path(folder).iterdir())
    damaged = [name for name in names if name.endswith(DAMAGED)]
    foreign: list[str] = []
    shards = [name for name in names if FEATURE_FILE.fullmatch(name)]
    used = size = 0
    for name in tqdm(shards, desc="check", unit="shard", delay=2, disable=not progress):
        try:
            facts = read_facts(Path(folder, name))
        except DamagedFileError:
            damaged.append(name)
        except (ForeignFileError, OSError):
            foreign.append(name)
        else:
            used += 1
            size += facts.size
            taps.update(facts.taps)
            types[f"{facts.dtype}[{facts.width}]"] += len(facts.taps)
            backbones[f"{facts.origin.backbone} {facts.origin.fingerprint}"] += len(facts.taps)
    return {
        "shards": used,
        "bytes": size,
        "taps": dict(sorted(taps.items())),
        "types": dict(types),
        "backbones": dict(backbones),
        "damaged": damaged,
        "foreign": foreign,
    }
