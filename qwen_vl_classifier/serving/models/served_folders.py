"""Find the folders of the classifiers and panels to serve, and their names, without loading torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_vl_classifier.classifier.panel_folder import is_panel
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ConfigError

MANIFEST = "classifier.json"
"""The file by which the folder of a saved classifier is known; `classifier.artifact` writes it."""

_LONGEST_NAME = 128


def served_folders(config: ServeConfig) -> dict[str, Path]:
    """Return the folders of the classifiers that were listed, by the name under which each is served.

    What a watched folder holds is not among them, unless it was listed too.

    Raises:
        ConfigError: No classifiers and no folder in which some may come, or two classifiers of the same name.
    """
    if not (config.classifiers or config.watch or config.models_root):
        raise ConfigError("no classifiers to serve: give the folder of at least one, or watch a folder of them")
    folders: dict[str, Path] = {}
    for given in config.classifiers:
        folder = Path(given).resolve()
        other = folders.setdefault(folder.name, folder)
        if other is not folder:
            raise _collision(other, folder)
        if config.watch and (watched := Path(config.watch, folder.name)).exists() and watched.resolve() != folder:
            raise _collision(folder, watched)
    return folders


def check_roots(config: ServeConfig) -> None:
    """Make sure that the folders in which classifiers may come are there.

    Raises:
        ConfigError: One is not.
    """
    for option in ("watch", "models_root"):
        folder = getattr(config, option)
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{option} {folder}: no such folder; give the folder that holds saved classifiers")


def is_name(name: str) -> bool:
    """Tell whether a classifier can be served under a name: answers, logs and URLs must be able to hold it."""
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable() and "/" not in name and not name.startswith(".")


def is_classifier(folder: Path) -> bool:
    """Tell whether a folder holds a saved classifier or panel; one whose name begins with a dot is not complete yet."""
    try:
        return not folder.name.startswith(".") and ((folder / MANIFEST).is_file() or is_panel(folder))
    except OSError:  # it is somebody else's
        return False


def folder_below(roots: Sequence[Path], given: str) -> Path | None:
    """Return the folder of a saved classifier below one of several folders, without links; `None` if it is elsewhere.

    Args:
        roots: Where it may be.
        given: Its path, absolute or relative to one of `roots`.
    """
    for root in map(os.path.realpath, roots):
        try:
            folder = Path(os.path.realpath(Path(root, given)))
            if root in map(str, folder.parents) and is_classifier(folder):
                return folder
        except (OSError, ValueError):  # too long, or it holds a NUL
            return None
    return None


def _collision(one: Path, other: Path) -> ConfigError:
    return ConfigError(f"{one} and {other} would both be served as {one.name!r}; rename one of the folders")
