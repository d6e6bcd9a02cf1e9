"""Refused pictures: limits before decoding, other files, damage, and messages that repeat nothing of a library."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import threading
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qwen_vl_classifier.errors import ConfigError, DataError, ImageError
from qwen_vl_classifier.images import opening
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import image_size, open_image
from tests.images.picture_files import FILES, SMALL, chunk, corners, encoded, png
from tests.waiting import LIMIT


def refusal(source, **options) -> str:
    """Return the message with which `source` is refused, after checking its form."""
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert message.count("; ") >= 2, "saw; expected; do"
    assert not re.search(r"0x[0-9a-f]{6}", message)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


class TestLimits:
    HUGE = png(20_000, 20_000, 8, 2)
    HUGE_JPEG = SMALL["progressive JPEG"].replace(struct.pack(">HH", 32, 48), struct.pack(">HH", 65_500, 65_500))
    HUGE_WEBP = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\0" * 2

    @pytest.mark.parametrize("data", [HUGE, HUGE_JPEG, HUGE_WEBP], ids=["PNG", "JPEG", "WebP"])
    def test_bomb_is_refused_before_a_decoder_runs(self, monkeypatch, data):
        monkeypatch.setattr(opening, "_DECODERS", {})
        monkeypatch.setattr(opening, "pixel_data", None)
        message = refusal(data)
        assert "expected at most 25,000,000" in message
        with pytest.raises(ImageError, match="expected at most 25,000,000"):
            image_size(data)

    def test_pixels_are_counted_exactly(self):
        limits = ImageLimits(max_pixels=48 * 32)
        assert open_image(SMALL["PNG"], limits=limits)
        assert "48x32, 1,536 pixels" in refusal(SMALL["PNG"], limits=ImageLimits(max_pixels=48 * 32 - 1))

    def test_our_limit_replaces_that_of_pillow(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert open_image(SMALL["PNG"]).size == (32, 48)
        assert open_image(SMALL["JPEG"]).size == (32, 48)

    @pytest.mark.parametrize("size", [(300, 1), (1, 300), (201, 1)])
    def test_thin_picture_is_refused(self, size):
        for source in (Image.new("L", size), encoded(Image.new("L", size), "PNG")):
            assert f"{size[0]}x{size[1]}" in refusal(source)

    @pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200)])
    def test_small_and_nearly_thin_pictures_pass(self, size):
        assert open_image(encoded(Image.new("L", size), "PNG")).size == size

    def test_file_size_is_limited(self, tmp_path):
        data = SMALL["PNG"]
        path = tmp_path / "a.png"
        path.write_bytes(data)
        for source in (data, path):
            assert open_image(source, limits=ImageLimits(max_bytes=len(data)))
            assert "max_bytes" in refusal(source, limits=ImageLimits(max_bytes=len(data) - 1))

    def test_pil_images_are_held_to_the_limits(self):
        lazy = Image.open(io.BytesIO(SMALL["PNG"]))
        assert "raise max_pixels" in refusal(lazy, limits=ImageLimits(max_pixels=100))
        assert lazy.tile, "it was decoded to no purpose"
        assert "at least 1x1" in refusal(Image.new("RGB", (0, 5)))

    @pytest.mark.parametrize("option", ["max_pixels", "max_bytes", "max_aspect_ratio"])
    @pytest.mark.parametrize("value", [0, -1, float("nan")])
    def test_limits_are_checked(self, option, value):
        with pytest.raises(ConfigError, match=option):
            ImageLimits(**{option: value})


class TestRefusals:
    @pytest.mark.parametrize("format", ["PPM", "ICO", "JPEG2000"])
    def test_other_formats_are_refused_whatever_their_name(self, tmp_path, format):
        path = tmp_path / "picture.png"
        path.write_bytes(encoded(corners(), format))
        with Image.open(path) as picture:
            assert picture.format == format
        assert refusal(path).startswith(repr(str(path)))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x89PNG",
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            b"%PDF-1.7",
            b"%!PS-Adobe",
            b"\0" * 99,
        ],
    )
    def test_other_files_are_refused(self, data):
        assert refusal(data).startswith(f"<bytes> of length {len(data)}: ")

    @pytest.mark.parametrize("lenient", [False, True])
    @pytest.mark.parametrize("kind", SMALL)
    def test_truncated_file_is_refused(self, monkeypatch, kind, lenient):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as other libraries set it
        data = SMALL[kind]
        for length in {1, 11, 12, 20, 40, len(data) // 3, len(data) // 2, len(data) - 13, len(data) - 1}:
            refusal(data[:length])

    def test_damaged_pixels_are_refused(self):
        data = bytearray(SMALL["PNG"])
        data[data.index(b"IDAT") + 12] ^= 0xFF
        assert "cannot be decoded" in refusal(bytes(data))

    def test_two_declared_sizes_are_refused(self):
        data = png(9, 9, 8, 2, rows=bytes(9 * 28))
        assert open_image(data).size == (9, 9)
        second = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
        assert "two different sizes" in refusal(data[:-12] + second + data[-12:])

    def test_directory_and_missing_file(self, tmp_path):
        folder = tmp_path / "x.png"
        folder.mkdir()
        assert "directory" in refusal(folder)
        assert "No such file" in refusal(tmp_path / "missing.png")
        assert "Not a directory" in refusal(Path(__file__) / "a.png")
        assert "not valid" in refusal("a\0b.png")
        assert "\\n" in refusal("line\nbreak.png")
        assert refusal("x" * 100_000)

    def test_pipe_is_refused_without_waiting(self, tmp_path):
        pipe = tmp_path / "x.png"
        os.mkfifo(pipe)
        thread = threading.Thread(target=lambda: messages.append(refusal(pipe)), daemon=True)
        messages: list[str] = []
        thread.start()
        thread.join(LIMIT)
        assert messages, "it waits for a writer"
        assert "pipe" in messages[0]

    def test_device_is_refused(self):
        assert "device" in refusal("/dev/zero")

    @pytest.mark.parametrize("url", ["http://a/b.png", "HTTPS://a/b.png", "s3://a/b.png", "data:image/png;base64,AA"])
    def test_url_is_refused(self, url):
        assert "URLs are not fetched here" in refusal(url)

    @pytest.mark.parametrize("source", [None, 7, bytearray(b"x"), [b"x"]])
    def test_other_types_are_refused(self, source):
        assert type(source).__name__ in refusal(source)

    def test_float_pixels_are_refused(self):
        assert "fixed range" in refusal(Image.new("F", (2, 2)))

    def test_closed_pil_image_is_refused(self):
        picture = Image.open(io.BytesIO(SMALL["PNG"]))
        picture.close()
        assert refusal(picture).startswith("<PIL image>")

    @pytest.mark.parametrize(
        ("source", "code"),
        [
            ("gone.png", "image_missing"),
            ("/dev/null", "image_refused"),
            ("https://example.org/a.png", "image_refused"),
            (7, "image_refused"),
            (b"%PDF-1.7" + bytes(40), "image_format"),
            (encoded(Image.new("RGB", (201, 1)), "PNG"), "image_too_large"),
            (encoded(Image.new("RGB", (40, 30)), "PNG")[:-20], "image_damaged"),
        ],
    )
    def test_every_error_has_a_code(self, source, code):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert caught.value.code == code
        assert pickle.loads(pickle.dumps(caught.value)).code == code, "errors go from process to process"

    def test_image_errors_are_data_errors(self):
        with pytest.raises(DataError):
            open_image(b"")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_what_is_not_the_pictures_fault_passes(self, monkeypatch, error):
        def fail(stream):
            raise error

        monkeypatch.setattr(opening, "_DECODERS", {"PNG": fail})
        with pytest.raises(error):
            open_image(SMALL["PNG"])

    def test_texts_of_pillow_are_not_passed_on(self, monkeypatch):
        def fail(stream):
            raise OSError(f"cannot identify image file {stream!r}")

        monkeypatch.setattr(opening, "_DECODERS", {"PNG": fail})
        assert "BytesIO" not in refusal(SMALL["PNG"])


@settings(max_examples=500)
@given(
    data=st.sampled_from([*SMALL.values(), *FILES.values()]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    cut=st.tuples(st.integers(0, 1 << 16), st.integers(0, 4)),
)
def test_damage_gives_a_picture_or_an_image_error(data, changes, cut):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    start = cut[0] % len(damaged)
    del damaged[start : start + cut[1]]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            picture = open_image(bytes(damaged))
        except ImageError:
            picture = None
    assert not seen
    if picture is not None:
        assert picture.mode == "RGB"
        assert picture.size == image_size(bytes(damaged))
