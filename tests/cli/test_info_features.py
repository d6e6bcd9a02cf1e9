"""`info` on a folder of features: rows, taps, bytes, backbone, and what is damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qwen_vl_classifier.cli.main import main


@pytest.fixture
def features(tmp_path, capsys) -> Path:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"image": None, "text": f"text {number}"}) + "\n" for number in range(3)))
    for dtype in ("float32", "float16"):
        command = ["extract", str(data), "--features", str(tmp_path / "features"), "--feature-dtype", dtype]
        taps = "mean:-1,text:2" if dtype == "float32" else "mean:-1,last:3"
        assert main([*command, "--taps", taps, "--device", "cpu", "--dtype", "float32"]) == 0
    capsys.readouterr()
    return tmp_path / "features"


def facts(capsys, folder: Path) -> dict[str, str]:
    assert main(["info", str(folder)]) == 0
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_what_is_kept(features, tiny_backbone, capsys):
    assert facts(capsys, features) == {
        "features": str(features),
        "shards": "2",
        "bytes": f"{sum(path.stat().st_size for path in features.iterdir()):,}",
        "rows at last:3": "3",
        "rows at mean:-1": "3",
        "rows at text:2": "3",
        "features in float16[128]": "3",
        "features in float32[128]": "6",
        "backbones": f"builtin:tiny {tiny_backbone.fingerprint}",
        "damaged": "none",
    }


def test_what_is_damaged_is_named_and_left_as_it_is(features, capsys):
    first, second = sorted(features.iterdir())
    second.write_bytes(second.read_bytes()[:-1])
    first.rename(f"{first}.damaged")
    before = sorted(features.iterdir())
    seen = facts(capsys, features)
    assert seen["shards"] == "0"
    assert seen["damaged"] == f"{first.name}.damaged, {second.name}"
    assert seen["backbones"] == "none"
    assert sorted(features.iterdir()) == before
