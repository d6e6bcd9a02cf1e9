"""A reader finds a file by its name, and reads it in one sitting: names are unique, files and folders small."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ONE_FILE_PER_VERB = {"cli", "config"}
"""Folders whose files are called after the verbs of the command line."""

MOST_FILES, MOST_LINES = 16, 600


def sources(package: Path) -> list[Path]:
    """Return the Python files of a package that have a name of their own."""
    return sorted(path for path in package.rglob("*.py") if not path.name.startswith("__"))


def repeated_names(package: Path) -> list[str]:
    """Return file names that occur more than once, folders with one file per verb left aside."""
    names = Counter(path.name for path in sources(package) if not ONE_FILE_PER_VERB & set(path.parts))
    return sorted(name for name, times in names.items() if times > 1)


def full_folders(package: Path) -> list[str]:
    """Return folders with more files than a reader keeps in mind."""
    counts = Counter(path.parent.relative_to(package.parent).as_posix() for path in sources(package))
    return sorted(f"{folder}: {count} files" for folder, count in counts.items() if count > MOST_FILES)


def long_files(package: Path) -> list[str]:
    """Return files with more lines than any may have."""
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(package)}
    return sorted(f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MOST_LINES)


@pytest.fixture
def package(tmp_path):
    """A package with a verb and one file that does its work."""
    folder = tmp_path / "package"
    for name in ("__init__.py", "cli/__init__.py", "cli/score.py", "config/score.py", "scoring/score.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n" * MOST_LINES)
    return folder


@pytest.mark.parametrize("rule", [repeated_names, full_folders, long_files])
def test_the_package_keeps_to(rule):
    assert rule(ROOT / "qwen_vl_classifier") == []


def test_verbs_may_be_called_as_what_they_run(package):
    assert repeated_names(package) == full_folders(package) == long_files(package) == []


def test_a_repeated_name_is_seen(package):
    (package / "serving").mkdir()
    (package / "serving" / "score.py").touch()
    assert repeated_names(package) == ["score.py"]


def test_a_full_folder_is_seen(package):
    for number in range(MOST_FILES):
        (package / "scoring" / f"part_{number}.py").touch()
    assert full_folders(package) == [f"package/scoring: {MOST_FILES + 1} files"]


def test_a_long_file_is_seen(package):
    with (package / "scoring" / "score.py").open("a") as file:
        file.write("x = 2\n")
    assert long_files(package) == [f"score.py: {MOST_LINES + 1} lines"]
