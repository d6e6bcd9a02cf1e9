"""The script that asks exported folders by the real library; here the library is recomputed from the files."""

from __future__ import annotations

import shutil

from safetensors.torch import load_file, save_file

from qwen_vl_classifier import export
from tests.exporting.library import client_of
from tests.exporting.linear import linear_classifier
from tests.test_scripts import ROOT


def test_a_difference_fails(tiny_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check_library

    monkeypatch.setattr(check_library, "BATCHES", (8,))

    folder = export(linear_classifier(tiny_backbone, "mean:-1"), tmp_path / "out", "sentence-transformers")
    client_of(folder, monkeypatch)
    assert check_library.main([str(folder)]) == 0
    assert "qwen2_5_vl, mean:-1, float32: largest difference" in capsys.readouterr().out
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    head = changed / "2_Dense" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(head).items()}, head)
    assert check_library.main([str(folder), str(changed)]) == 1
