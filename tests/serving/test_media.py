"""What a request may hold for a picture, and that nothing else is opened, fetched or repeated."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier.data.images import ImageLimits
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.serving.media import decode_image


def encoded(format: str, size: tuple[int, int] = (48, 32)) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize(size).save(stream, format)
    return stream.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refusal(text: str, **limits: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(text, limits=ImageLimits(**limits))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


PNG = encoded("PNG")


class TestAccepted:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize(
        "start",
        [
            "",
            "data:image/png;base64,",  # the content says what it is
            "data:image/jpeg;base64,",
            "DATA:IMAGE/WEBP;BASE64,",
            "data:;base64,",
            "data:image/png;charset=utf-8;name=a.png;base64,",
        ],
    )
    def test_every_format_in_every_spelling(self, format: str, start: str) -> None:
        data = encoded(format)
        assert decode_image(start + base64_of(data)) == data

    @pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
    def test_white_space_is_passed_over(self, start: str) -> None:
        lines = base64.encodebytes(PNG).decode().replace("\n", "\r\n")
        assert lines.count("\n") > 1
        assert decode_image(start + lines) == PNG


class TestRefused:
    @pytest.mark.parametrize(
        "text",
        [
            "http://127.0.0.1/secret.png",
            "https://example.org/secret.png",
            "file:///etc/hostname",
            "/etc/secret.png",
            "../secret.png",
            "~/secret.png",
            "secret",
            "",
            "   ",
            "data:image/png;base64,",
            "data:text/html;base64,c2VjcmV0",
            "data:image/png,secret",
            "data:image/png;base64;secret," + base64_of(PNG),
            "data:image/" + "secret" * 100 + ";base64," + base64_of(PNG),
            "data:image/png;base64," + base64_of(PNG).replace("+", "%2B").replace("/", "%2F") + "%3D",
            "javascript:secret",
            "s\u00e9cret",
            "\ud800secret",
            "secret\0",
            base64_of(PNG).rstrip("=")[:-1] + "!",
            base64_of(PNG)[:-1] if not base64_of(PNG).endswith("==") else base64_of(PNG)[:-2],
        ],
    )
    def test_what_is_no_base64_is_not_repeated(self, text: str) -> None:
        message = refusal(text)
        assert message.startswith("the image is neither a data URI with base64 nor base64")
        assert "cret" not in message
        assert "etc" not in message

    @pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP"])
    def test_other_formats(self, format: str) -> None:
        assert "wanted a complete JPEG, PNG or WebP file" in refusal(
            f"data:image/png;base64,{base64_of(encoded(format))}"
        )

    def test_damaged_pictures(self) -> None:
        for length in (10, 60, len(PNG) // 2, len(PNG) - 1):
            refusal(base64_of(PNG[:length]))

    def test_a_path_that_is_base64_too_is_not_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("abcd").write_bytes(PNG)
        assert "<bytes> of length 3" in refusal("abcd")

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=60))
    def test_any_text_is_a_refusal(self, text: str) -> None:
        refusal(text)


class TestLimits:
    def test_size_is_checked_before_anything_is_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = base64_of(PNG)
        assert decode_image(text, limits=ImageLimits(max_bytes=len(PNG))) == PNG
        assert f"wanted at most {len(PNG) - 1:,}" in refusal(text, max_bytes=len(PNG) - 1)
        monkeypatch.setattr(base64, "b64decode", None)
        assert "wanted at most 100" in refusal(text, max_bytes=100)

    def test_pixels(self) -> None:
        assert "48x32" in refusal(base64_of(PNG), max_pixels=48 * 32 - 1)

    def test_shape(self) -> None:
        assert "300x1" in refusal(base64_of(encoded("PNG", (300, 1))))
