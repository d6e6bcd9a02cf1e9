"""What a request may hold for a picture, and that nothing else is opened, fetched or repeated."""

from __future__ import annotations

import asyncio
import base64
import threading
import tracemalloc
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.fetching import Fetcher
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving import media
from qwen_vl_classifier.serving.media import MediaReader
from tests.serving.media_reading import PNG, base64_of, encoded, read, refusal
from tests.waiting import LIMIT, run

_ALPHABET = frozenset(base64_of(bytes(range(256))))  # all of base64


class TestCarried:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
    @pytest.mark.parametrize(
        "start",
        [
            "",
            "data:image/png;base64,",  # the content says what it is, and the decoder whether it is taken
            "data:image/jpeg;base64,",
            "DATA:IMAGE/WEBP;BASE64,",
            "data:;base64,",
            "data:image/png;charset=utf-8;name=a.png;base64,",
        ],
    )
    def test_every_format_in_every_spelling(self, format: str, start: str, tmp_path: Path) -> None:
        data = encoded(format)
        for root in (None, tmp_path):
            assert read(start + base64_of(data), root=root) == data

    @pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
    def test_white_space_is_passed_over(self, start: str) -> None:
        lines = base64.encodebytes(PNG).decode().replace("\n", "\r\n")
        assert lines.count("\n") > 1
        assert read(start + lines) == PNG

    def test_size_is_checked_before_anything_is_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = base64_of(PNG)
        assert read(text, max_bytes=len(PNG)) == PNG
        error = refusal(text, max_bytes=len(PNG) - 1) if len(PNG) % 3 == 0 else refusal(text, max_bytes=len(PNG) - 3)
        assert error.code == "image_too_large"
        monkeypatch.setattr(base64, "b64decode", None)
        assert "expected at most 100" in str(refusal(text, max_bytes=100))

    @pytest.mark.parametrize(
        "text",
        [
            *("http://127.0.0.1/secret.png", "https://example.org/secret.png", "HTTPS://secret/", "http:secret"),
            *("file:///etc/hostname", "/etc/secret.png", "../secret.png", "~/secret.png", "secret", "", "   "),
            *("data:image/png;base64,", "data:text/html;base64,c2VjcmV0", "data:image/png,secret", "ftp://secret/"),
            *("javascript:secret", "s\u00e9cret", "\ud800secret", "secret\0", "gopher://secret", "data:secret"),
            "data:image/png;base64;secret," + base64_of(PNG),
            "data:image/" + "secret" * 100 + ";base64," + base64_of(PNG),
            "data:image/png;base64," + base64_of(PNG).replace("+", "%2B").replace("/", "%2F") + "%3D",
            base64_of(PNG).rstrip("=")[:-1] + "!",
            base64_of(PNG)[:-1] if not base64_of(PNG).endswith("==") else base64_of(PNG)[:-2],
        ],
    )
    def test_all_else_is_refused_and_not_repeated(self, text: str) -> None:
        error = refusal(text)
        assert error.code == "image_refused"
        assert "cret" not in str(error)
        assert "etc" not in str(error)

    @settings(max_examples=100)
    @given(st.text(max_size=60).filter(lambda text: not set("".join(text.split())) <= _ALPHABET))
    def test_any_other_text_is_a_refusal(self, text: str) -> None:
        assert refusal(text).code == "image_refused"


class TestFetched:
    class Fetching:
        """Stands in for a `Fetcher`."""

        def __init__(self) -> None:
            self.urls: list[str] = []
            self.together = threading.Barrier(8, timeout=LIMIT)

        def fetch(self, url: str) -> bytes:
            self.urls.append(url)
            assert threading.current_thread() is not threading.main_thread()
            if "together" in url:
                self.together.wait()
            if "refused" in url:
                raise ImageError("refused", code="image_refused")
            return url.encode()

    def test_only_urls_of_the_web(self, tmp_path: Path) -> None:
        fetching = self.Fetching()
        fetcher = cast("Fetcher", fetching)
        for url in ("http://a/", "HTTPS://a/", "http:a"):
            assert read(url, fetcher=fetcher) == url.encode()
        assert len(fetching.urls) == 3
        for text in (
            "ftp://a/",
            "file:///a",
            " http://a/",
            "//a.b/",
            "/http://a/",
            "jar:http://a/",
            base64_of(PNG)[:-1],
        ):
            refusal(text, fetcher=fetcher)
            refusal(text, fetcher=fetcher, root=tmp_path)
        assert len(fetching.urls) == 3

    def test_refusals_pass(self) -> None:
        assert refusal("http://refused/", fetcher=cast("Fetcher", self.Fetching())).code == "image_refused"

    def test_several_wait_at_one_time(self) -> None:
        fetcher = cast("Fetcher", self.Fetching())
        reader = MediaReader(limits=ImageLimits(), fetcher=fetcher, root=None)

        async def work() -> list[bytes]:
            return list(await asyncio.gather(*(reader.read(f"http://together/{n}") for n in range(8))))

        assert run(work()) == [f"http://together/{n}".encode() for n in range(8)]
        reader.close()


class TestWork:
    """Base64 is decoded in pieces, so that others get their turn, and white space costs no more than its bytes."""

    @pytest.mark.parametrize("blank", [" ", "\n", "\r\n", " \t\v\f"])
    @pytest.mark.parametrize("every", [1, 2, 76])
    @pytest.mark.parametrize("size", [30, 31, 32])
    def test_pieces_end_anywhere(self, monkeypatch: pytest.MonkeyPatch, blank: str, every: int, size: int) -> None:
        monkeypatch.setattr(media, "_PIECE", 7)
        data = bytes(range(size))
        text = base64_of(data)
        spelt = blank.join(text[place : place + every] for place in range(0, len(text), every))
        longest = media.longest_base64(size)
        assert media.decode_base64(spelt, size) == data or len(spelt) > longest
        for bad in ("QQ==" * 5, text + "A", "QUJ" * 9, "QQ=" * 9, "=" * 12, "QUJD=QUJD===", text[:8] + "=" + text[8:]):
            assert media.decode_base64(bad, 100) is None

    def test_memory_of_white_space(self) -> None:
        text = "AB " * 1_000_000
        tracemalloc.start()
        try:
            data = media.decode_base64(text, 1_500_000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert data is not None
        assert len(data) == 1_500_000
        assert peak < 2.5 * len(data) + 2_000_000, "more than the file, its copy and a few pieces"
