"""The wheel holds the package with its data and nothing else, and works where there is no clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import qwen_vl_classifier

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qwen2_5_vl_classifier.py", "qwen_vl_classifier", "tools", "tests")

USE = """
import sys
from pathlib import Path
import qwen_vl_classifier
from qwen_vl_classifier import Backbone, Classifier, TrainConfig, evaluate, load_examples, train, write_report
from qwen_vl_classifier.scenes.statements import write_dataset
from qwen_vl_classifier.serving.app import create_app
import qwen2_5_vl_classifier

assert Path(qwen_vl_classifier.__file__).is_relative_to(sys.prefix), qwen_vl_classifier.__file__
assert Path(qwen2_5_vl_classifier.__file__).is_relative_to(sys.prefix), qwen2_5_vl_classifier.__file__
rows = load_examples(write_dataset("data", split="test", scenes=12, per_scene=2))
backbone = Backbone.load("builtin:tiny", device="cpu")
config = TrainConfig(taps="mean:-1", heads="linear", folds=2)
folder = train(rows, backbone=backbone, config=config).classifier.save("classifier")
classifier = Classifier.load(folder, device="cpu")
print(classifier.predict_proba(rows).shape, write_report(evaluate(classifier, rows), "report"))
"""


def copied_sources(folder: Path) -> Path:
    """Copy what a build may read, so that it leaves nothing in the clone."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pth")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program that sees neither the clone nor the packages that the tests run with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline by the build backend that pyproject.toml names."""
    folder = copied_sources(tmp_path_factory.mktemp("sources"))
    build = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    run(sys.executable, "-W", "ignore", "-c", f"import os; os.mkdir('wheels'); {build}", cwd=folder)
    (path,) = (folder / "wheels").iterdir()
    return path


def test_it_holds_the_package_and_nothing_else(wheel):
    """Every page, style sheet and weight is in it; tools, tests and logs of pre-training are not."""
    package = ROOT / "qwen_vl_classifier"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    expected = {"qwen2_5_vl_classifier.py", *(name for name in files if "__pycache__" not in name)}
    held = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not re.match(r"qwen_vl_classifier-[^/]+\.dist-info/", name)
    }
    assert held == expected
    assert not [name for name in held if name.endswith((".jsonl", ".pth"))]


def test_version_is_that_of_the_package(wheel):
    assert wheel.name == f"qwen_vl_classifier-{qwen_vl_classifier.__version__}-py3-none-any.whl"


@pytest.mark.long
def test_it_works_in_a_clean_environment(wheel, tmp_path):
    """Installed beside the dependencies, without the clone: train, save, load, report."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=tmp_path)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # Folders that a .pth file names are searched last, and their own .pth files (of an editable install) are not read.
    (packages / "dependencies.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    assert qwen_vl_classifier.__version__ in run(environment / "bin" / "qwen-vl-classifier", "--version", cwd=tmp_path)
    assert run(python, "-W", "error", "-c", USE, cwd=tmp_path).startswith("(24, 2) report")
    with pytest.raises(AssertionError, match="No module named 'tools'"):
        run(python, "-c", "import tools", cwd=tmp_path)
