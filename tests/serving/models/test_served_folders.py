"""Names and folders of what is served, and the paths by which somebody tries to get elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.serving.models.served_folders import check_roots, folder_below, is_name, served_folders


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "classifier.json").write_text("{}")
    return folder


def test_a_folder_may_be_listed_and_watched(tmp_path: Path) -> None:
    claims = put(tmp_path / "watched" / "claims")
    config = ServeConfig(classifiers=(str(claims), str(tmp_path / "other")), watch=str(tmp_path / "watched"))
    assert served_folders(config) == {"claims": claims, "other": tmp_path / "other"}


def test_names_that_collide(tmp_path: Path) -> None:
    put(tmp_path / "watched" / "claims")
    config = ServeConfig(classifiers=(str(put(tmp_path / "claims")),), watch=str(tmp_path / "watched"))
    with pytest.raises(ConfigError, match=r"claims and .*watched/claims would both be served as 'claims'; rename one"):
        served_folders(config)


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_VL_CLASSIFIER_ADMIN_KEY", "key")
    for option in ("watch", "models_root"):
        config = ServeConfig(**{option: str(tmp_path / "none")})
        assert served_folders(config) == {}
        with pytest.raises(ConfigError, match=rf"^{option} .*none: no such folder; give the folder that holds"):
            check_roots(config)
    with pytest.raises(ConfigError, match="no classifiers to serve: give the folder of at least one, or watch a fold"):
        served_folders(ServeConfig())


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a\nb", "a\udc80", "x" * 129])
def test_names_that_cannot_be_served(name: str) -> None:
    assert not is_name(name)
    assert is_name("a name, Größe 2")


def test_paths_stay_below_their_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inner, outer = put(root / "claims"), put(tmp_path / "outer" / "claims")
    put(root / "deep" / "er" / "claims")
    put(tmp_path / "root2")
    put(root / ".claims.partial")
    (root / "empty").mkdir()
    (root / "out").symlink_to(outer)
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    (root / "in").symlink_to(inner)
    below = [root]
    for given in ("claims", str(inner), "./claims/", "deep/../claims", "in", str(root / "in")):
        assert folder_below(below, given) == inner, given
    assert folder_below(below, "deep/er/claims") == root / "deep" / "er" / "claims"
    (tmp_path / "link").symlink_to(root)
    assert folder_below([tmp_path / "link"], "claims") == inner
    assert folder_below([tmp_path / "none", root], "claims") == inner
    for given in (
        *("../outer/claims", str(outer), "out", "up/outer/claims", "loop", "empty", "", ".", "..", "/", "../root2"),
        *("claims\0", "x" * 5000, "claims/classifier.json", ".claims.partial", str(tmp_path / "root2"), "~", "$HOME"),
        *(os.path.relpath(outer, root), "claims/../../outer/claims", "file:///etc", "\udc80"),
    ):
        assert folder_below(below, given) is None, given
