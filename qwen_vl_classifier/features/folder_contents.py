"""What a folder of features holds, read from its files alone."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vl_classifier.features.feature_files import (
    DAMAGED,
    OLDER_NAME,
    SHARD_NAME,
    DamagedShardError,
    ForeignShardError,
    read_facts,
)


def summarise(folder: str | os.PathLike[str], *, progress: bool = False) -> dict[str, Any]:
    """Count what a folder of features holds, and check every byte of it; nothing is changed.

    Args:
        folder: Where the features lie.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        `shards` and their `bytes` on disk; `taps`, `types` and `backbones`, each with the number of features by name
        (of a backbone: its name and its fingerprint, with a space between them); and by file name what is not used:
        `damaged` and `foreign`, which includes files of an older format.
    """
    taps: Counter[str] = Counter()
    types: Counter[str] = Counter()
    backbones: Counter[str] = Counter()
    names = sorted(path.name for path in Path(folder).iterdir())
    damaged = [name for name in names if name.endswith(DAMAGED)]
    foreign = [name for name in names if OLDER_NAME.fullmatch(name)]
    shards = [name for name in names if SHARD_NAME.fullmatch(name)]
    used = size = 0
    for name in tqdm(shards, desc="check", unit="shard", delay=2, disable=not progress):
        try:
            facts = read_facts(Path(folder, name))
        except DamagedShardError:
            damaged.append(name)
        except ForeignShardError:
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
