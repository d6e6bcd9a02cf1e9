"""The door for pixels: what comes in as which RGB, what is refused, and that nothing else gets out of it."""

import contextlib
import io
import os
import pickle
import re
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qwen_vl_classifier.errors import ConfigError, DataError, ImageError
from qwen_vl_classifier.images import opening as images
from qwen_vl_classifier.images.opening import ImageLimits, image_size, open_image
from tests.waiting import LIMIT

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
STORED_AS = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND")


def exif(orientation: int) -> bytes:
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def pixels(picture: Image.Image) -> list[tuple[int, int, int]]:
    return list(picture.get_flattened_data())


def corners(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Draw red, green, blue and white quarters: no turn or flip of it looks the same."""
    picture = Image.new("RGB", (2, 2))
    picture.putdata([RED, GREEN, BLUE, WHITE])
    return picture.resize(size, Image.Resampling.NEAREST)


def refusal(source, **options) -> str:
    """Return the message with which `source` is refused, after checking its form."""
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert message.count("; ") >= 2, "saw; wanted; do"
    assert not re.search(r"0x[0-9a-f]{6}", message)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


SMALL = {
    "JPEG": encoded(corners(), "JPEG", exif=exif(6)),
    "progressive JPEG": encoded(corners(), "JPEG", progressive=True),
    "CMYK JPEG": encoded(corners().convert("CMYK"), "JPEG"),
    "PNG": encoded(corners(), "PNG", exif=exif(8)),
    "palette PNG": encoded(corners().quantize(4), "PNG", transparency=b"\0\x80"),
    "WebP": encoded(corners(), "WEBP"),
    "lossless WebP": encoded(corners().convert("RGBA"), "WEBP", lossless=True, exif=exif(3)[6:]),
    "animated WebP": encoded(corners(), "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
}


class TestPixels:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    def test_path_bytes_and_pil_are_one_picture(self, tmp_path, format):
        data = encoded(corners(), format)
        path = tmp_path / "picture.txt"  # a suffix says nothing
        path.write_bytes(data)
        results = [open_image(source) for source in (path, str(path), data, Image.open(io.BytesIO(data)))]
        assert {result.tobytes() for result in results} == {results[0].tobytes()}
        assert results[0].mode == "RGB"
        assert results[0].size == (48, 32)
        if format == "PNG":
            assert pixels(results[0]) == pixels(corners())

    def test_result_is_loaded_and_independent(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(encoded(corners(), "PNG", exif=exif(1)))
        result = open_image(path)
        path.unlink()
        assert type(result) is Image.Image
        assert result.info == {}
        assert pixels(result) == pixels(corners())

    def test_pil_image_is_copied_not_changed(self):
        source = corners()
        source.info["exif"] = exif(6)
        result = open_image(source)
        result.putpixel((0, 0), (1, 2, 3))
        assert pixels(source) == pixels(corners())
        assert source.info == {"exif": exif(6)}

    def test_pil_image_shows_its_current_frame(self):
        moving = Image.open(io.BytesIO(SMALL["animated WebP"]))
        moving.seek(1)
        assert open_image(moving).getpixel((0, 0)) == (0, 0, 0)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    def test_orientation_is_applied(self, format, orientation):
        stored = corners()
        for step in STORED_AS[orientation]:
            stored = stored.transpose(step)
        data = encoded(stored, format, exif=exif(orientation), quality=95)
        for source in (data, Image.open(io.BytesIO(data))):
            upright = open_image(source)
            assert upright.size == (48, 32)
            assert image_size(source) == (48, 32)
            for x, y in [(8, 8), (40, 8), (8, 24), (40, 24)]:
                difference = [
                    abs(a - b) for a, b in zip(upright.getpixel((x, y)), corners().getpixel((x, y)), strict=True)
                ]
                assert max(difference) < 20

    def test_orientation_after_the_pixels_of_a_png_is_applied(self):
        data = encoded(corners(), "PNG")
        data = data[:-12] + chunk(b"eXIf", exif(6)[6:]) + data[-12:]
        assert open_image(data).size == image_size(data) == (32, 48)
        lazy = Image.open(io.BytesIO(data))
        assert image_size(lazy) == open_image(lazy).size == image_size(lazy) == (32, 48)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "lossless WebP"])
    def test_opening_twice_changes_nothing_more(self, kind):
        for source in (SMALL[kind], Image.open(io.BytesIO(SMALL[kind]))):
            once = open_image(source)
            assert once.info == {}
            assert open_image(once).size == once.size
            assert open_image(once).tobytes() == once.tobytes()

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), WHITE),
            (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), (255, 204, 204)),
            (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), RED),
            (Image.new("RGBa", (1, 1), (0, 0, 0, 0)), WHITE),
            (Image.new("LA", (1, 1), (0, 51)), (204, 204, 204)),
            (Image.new("PA", (1, 1), (0, 0)), WHITE),
            (Image.new("1", (1, 1), 1), WHITE),
            (Image.new("L", (1, 1), 7), (7, 7, 7)),
            (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), RED),
            (Image.new("YCbCr", (1, 1), (255, 128, 128)), WHITE),
            (Image.new("HSV", (1, 1), (0, 255, 255)), RED),
            (Image.new("I;16", (1, 1), 0xFFFF), WHITE),
            (Image.new("I;16", (1, 1), 300), (1, 1, 1)),
            (Image.new("I;16B", (1, 1), 257 * 77), (77, 77, 77)),
            (Image.new("I", (1, 1), 257 * 77), (77, 77, 77)),
            (Image.new("I", (1, 1), 257 * 77 - 100), (77, 77, 77)),
            (Image.new("I", (1, 1), -5), (0, 0, 0)),
            (Image.new("I", (1, 1), 70_000), WHITE),
        ],
        ids=lambda value: getattr(value, "mode", None),
    )
    def test_modes_become_rgb(self, source, expected):
        assert pixels(open_image(source)) == [expected]

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (
                png(2, 1, 8, 3, chunk(b"PLTE", bytes(RED + BLUE)), chunk(b"tRNS", b"\0"), rows=b"\0\0\1"),
                [WHITE, BLUE],
            ),
            (
                png(2, 1, 8, 3, chunk(b"PLTE", bytes(RED + BLUE)), chunk(b"tRNS", b"\x33\xff"), rows=b"\0\0\1"),
                [(255, 204, 204), BLUE],
            ),
            (png(2, 1, 8, 0, chunk(b"tRNS", b"\0\7"), rows=b"\0\7\x08"), [WHITE, (8, 8, 8)]),
            (
                png(2, 1, 8, 2, chunk(b"tRNS", b"\0\xff\0\0\0\0"), rows=b"\0" + bytes(RED + BLUE)),
                [WHITE, BLUE],
            ),
            (png(8, 1, 1, 0, rows=b"\0\xf0"), [WHITE] * 4 + [(0, 0, 0)] * 4),
            (png(2, 1, 16, 0, rows=b"\0\x01\x01\xff\xff"), [(1, 1, 1), WHITE]),
            (png(2, 1, 16, 0, chunk(b"tRNS", b"\x01\x01"), rows=b"\0\x01\x01\x01\x02"), [WHITE, (1, 1, 1)]),
            (png(1, 1, 16, 2, rows=b"\0\xff\xff\0\0\0\0"), [RED]),
            (png(2, 1, 8, 4, rows=b"\0\0\xff\0\0"), [(0, 0, 0), WHITE]),
        ],
        ids=["P+tRNS", "P+partial", "L+tRNS", "RGB+tRNS", "1-bit", "16-bit", "16-bit+tRNS", "48-bit", "LA"],
    )
    def test_png_kinds(self, data, expected):
        assert pixels(open_image(data)) == expected

    @pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
    def test_cmyk_jpeg(self, transform):
        data = bytearray(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"))
        data[data.index(b"Adobe") + 11] = transform
        colour = open_image(bytes(data)).getpixel((8, 8))
        if transform == 0:
            assert colour == WHITE  # no ink: the samples are inverted, as Adobe writes them

    @pytest.mark.parametrize("format", ["WEBP", "PNG"])
    def test_first_of_several_frames_is_taken(self, format):
        data = encoded(corners(), format, save_all=True, append_images=[Image.new("RGB", (48, 32))], lossless=True)
        assert pixels(open_image(data)) == pixels(corners())

    def test_mpo_is_read_as_the_jpeg_it_begins_with(self):
        data = encoded(corners(), "MPO", save_all=True, append_images=[Image.new("RGB", (500, 400))])
        assert Image.open(io.BytesIO(data)).format == "MPO"
        assert open_image(data).size == (48, 32)


class TestLimits:
    HUGE = png(20_000, 20_000, 8, 2)
    HUGE_JPEG = SMALL["progressive JPEG"].replace(struct.pack(">HH", 32, 48), struct.pack(">HH", 65_500, 65_500))
    HUGE_WEBP = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\0" * 2

    @pytest.mark.parametrize("data", [HUGE, HUGE_JPEG, HUGE_WEBP], ids=["PNG", "JPEG", "WebP"])
    def test_bomb_is_refused_before_a_decoder_runs(self, monkeypatch, data):
        monkeypatch.setattr(images, "_DECODERS", {})
        monkeypatch.setattr(images, "pixel_data", None)
        message = refusal(data)
        assert "wanted at most 25,000,000" in message
        with pytest.raises(ImageError, match="wanted at most 25,000,000"):
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

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_pipe_is_refused_without_waiting(self, tmp_path):
        pipe = tmp_path / "x.png"
        os.mkfifo(pipe)
        thread = threading.Thread(target=lambda: messages.append(refusal(pipe)), daemon=True)
        messages: list[str] = []
        thread.start()
        thread.join(LIMIT)
        assert messages, "it waits for a writer"
        assert "pipe" in messages[0]

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
    def test_device_is_refused(self):
        assert "device" in refusal("/dev/zero")

    @pytest.mark.parametrize("url", ["http://a/b.png", "HTTPS://a/b.png", "s3://a/b.png", "data:image/png;base64,AA"])
    def test_url_is_refused(self, url):
        assert "URLs are off" in refusal(url)

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
    def test_programs_are_told_what_is_wrong_in_one_word(self, source, code):
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

        monkeypatch.setattr(images, "_DECODERS", {"PNG": fail})
        with pytest.raises(error):
            open_image(SMALL["PNG"])

    def test_texts_of_pillow_are_not_passed_on(self, monkeypatch):
        def fail(stream):
            raise OSError(f"cannot identify image file {stream!r}")

        monkeypatch.setattr(images, "_DECODERS", {"PNG": fail})
        assert "BytesIO" not in refusal(SMALL["PNG"])


def opened_files() -> list[str]:
    """Return what this process has open; others may open and close files of their own meanwhile."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            paths.append(str(descriptor.readlink()))
    return paths


class TestSideEffects:
    TRAPS: ClassVar = {  # metadata over which Pillow warns
        "corrupt EXIF": encoded(corners(), "JPEG", exif=exif(6).replace(b"\0\x08\0\x01", b"\0\x08\0\x09")),
        "half an MPO": encoded(corners(), "MPO", save_all=True, append_images=[corners()]).replace(
            b"MPF\0II*\0", b"MPF\0II*\xff"
        ),
        "invalid APNG": png(2, 2, 8, 0, chunk(b"acTL", bytes(8)), rows=bytes(6)),
    }

    @pytest.mark.parametrize("trap", TRAPS)
    def test_no_warning_escapes(self, trap):
        with (
            pytest.warns(UserWarning, match="EXIF|MPO|APNG"),
            Image.open(io.BytesIO(self.TRAPS[trap])) as picture,
        ):
            picture.load()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            open_image(self.TRAPS[trap])
        assert not seen

    def test_text_bomb_is_never_unpacked(self):
        bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))
        assert open_image(png(1, 1, 8, 0, bomb, rows=bytes(2)))

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count open files")
    def test_no_file_stays_open(self, tmp_path):
        for number, data in enumerate([*SMALL.values(), b"GIF89a", SMALL["PNG"][:50]]):
            (tmp_path / str(number)).write_bytes(data)
        kept = []
        for path in tmp_path.iterdir():
            try:
                kept.append((open_image(path), image_size(path)))
            except ImageError as error:
                kept.append(error)
        assert kept
        assert not [path for path in opened_files() if path.startswith(str(tmp_path))]

    def test_threads_do_not_disturb_each_other(self):
        filters = list(warnings.filters)
        sources = [*SMALL.values(), *self.TRAPS.values()] * 8
        with ThreadPoolExecutor(4) as pool:
            together = [picture.tobytes() for picture in pool.map(open_image, sources)]
        assert together == [open_image(source).tobytes() for source in sources]
        assert list(warnings.filters) == filters


@settings(max_examples=300)
@given(
    kind=st.sampled_from(sorted(SMALL)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_damage_gives_a_picture_or_an_image_error(kind, changes, cut):
    data = bytearray(SMALL[kind])
    for position, value in changes:
        data[position % len(data)] = value
    if cut < 4:
        del data[changes[0][0] % len(data) :][:cut]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            picture = open_image(bytes(data))
        except ImageError:
            picture = None
    assert not seen
    if picture is not None:
        assert picture.mode == "RGB"
        assert picture.size == image_size(bytes(data))
