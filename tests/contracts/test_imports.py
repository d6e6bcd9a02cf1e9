"""The direction of imports is law, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qwen_vl_classifier"

# From the top down: a file may import from its own folder and from those above it, never from below.
LAYERS = (
    "errors",
    "extras",
    "objectives",
    "config",
    "files",
    "images",
    "data",
    "scenes",
    "backbone",
    "features",
    "classifier",
    "training",
    "evaluation",
    "scoring",
    "serving",
    "cli",
)
HEAVY = ("torch", "transformers", "sklearn", "pyarrow", "pandas", "fastapi", "PIL", "numpy")


def layer_of(module: str) -> int:
    """Return the rank of a module of the package."""
    return LAYERS.index(module.split(".")[1])


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("qwen_vl_classifier."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "qwen_vl_classifier":
                yield from (f"qwen_vl_classifier.{a.name}" for a in node.names if a.name in LAYERS)
            elif node.module.startswith("qwen_vl_classifier."):
                yield node.module


def violations(files: dict[str, Path]) -> list[str]:
    """Name every import that goes down."""
    return [
        f"{module} imports {target}"
        for module, path in files.items()
        for target in imports(path)
        if layer_of(target) > layer_of(module)
    ]


def package_files() -> dict[str, Path]:
    """Return every module in a layer, with its file."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 1 and parts[1] in LAYERS:
            files[".".join(parts)] = path
    return files


def test_every_file_belongs_to_a_layer():
    outside = {path.stem for path in PACKAGE.glob("*.py")} - set(LAYERS)
    assert outside == {"__init__", "__main__"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(LAYERS)


def test_imports_go_up_only():
    assert violations(package_files()) == []


def test_a_violation_would_be_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from qwen_vl_classifier.classifier.head import HeadSpec\n")
    assert violations({"qwen_vl_classifier.backbone.wrong": wrong}) == [
        "qwen_vl_classifier.backbone.wrong imports qwen_vl_classifier.classifier.head"
    ]


def test_the_original_api_is_used_by_nothing_in_the_package():
    for path in PACKAGE.rglob("*.py"):
        assert "import qwen2_5_vl_classifier" not in path.read_text(encoding="utf-8")
        assert "from qwen2_5_vl_classifier" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "statement",
    [
        "import qwen_vl_classifier",
        "from qwen_vl_classifier.cli.main import build_parser; build_parser()",
        "import qwen_vl_classifier.errors, qwen_vl_classifier.config.serve, qwen_vl_classifier.extras",
        "import qwen_vl_classifier.objectives",
    ],
)
def test_importing_is_cheap(statement):
    code = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.strip() == "[]"
