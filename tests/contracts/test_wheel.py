"""The wheel and the source distribution hold what belongs in them and nothing else; the wheel works without a clone."""

from __future__ import annotations

import email.message
import email.policy
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import qwen_vl_classifier
from scripts.release_check import ReleaseError, clone_files, compare_with_clone, copy_clone

ROOT = Path(__file__).resolve().parents[2]
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


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program that sees neither the clone nor the packages that the tests run with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, built offline by the backend that pyproject.toml names."""
    if not (ROOT / ".git").exists():
        pytest.skip("a release is built from a clone, and this is none")
    folder = copy_clone(tmp_path_factory.mktemp("sources"), clone_files())
    builds = "build.build_sdist('built'); build.build_wheel('built')"
    run(sys.executable, "-W", "ignore", "-c", f"from setuptools import build_meta as build; {builds}", cwd=folder)
    return folder / "built"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built) -> Path:
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name), policy=email.policy.default)


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
    assert not [name for name in held if name.endswith((".jsonl", ".log", ".pth"))]


def test_the_source_distribution_holds_the_clone(sdist):
    """Tests, documents and constraints are in it; logs and what only the repository uses are not."""
    files = clone_files()
    assert {"constraints.txt", "tests/nano.py", "tools/tiny/training_log.jsonl"} <= files
    compare_with_clone(sdist, files)


@pytest.mark.parametrize("change", ["tests/nano.py", "notes.txt"])
def test_a_source_distribution_with_other_files_is_refused(sdist, change):
    with pytest.raises(ReleaseError, match=re.escape(change)):
        compare_with_clone(sdist, clone_files() ^ {change})


def test_links_of_the_readme_are_absolute_and_lead_somewhere(metadata):
    """As a package index shows it: pages and pictures at the tag of this version."""
    repository = project()["urls"]["Repository"]
    tag = f"v{qwen_vl_classifier.__version__}"
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    targets = re.findall(r"""(?:\]\(|(?:src|srcset|href)=")([^)\s"]+)""", text)
    assert len(targets) >= 10
    for target in targets:
        assert target.startswith("https://"), target
        if target.startswith(repository):
            view, name = target.removeprefix(f"{repository}/").split("#")[0].split(f"/{tag}/")
            assert (ROOT / name).exists(), target
            assert view == ("raw" if name.endswith((".png", ".svg")) else "blob"), target


def test_links_of_other_kinds():
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    text = '[a](docs/a.md#b) ![c](d.png) [![e](f.png)](#g) <img src="h.png"> <a href="i/">j</a> [k](https://l.org/m)'
    assert setup["absolute_links"](text, "https://host/o/r", "v1") == (
        "[a](https://host/o/r/blob/v1/docs/a.md#b) ![c](https://host/o/r/raw/v1/d.png) "
        "[![e](https://host/o/r/raw/v1/f.png)](https://host/o/r/blob/v1/README.md#g) "
        '<img src="https://host/o/r/raw/v1/h.png"> <a href="https://host/o/r/blob/v1/i/">j</a> [k](https://l.org/m)'
    )


def test_a_copy_without_its_history_has_the_same_files(tmp_path):
    """As a program that checks out commits may leave it."""
    expected = clone_files()
    copy = copy_clone(tmp_path / "copy", expected)
    for name in (".venv/bin/python", "build/x", "qwen_vl_classifier/__pycache__/x.pyc", "demo/data/train.csv", "a.pth"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    assert clone_files(copy) == expected


def test_version_is_that_of_the_package(wheel, sdist):
    version = qwen_vl_classifier.__version__
    assert wheel.name == f"qwen_vl_classifier-{version}-py3-none-any.whl"
    assert sdist.name == f"qwen_vl_classifier-{version}.tar.gz"


def test_the_citation_is_of_this_release():
    """Version, date and address are written once more in CITATION.cff, which other programs read as it is."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == qwen_vl_classifier.__version__
    assert citation["repository-code"] == project()["urls"]["Repository"]
    assert citation["license"] == project()["license"]
    assert citation["authors"] == project()["authors"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d.*)\] - (.*)$", changes, re.MULTILINE)
    assert released[:1] in ([], [(citation["version"], citation["date-released"])])


def test_addresses_of_the_project_share_their_base():
    urls = project()["urls"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


@pytest.mark.soak  # `make release-check` installs the wheel with its dependencies, and runs more
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
