"""Build the release, check it, and use it in a clean environment as its users will.

    python scripts/release_check.py [--python /path/to/python3.13]

In a temporary folder, which is removed at the end:

1. builds the source distribution from the files of the clone, and the wheel from the source distribution
2. compares the source distribution with the clone, and runs `twine check --strict`
3. installs the wheel with constraints.txt in a new environment and runs `demo` there, from another folder
4. runs a part of the tests in the unpacked source distribution

Needs a package registry. Exit status: 0 if everything passes, otherwise 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

NOT_RELEASED = re.compile(r"\.(ci|github)/|\.(docker|git)ignore$|\.pre-commit-config\.yaml$|tools/tiny/.*\.jsonl$")
"""Files of the clone that the source distribution leaves out, by their path from its root."""

MADE_BY_BUILD = re.compile(r"PKG-INFO$|setup\.cfg$|[^/]+\.egg-info/")
"""Files that a build adds to the source distribution."""

TESTS = ("tests/data", "tests/test_extras.py", "tests/contracts/test_public_names.py")
"""Tests that run in the unpacked source distribution: a few seconds, with data, images and the public names."""


class ReleaseError(Exception):
    """The release must not be published; the message says why."""


def clone_files(root: Path = ROOT) -> set[str]:
    """List the files of a clone, also those not committed yet, by their path from its root.

    A copy without its history, or one that git does not trust, has the files that `.gitignore` does not name.
    """
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout  # noqa: S603 - no shell
    except (OSError, subprocess.CalledProcessError):
        patterns = [".git", *(root / ".gitignore").read_text(encoding="utf-8").split()]
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
        return {name for name in names if (root / name).is_file() and not _is_ignored(name, patterns)}
    return {name for name in listed.split("\0") if name and (root / name).is_file()}


def _is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a path matches a pattern: of a name anywhere, or of one at the root, as `.gitignore` has here."""
    first, *_ = parts = name.split("/")
    return any(
        fnmatch(first, pattern.strip("/"))
        if pattern.startswith("/")
        else any(fnmatch(part, pattern.strip("/")) for part in parts)
        for pattern in patterns
    )


def copy_clone(folder: Path, files: set[str], root: Path = ROOT) -> Path:
    """Copy the files of a clone, so that a build neither sees nor leaves anything else there."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / name)
    return folder


def compare_with_clone(sdist: Path, clone: set[str]) -> None:
    """Check that a source distribution holds the clone's files and nothing else.

    Raises:
        ReleaseError: A file is missing, or one is there that belongs to no release.
    """
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    held = {name for name in names if not MADE_BY_BUILD.match(name)}
    expected = {name for name in clone if not NOT_RELEASED.match(name)}
    if held != expected:
        raise ReleaseError(
            f"{sdist.name} lacks {sorted(expected - held) or 'nothing'} and should not hold "
            f"{sorted(held - expected) or 'anything else'}; correct MANIFEST.in"
        )


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    """Run a program with its output shown, without Python's settings of this process."""
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, cwd=cwd, env=environment | variables, check=True)  # noqa: S603 - no shell


def check(folder: Path, python: str) -> None:
    """Build, check, install and use the release in a folder of its own."""
    files, build, sdists = clone_files(), folder / "build", folder / "sdist"
    run(sys.executable, "-m", "build", "--quiet", "--outdir", build, copy_clone(folder / "clone", files), cwd=folder)
    (sdist,), (wheel,) = build.glob("*.tar.gz"), build.glob("*.whl")
    compare_with_clone(sdist, files)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=folder)

    run(python, "-m", "venv", folder / "environment", cwd=folder)
    programs, elsewhere = folder / "environment" / "bin", folder / "elsewhere"
    elsewhere.mkdir()
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=elsewhere)
    run(*pip, "check", cwd=elsewhere)
    run(programs / "python", "-m", "qwen_vl_classifier", "--version", cwd=elsewhere)
    run(programs / "qwen-vl-classifier", "demo", cwd=elsewhere, HF_HUB_OFFLINE="1")

    with tarfile.open(sdist) as archive:
        archive.extractall(sdists, filter="data")
    (unpacked,) = sdists.iterdir()
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not soak", *TESTS)
    run(sys.executable, *tests, cwd=unpacked, PYTHONPATH=str(unpacked), OMP_NUM_THREADS="1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--python", default=sys.executable, metavar="PROGRAM", help="the Python of the clean environment"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="release-check-") as folder:
        try:
            check(Path(folder), options.python)
        except ReleaseError as error:
            print(f"release-check: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:
            print(f"release-check: failed: {shlex.join(map(str, error.cmd))}", file=sys.stderr)
            return 1
    print("release-check: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
