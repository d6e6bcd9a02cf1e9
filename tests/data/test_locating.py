"""Names of pictures to paths and URLs: confined to a folder here and in a store, shown without what is secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_vl_classifier.data.locating import CellError, file_locator, store_locator


def refusal(locate, name: str) -> CellError:
    with pytest.raises(CellError) as caught:
        locate(name)
    return caught.value


def test_a_file_is_found_in_its_folder_only(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "b.png"):
        (tmp_path / name).touch()
    locate = file_locator(tmp_path / "in", confined=True)
    assert locate("a.png") == str(tmp_path / "in" / "a.png")
    assert [refusal(locate, name).code for name in ("../b.png", str(tmp_path / "b.png"), "gone.png", "")] == [
        "image_refused",
        "image_refused",
        "image_missing",
        "invalid_row",
    ]
    assert file_locator(tmp_path / "in", confined=False)("../b.png") == str(tmp_path / "in" / "../b.png")


def test_without_a_folder_paths_begin_where_python_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    assert file_locator(None, confined=True)("a.png") == "a.png"


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("a.png", "s3://bucket/data/a.png"),
        ("deep/./a.png", "s3://bucket/data/deep/a.png"),
        ("a b#1?.png", "s3://bucket/data/a b#1?.png"),
        ("s3://bucket/data/deep/a.png", "s3://bucket/data/deep/a.png"),
    ],
)
def test_a_picture_in_a_store_has_a_url(name, url):
    assert store_locator("s3://bucket/data", confined=True)(name) == url


def test_a_store_may_be_left_for_no_other_kind_of_place():
    free, confined = (store_locator("s3://bucket/data", confined=confined) for confined in (False, True))
    assert free("../../../a.png") == "s3://bucket/a.png"
    assert free("/a.png") == "s3://bucket/a.png"
    assert free("s3://other/a.png") == "s3://other/a.png"
    for name in ("../a.png", "/a.png", "s3://other/a.png", "s3://bucket/data2/a.png", "s3://bucket/data/../a.png"):
        assert refusal(confined, name).code == "image_refused"
    for locate in (free, confined):
        assert refusal(locate, "gs://bucket/data/a.png").code == "image_refused"
        assert refusal(locate, "a\0.png").code == "image_missing"
        assert refusal(locate, "").code == "invalid_row"


@pytest.mark.parametrize("locate", [file_locator(None, confined=True), store_locator("s3://a", confined=True)])
def test_urls_are_let_through_where_that_is_allowed(locate):
    assert refusal(locate, "https://host/a.png").code == "image_refused"
    open_one = file_locator(None, confined=True, urls=True)
    assert open_one("HTTPS://host/a.png?x=1") == "HTTPS://host/a.png?x=1"
    assert store_locator("s3://a", confined=True, urls=True)("http://host/a.png") == "http://host/a.png"
    for name in ("ftp://host/a.png", "file:///etc/passwd", "data:image/png;base64,aaaa"):
        assert "of another kind" in str(refusal(open_one, name))


@pytest.mark.parametrize("name", ["https://me:pass@host/a.png?signature=abc#abc", "s3://me:pass@host/a.png?token=abc"])
def test_secrets_of_urls_are_not_shown(name):
    for locate in (file_locator(None, confined=True), store_locator("s3://a", confined=True)):
        message = str(refusal(locate, name))
        assert "host/a.png" in message
        assert "pass" not in message
        assert "abc" not in message
