"""Files that others may have written are opened in one place: what reads files elsewhere is listed here, with why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qwen_vl_classifier"

READERS = {"open", "read_text", "read_bytes", "load_file", "safe_open", "memory_map", "ParquetFile", "fromfile"}
"""Names of functions and methods that read a file by its path, whatever they belong to."""

ELSEWHERE = {
    "files/api_keys.py": "a file of the user's own, which may be a pipe",
    "files/bounded.py": "the one place",
    "files/locking.py": "locks, without following links",
    "files/object_stores.py": "objects of a store, which are no files of this machine",
    "files/pages.py": "templates of this package",
    "files/storage.py": "through `open_regular_file`",
    "files/whole.py": "files that it has just made",
    "backbone/checkpoint/language_head.py": "weights that `read_headers` has checked",
    "cli/options.py": "a file of the user's own, which may be a pipe",
    "cli/shared/output.py": "/dev/null",
    "data/parquet.py": "given an open file",
    "extras.py": "what the installer of this package recorded",
    "exporting/checking.py": "a connection, which is no file",
    "exporting/sentence_transformers_client.py": "a program of its own, copied beside the files that it reads",
    "exporting/transformers_client.py": "a program of its own, copied beside the files that it reads",
    "exporting/vllm_client.py": "a program of its own, copied beside the files that it reads",
    "labelling/answers/journal.py": "opened for writing at its end, without following links",
    "scoring/plan.py": "through storage",
    "scoring/reading.py": "through storage",
    "scoring/run.py": "opens a folder",
    "scoring/tables/raw_tables.py": "given an open file",
    "serving/decoding_child.py": "/dev/null",
    "serving/media.py": "below `--image-root`, part by part, without following links",
    "training/finetuning/augmentation.py": "bytes in memory",
}


def reads(source: str) -> set[str]:
    """Return the readers that a file of Python calls, those after a check in the same function left out."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        names = [name_of(call) for call in ast.walk(function) if isinstance(call, ast.Call)]
        if not {"check_tensor_file", "open_regular_file", "read_file", "read_json"} & set(names):
            found |= READERS & set(names)
    return found


def name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def bypasses(package: Path) -> dict[str, set[str]]:
    """Return the files that read files by themselves, and how."""
    files = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    return {name: found for name, source in sorted(files.items()) if (found := reads(source))}


def test_files_are_read_in_one_place():
    assert bypasses(PACKAGE).keys() - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() - bypasses(PACKAGE).keys() == set()


def test_nothing_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "load":
                assert getattr(call.func.value, "id", "") not in {"pickle", "torch", "np", "numpy"}, path


@pytest.mark.parametrize(
    "body", ["open(path)", "path.open()", "path.read_text()", "safe_open(path)", "pq.ParquetFile(path)"]
)
def test_a_reader_is_seen(tmp_path, body):
    (tmp_path / "new.py").write_text(f"def read(path):\n    return {body}\n")
    assert bypasses(tmp_path)
    (tmp_path / "new.py").write_text(f"def read(path):\n    open_regular_file(path).close()\n    return {body}\n")
    assert not bypasses(tmp_path)
