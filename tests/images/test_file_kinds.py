"""The kind of a file by its first bytes."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.file_kinds import file_kind
from qwen_vl_classifier.images.opening import open_image


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"", "an empty file"),
        (bytes(600), "a file of zeros"),
        (b"\xff\xd8\xff\xe0", "a JPEG picture"),
        (b"GIF89a", "a GIF picture"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "a HEIC picture"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "an AVIF picture"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "an MP4 or QuickTime video"),
        (b"MM\0*\0\0\0\x08", "a TIFF picture"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b"\n<!doctype html><html>", "an HTML page"),
        (b"<HTML><head>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML file"),
        (b"<Error><Code>AccessDenied</Code></Error>", "an XML file"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"RIFF\0\0\0\0WAVE", "a WAV file"),
        (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
        (b"\0" * 128 + b"DICM", "a DICOM file"),
        (b"image,text,label\n", "a text"),
        (b"\x13\x37\0\xfe", "a file of another kind"),
    ],
)
def test_kinds(start, kind):
    assert file_kind(start).startswith(kind)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF\x20\0\0\0WAVEfmt ",
        b"%PDF-1.7\n",
        b"<html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0\0\0\x0cJXL \r\n\x87\n",
    ],
)
def test_a_picture_that_is_none_is_named(tmp_path, data):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert f"this is {file_kind(data)}" in str(caught.value)
    assert caught.value.code == "image_format"
