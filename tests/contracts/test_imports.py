"""Imports go up the layers and never in a circle, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qwen_vl_classifier"

# From the top down: a file may import from its own folder and from those above it, never from below.
LAYERS = (
    "errors",
    "extras",
    "objectives",
    "progress_bars",
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
    "exporting",
    "scoring",
    "serving",
    "labelling",
    "cli",
)
HEAVY = ("torch", "transformers", "sklearn", "pyarrow", "pandas", "fastapi", "PIL", "numpy")
OUTSIDE = ("tests", "tools", "benchmarks", "scripts", "qwen2_5_vl_classifier")


def modules(root: Path) -> dict[str, Path]:
    """Return the modules of a package below a folder, with their files; a package is the module of its `__init__`."""
    found = {}
    for path in (root / "qwen_vl_classifier").rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield each module that a file imports, wherever in the file, with the name taken from it if there is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def graph(root: Path) -> dict[str, set[str]]:
    """Return which modules of the package each of them imports; those who use its root's names are not among them."""
    files = modules(root)
    edges = {}
    for module, path in files.items():
        targets = {f"{base}.{name}" if f"{base}.{name}" in files else base for base, name in imported(path)}
        edges[module] = {target for target in targets if target in files and target != "qwen_vl_classifier"}
    del edges["qwen_vl_classifier"]
    return edges


def layer(module: str) -> int:
    """Return the rank of a module of the package."""
    return LAYERS.index(module.split(".")[1])


def imports_that_go_down(edges: dict[str, set[str]]) -> list[str]:
    """Name every import of a layer below."""
    return [
        f"{module} imports {target}"
        for module, targets in edges.items()
        for target in targets
        if module != "qwen_vl_classifier.__main__" and layer(target) > layer(module)
    ]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, with the first again at the end; empty if there are none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture
def made(tmp_path):
    """Return a function that writes modules of a package and returns the graph of their imports."""

    def write(**sources: str) -> dict[str, set[str]]:
        for name, source in {"": "", **sources}.items():
            path = tmp_path / "qwen_vl_classifier" / f"{name.replace('__', '/') or '__init__'}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return graph(tmp_path)

    return write


def test_every_file_belongs_to_a_layer():
    outside = {path.stem for path in PACKAGE.glob("*.py")} - set(LAYERS)
    assert outside == {"__init__", "__main__"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(LAYERS)


def test_imports_go_up_only():
    edges = graph(ROOT)
    assert sum(map(len, edges.values())) > 400
    assert imports_that_go_down(edges) == []


def test_there_are_no_circles():
    assert circle(graph(ROOT)) == []


def test_an_import_that_goes_down_is_seen(made):
    edges = made(
        backbone__wrong="def f():\n    from qwen_vl_classifier.classifier.head import HeadSpec\n",
        classifier__head="import qwen_vl_classifier.errors",
        errors="",
    )
    assert imports_that_go_down(edges) == [
        "qwen_vl_classifier.backbone.wrong imports qwen_vl_classifier.classifier.head"
    ]


def test_a_circle_inside_a_folder_is_seen(made):
    """However a module is imported: when a function runs, or for types alone."""
    edges = made(
        files__one="from qwen_vl_classifier.files.two import f",
        files__two="def f():\n    import qwen_vl_classifier.files.three",
        files__three="import typing\nif typing.TYPE_CHECKING:\n    from qwen_vl_classifier.files import one",
    )
    assert sorted(set(circle(edges))) == [f"qwen_vl_classifier.files.{name}" for name in ("one", "three", "two")]


def test_modules_that_share_what_they_import_are_no_circle(made):
    edges = made(
        files__one="from qwen_vl_classifier.files import two, three",
        files__two="from qwen_vl_classifier.files.three import f",
        files__three="def f(): ...",
    )
    assert edges["qwen_vl_classifier.files.one"] == {"qwen_vl_classifier.files.two", "qwen_vl_classifier.files.three"}
    assert circle(edges) == []


def test_the_package_stands_alone():
    """It imports nothing that lies beside it in a clone, the original API among it."""
    for path in PACKAGE.rglob("*.py"):
        assert not {module.split(".")[0] for module, _ in imported(path)} & set(OUTSIDE), path


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
