"""Opening pictures: which RGB pixels each kind of file and of PIL image gives, without side effects."""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.opening import image_size, open_image
from tests.images.picture_files import BLUE, RED, SMALL, WHITE, chunk, corners, encoded, exif_of, pixels, png

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
        path.write_bytes(encoded(corners(), "PNG", exif=exif_of(1)))
        result = open_image(path)
        path.unlink()
        assert type(result) is Image.Image
        assert result.info == {}
        assert pixels(result) == pixels(corners())

    def test_pil_image_is_copied_not_changed(self):
        source = corners()
        source.info["exif"] = exif_of(6)
        result = open_image(source)
        result.putpixel((0, 0), (1, 2, 3))
        assert pixels(source) == pixels(corners())
        assert source.info == {"exif": exif_of(6)}

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
        data = encoded(stored, format, exif=exif_of(orientation), quality=95)
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
        data = data[:-12] + chunk(b"eXIf", exif_of(6)[6:]) + data[-12:]
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


def opened_files() -> list[str]:
    """Return what this process has open; others may open and close files of their own meanwhile."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            paths.append(str(descriptor.readlink()))
    return paths


class TestSideEffects:
    TRAPS: ClassVar = {  # metadata over which Pillow warns
        "corrupt EXIF": encoded(corners(), "JPEG", exif=exif_of(6).replace(b"\0\x08\0\x01", b"\0\x08\0\x09")),
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

    def test_the_result_is_a_plain_image_of_its_own(self):
        for data in SMALL.values():
            assert type(open_image(data)) is Image.Image
        given = Image.new("RGB", (8, 8), "red")
        opened = open_image(given)
        opened.putpixel((0, 0), (0, 0, 255))
        assert given.getpixel((0, 0)) == (255, 0, 0)

    def test_threads_do_not_disturb_each_other(self):
        filters = list(warnings.filters)
        sources = [*SMALL.values(), *self.TRAPS.values()] * 8
        with ThreadPoolExecutor(4) as pool:
            together = [picture.tobytes() for picture in pool.map(open_image, sources)]
        assert together == [open_image(source).tobytes() for source in sources]
        assert list(warnings.filters) == filters
