"""Ask exported folders by the real library: the probabilities of their reference examples, in batches of several sizes.

    python scripts/check_library.py FOLDER ...    # folders of export --to transformers or --to sentence-transformers

It runs in an environment of the library, without qwen-vl-classifier: each folder's own client.py is run, and what it
answers is compared with export.json. The exit status is 1 where a difference is larger than the folder's tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from PIL import Image

BATCHES = (1, 3, 8)


def client_of(folder: Path) -> Callable[[Sequence[Any]], list[float]]:
    """Run a folder's client.py, and return its function that asks the model."""
    sys.path.insert(0, str(folder))  # for decide.py beside it
    try:
        spec = spec_from_file_location("client", folder / "client.py")
        if spec is None or spec.loader is None:
            raise SystemExit(f"{folder}: no client.py in it; give a folder that export has written for a library")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    found: Callable[[Sequence[Any]], list[float]] = module.probabilities
    return found


def differences(folder: Path) -> dict[int, list[float]]:
    """Return for each size of a batch how far each answer is from the classifier's."""
    examples = json.loads((folder / "export.json").read_text(encoding="utf-8"))["examples"]
    rows = [([Image.open(folder / name) for name in row["images"]], row["text"]) for row in examples]
    probabilities, found = client_of(folder), {}
    for size in BATCHES:
        answers = [p for start in range(0, len(rows), size) for p in probabilities(rows[start : start + size])]
        found[size] = [abs(p - row["probability"]) for p, row in zip(answers, examples, strict=True)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check folders, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    failed = False
    for folder in parser.parse_args(arguments).folders:
        manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        largest = max(difference for found in differences(folder).values() for difference in found)
        failed |= not largest <= manifest["tolerance"]  # NaN fails too
        facts = manifest["target"], manifest["classifier"]["family"], manifest["classifier"]["tap"], manifest["dtype"]
        print(f"{folder}: {', '.join(facts)}: largest difference {largest:.1e}, tolerance {manifest['tolerance']:g}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
