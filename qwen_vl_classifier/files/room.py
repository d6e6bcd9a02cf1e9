"""Check before long work that its result can be written, and that there is enough free space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.whole import partial_name

_GIGABYTE = 10**9


def check_writable(folder: Path, *, replaced: bool = False) -> None:
    """Check that a folder can be created and written to; the attempt leaves nothing behind.

    Args:
        folder: The folder; it and those above it may exist.
        replaced: Whether a new folder will replace an existing one as a whole.

    Raises:
        ConfigError: The folder cannot be written; the message says why.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, expected a folder; give another name")
    if replaced and os.path.ismount(folder):
        raise ConfigError(f"{folder}: is where a disk is mounted, which cannot be replaced; give a folder inside it")
    inside = folder if folder.exists() and not replaced else folder.parent
    made: list[Path] = []
    try:
        for part in [*reversed(inside.parents), inside]:
            if not part.exists():
                part.mkdir()
                made.append(part)
        attempt = inside / partial_name(folder.name)  # which is longer than the name itself
        attempt.mkdir()
        attempt.rmdir()
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror or type(error).__name__}); give a folder that can be written"
        ) from None
    finally:
        for part in reversed(made):
            with suppress(OSError):
                part.rmdir()


def check_inner_folders(out: Path, *names: str) -> None:
    """Check that folders inside a folder of output are folders where they exist, and no links to other places.

    Files are never written through a link, since each is written under a new name and renamed. Folders would be.

    Raises:
        ConfigError: One is a link or a file.
    """
    for name in names:
        inner = out / name
        if inner.is_symlink() or (inner.exists() and not inner.is_dir()):
            raise ConfigError(f"{inner}: is a link or a file, expected a folder; remove it, or write to another place")


def check_apart(out: Path, **others: str | os.PathLike[str] | None) -> None:
    """Check that no folder in use is inside one that saving replaces.

    Args:
        out: The folder that is replaced.
        others: The folders in use, each under the name of its option.

    Raises:
        ConfigError: A folder in use is inside it.
    """
    for name, other in others.items():
        if other is not None and Path(other).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{spelled(name, str(other))} lies in {out}, which is replaced as a whole when the classifier is "
                "saved; give a folder outside it"
            )


def check_room(needs: Iterable[tuple[Path, int]], what: str) -> None:
    """Check that disks have enough free space.

    Args:
        needs: Folders, which need not exist, and the bytes that will be written to each.
        what: What will be written, for the message.

    Raises:
        ConfigError: A disk has too little free space.
    """
    total: dict[int, int] = {}
    for folder, size in needs:
        place = next(part for part in (folder.resolve(), *folder.resolve().parents) if part.exists())
        disk = place.stat().st_dev
        total[disk] = total.get(disk, 0) + size
        free = shutil.disk_usage(place).free
        if total[disk] > free:
            raise ConfigError(
                f"{folder}: {what} will take about {total[disk] / _GIGABYTE:.2g} GB, and {free / _GIGABYTE:.2g} GB "
                "are free there; free some space, or give a folder on another disk"
            )
