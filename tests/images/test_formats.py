"""GIF, BMP, TIFF, AVIF and HEIC: the pixels of Pillow's own decoders, under our limits, and no way around them."""

from __future__ import annotations

import importlib.util
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images import opening
from qwen_vl_classifier.images.limits import IMAGE_FORMATS, ImageLimits
from qwen_vl_classifier.images.opening import image_size, open_image
from tests.images.picture_files import COLOUR, FILES, MODES, ORIENTED, RAMP, by_pillow, encoded, grey_tiff, kept_of

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

ALL = ImageLimits(formats=IMAGE_FORMATS)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name, tmp_path):
    data, expected = FILES[name], by_pillow(FILES[name])
    path = tmp_path / "picture.jpg"  # a suffix says nothing
    path.write_bytes(data)
    for source in (data, path):
        picture = open_image(source)
        assert (picture.mode, picture.size, picture.info) == ("RGB", expected.size, {})
        assert picture.tobytes() == expected.tobytes()
        assert image_size(source) == expected.size


@pytest.mark.parametrize("format", ["GIF", "TIFF", "AVIF"])
def test_the_first_of_several_is_taken(format):
    one, several = encoded(COLOUR, format), encoded(COLOUR, format, save_all=True, append_images=[COLOUR.rotate(180)])
    assert len(several) > len(one)
    assert open_image(several).tobytes() == by_pillow(several).tobytes() != open_image(COLOUR.rotate(180)).tobytes()


def test_metadata_and_further_pictures_do_not_reach_the_decoder():
    secret = b"a secret of the photographer"
    exif = Image.Exif()
    exif[0x010E] = secret.decode()
    for data in (
        encoded(MODES["P"], "GIF", comment=secret),
        encoded(COLOUR, "TIFF", exif=exif, save_all=True, append_images=[Image.new("RGB", (500, 400))]),
    ):
        assert secret in data
        kept = kept_of(data)
        assert secret not in kept
        assert len(kept) < len(data)
    data = encoded(COLOUR, "AVIF", exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as whole, Image.open(io.BytesIO(kept_of(data))) as kept:
        assert ("exif" in whole.info, "exif" in kept.info) == (True, False)


def test_a_bmp_with_numbers_in_its_reserved_bytes():
    data = encoded(COLOUR, "BMP")
    assert open_image(data[:6] + b"\1\0\2\0" + data[10:]) == COLOUR


def gif(width: int, height: int, *, frame: tuple[int, int, int, int] = (0, 0, 1, 1)) -> bytes:
    descriptor = b"," + struct.pack("<4H", *frame) + b"\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(3) + descriptor + b"\2\2L\1\0;"


def bmp(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


HUGE_AVIF = FILES["AVIF RGB"].replace(struct.pack(">II", 61, 43), struct.pack(">II", 20_000, 20_000))
BOMBS = {
    "GIF": gif(60_000, 60_000),
    "GIF with a larger frame": gif(1, 1, frame=(0, 0, 60_000, 60_000)),
    "GIF of many blocks": gif(1, 1)[:13] + b"!\xfe" + b"\1a" * 400_001 + gif(1, 1)[13:],
    "BMP of many run lengths": bmp(100, 100, 8, compression=1) + b"\1a" * (1 << 21),
    "BMP of run lengths and many pixels": bmp(4000, 4000, 8, compression=1),
    "BMP": bmp(20_000, 20_000, compression=1),
    "BMP from the top": bmp(20_000, -20_000, compression=1),
    "TIFF": grey_tiff(RAMP, "<", 16, t256=60_000, t257=60_000),
    "TIFF of huge tiles": grey_tiff(RAMP, "<", 16, t322=60_000, t323=60_000, t324=8, t325=8),
    "TIFF of tall tiles": grey_tiff(RAMP, "<", 16, t322=16, t323=1 << 18, t324=8, t325=8),
    "TIFF of many strips": grey_tiff(RAMP, "<", 16, t257=200_000, t256=1000, t278=1, t277=4),
    "AVIF": HUGE_AVIF,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_a_decoder_runs(monkeypatch, name):
    monkeypatch.setattr(opening, "_DECODERS", {})
    with pytest.raises(ImageError) as caught:
        open_image(BOMBS[name])
    assert caught.value.code == "image_too_large"


@pytest.mark.parametrize(
    "data",
    [
        bmp(40, 30),
        grey_tiff(RAMP, "<", 16)[:-1],
        grey_tiff(RAMP, "<", 16, t273=1 << 31),
        encoded(COLOUR, "TIFF", compression="tiff_lzw")[:200],
        gif(9, 9)[:-4],
        b"II*\0\xff\xff\xff\x7f",
        FILES["AVIF RGB"][:100],
    ],
    ids=["BMP", "TIFF", "TIFF elsewhere", "TIFF lzw", "GIF", "TIFF directory", "AVIF"],
)
def test_a_file_that_breaks_off_is_refused(data):
    with pytest.raises(ImageError) as caught:
        open_image(data)
    assert caught.value.code == "image_damaged"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bmp(4, 4, compression=4), "a BMP file of 24 bits and compression 4"),
        (grey_tiff(RAMP, "<", 16, t259=34712), "a TIFF file of compression 34712"),
        (grey_tiff(RAMP, "<", 16, t254=1), "a camera's raw file"),
        (grey_tiff(RAMP, "<", 16, t50706=1), "a camera's raw file"),
    ],
)
def test_what_is_not_read_is_named(data, message):
    with pytest.raises(ImageError, match=message):
        open_image(data)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "AVIF"])
def test_formats_are_taken_only_where_they_are_let_in(format):
    data = encoded(COLOUR, format)
    assert open_image(data, limits=ALL)
    with pytest.raises(ImageError, match=f"is an? {format} picture; expected JPEG, PNG or WebP") as caught:
        open_image(data, limits=ImageLimits())
    assert caught.value.code == "image_format"


@pytest.mark.skipif(pillow_heif is None, reason="needs the extra heic")
class TestHeic:
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_pixels(self, mode):
        data = pillow_heif.from_pillow(MODES[mode])
        file = io.BytesIO()
        data.save(file, quality=90)
        picture = open_image(file.getvalue())
        assert picture.size == image_size(file.getvalue()) == COLOUR.size
        difference = np.abs(np.asarray(picture, int) - np.asarray(open_image(MODES[mode]), int))
        assert difference.mean() < 6

    @pytest.mark.parametrize("turn", range(1, 9))
    def test_orientation(self, turn):
        file = io.BytesIO()
        pillow_heif.from_pillow(COLOUR).save(file, exif=ORIENTED[turn].tobytes())
        turned = Image.new("RGB", COLOUR.size)
        turned.paste(COLOUR)
        turned.info["exif"] = ORIENTED[turn].tobytes()
        assert open_image(file.getvalue()).size == image_size(file.getvalue()) == open_image(turned).size


def test_heic_names_the_extra_that_reads_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find_spec(name))
    data = FILES["AVIF RGB"].replace(b"avif", b"heic")
    with pytest.raises(ImageError, match=r"is a HEIC picture.*run: pip install .*\[heic\]") as caught:
        open_image(data)
    assert caught.value.code == "image_format"


class TestReduction:
    """Pictures above 25 megapixels, which only limits of the user's own let in."""

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
    def test_a_larger_picture_is_read_at_a_half(self, monkeypatch, format):
        monkeypatch.setattr(opening, "FULL_SIZE_PIXELS", 1000)
        data = encoded(COLOUR.resize((101, 77)), format)
        picture = open_image(data)
        assert picture.size == image_size(data) == (26, 20)  # 51 x 39 would be too much
        close = np.asarray(COLOUR.resize((26, 20)), int) - np.asarray(picture, int)
        assert np.abs(close).mean() < 8

    def test_pictures_within_today_s_limit_do_not_change(self):
        data = encoded(COLOUR, "JPEG")
        assert open_image(data, limits=ImageLimits(max_pixels=10**9)).tobytes() == by_pillow(data).tobytes()

    @pytest.mark.parametrize("turn", [1, 6])
    def test_orientation_and_size(self, monkeypatch, turn):
        monkeypatch.setattr(opening, "FULL_SIZE_PIXELS", 1000)
        for format in ("JPEG", "PNG"):
            data = encoded(COLOUR, format, exif=ORIENTED[turn])
            assert open_image(data).size == image_size(data) == ((31, 22) if turn == 1 else (22, 31))
        lazy = Image.open(io.BytesIO(encoded(COLOUR, "PNG")))
        assert open_image(lazy).size == (31, 22)

    def test_beyond_what_the_decoder_reduces(self, monkeypatch):
        monkeypatch.setattr(opening, "FULL_SIZE_PIXELS", 4)
        data = encoded(COLOUR, "JPEG")
        assert open_image(data).size == image_size(data) == (2, 2)


def test_sample_pictures_of_other_libraries():
    """Whatever pictures other packages bring: ours and Pillow's readings agree."""
    import matplotlib
    import sklearn

    folders = [Path(package.__file__).parent for package in (matplotlib, sklearn)]
    paths = [path for folder in folders for end in ("png", "jpg", "gif", "bmp") for path in folder.rglob(f"*.{end}")]
    assert len(paths) > 5
    for path in paths:
        assert open_image(path).tobytes() == by_pillow(path.read_bytes()).tobytes(), path
