"""GIF, BMP, TIFF, AVIF and HEIC: the pixels of Pillow's own decoders, under our limits, and no way around them."""

from __future__ import annotations

import importlib.util
import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images import opening as images
from qwen_vl_classifier.images.headers import pixel_data, read_header
from qwen_vl_classifier.images.limits import IMAGE_FORMATS, ImageLimits, image_limits
from qwen_vl_classifier.images.opening import image_size, open_image

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

ALL = ImageLimits(formats=IMAGE_FORMATS)
COLOUR = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((61, 43)) for turn in (0, 90, 180)])
GREY = COLOUR.convert("L")
MODES = {
    "1": COLOUR.convert("1"),
    "L": GREY,
    "P": COLOUR.quantize(19),
    "RGB": COLOUR,
    "RGBA": Image.merge("RGBA", (*COLOUR.split(), GREY)),
    "LA": Image.merge("LA", (GREY, GREY)),
    "CMYK": COLOUR.convert("CMYK"),
}
ORIENTED = {turn: Image.Exif() for turn in range(1, 9)}
for turn, exif in ORIENTED.items():
    exif[0x0112] = turn


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> Image.Image:
    """Open a picture as Pillow does, upright and on white."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    page = Image.new("RGB", layer.size, "white")
    page.paste(layer, mask=layer)
    return page


FILES = {
    **{f"GIF {mode}": encoded(MODES[mode], "GIF") for mode in ("1", "L", "P", "RGB", "RGBA")},
    "GIF transparent": encoded(MODES["P"], "GIF", transparency=3, comment=b"a comment"),
    "GIF interlaced": encoded(MODES["P"], "GIF", interlace=1),
    **{f"BMP {mode}": encoded(MODES[mode], "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
    **{f"TIFF {mode}": encoded(picture, "TIFF") for mode, picture in MODES.items()},
    **{
        f"TIFF {mode} {compression}": encoded(MODES[mode], "TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
        for mode in ("L", "P", "RGB", "RGBA")
    },
    "TIFF jpeg": encoded(COLOUR, "TIFF", compression="jpeg"),
    "TIFF group4": encoded(MODES["1"], "TIFF", compression="group4"),
    "TIFF big": encoded(COLOUR, "TIFF", big_tiff=True),
    **{f"TIFF turned {turn}": encoded(COLOUR, "TIFF", exif=exif) for turn, exif in ORIENTED.items()},
    **{f"AVIF {mode}": encoded(MODES[mode], "AVIF") for mode in ("L", "RGB", "RGBA")},
    **{f"AVIF turned {turn}": encoded(COLOUR, "AVIF", exif=exif.tobytes()) for turn, exif in ORIENTED.items()},
}


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
        stream = io.BytesIO(data)
        kept = pixel_data(stream, read_header(stream))
        assert secret not in kept
        assert len(kept) < len(data)
    data = encoded(COLOUR, "AVIF", exif=exif.tobytes())
    stream = io.BytesIO(data)
    with Image.open(io.BytesIO(data)) as whole, Image.open(io.BytesIO(pixel_data(stream, read_header(stream)))) as kept:
        assert ("exif" in whole.info, "exif" in kept.info) == (True, False)


def tiff(*entries: tuple[int, int, int, bytes], order: str = "<", data: bytes = b"") -> bytes:
    """Write a TIFF file of entries of 4 bytes at most; the data begins where the last entry ends."""
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + body + bytes(4) + data


def grey_tiff(values: np.ndarray, order: str, bits: int, photometric: int = 1, **tags: int) -> bytes:
    """Write grey values of 16 bits, or packed ones of 12."""
    height, width = values.shape
    if bits == 12:
        wide = values.astype(np.uint32).reshape(height, -1, 2)
        both = (wide[..., 0] << 12) | wide[..., 1]
        data = np.stack([both >> 16, both >> 8 & 255, both & 255], -1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"{order}u2").tobytes()
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 279: len(data)}
    numbers |= {int(tag[1:]): value for tag, value in tags.items()}
    numbers[273] = 8 + 2 + 12 * (len(numbers) + 1) + 4
    entries = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in sorted(numbers.items())]
    return tiff(*entries, order=order, data=data)


RAMP = np.tile(np.arange(64, dtype=np.uint16), (40, 1))


class TestGrey:
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_sixteen_bits_in_both_byte_orders(self, order):
        expected = np.tile(np.arange(64) * 4, (40, 1))
        dark = open_image(grey_tiff(RAMP * 257 * 4, order, 16))
        assert (np.asarray(dark)[..., 0] == expected).all()
        inverse = open_image(grey_tiff(RAMP * 257 * 4, order, 16, photometric=0))
        assert (np.asarray(inverse)[..., 0] == 255 - expected).all()

    def test_twelve_bits_that_a_file_declares_are_scaled_by_their_range(self):
        picture = np.asarray(open_image(grey_tiff(RAMP * 65, "<", 12)))
        assert (picture[..., 0] == np.floor(RAMP.astype(int) * 65 * 255 / 4095 + 0.5)).all()

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PIL"])
    def test_twelve_bits_in_sixteen_are_named_and_scaled_on_demand(self, kind):
        picture = Image.fromarray(RAMP * 65)
        source = picture if kind == "PIL" else encoded(picture, kind)
        with pytest.raises(ImageError, match=r"16-bit grey values that end at 4095.*grey_bits=12") as caught:
            open_image(source)
        assert caught.value.code == "image_format"
        with image_limits(grey_bits=12):
            assert (np.asarray(open_image(source))[..., 0] == np.floor(RAMP.astype(int) * 65 * 255 / 4095 + 0.5)).all()
        with image_limits(grey_bits=16):
            assert np.asarray(open_image(source)).max() == 16

    def test_a_picture_that_passes_4095_is_never_brightened(self):
        data = encoded(Image.fromarray(RAMP * 70), "PNG")
        for bits in (0, 12, 16):
            with image_limits(grey_bits=bits):
                assert np.asarray(open_image(data)).max() == round(63 * 70 / 257)

    def test_other_numbers_of_bits_are_named(self):
        for data, seen in (
            (grey_tiff(RAMP, "<", 10), "10-bit grey,"),
            (grey_tiff(RAMP, ">", 12), "12-bit grey in big"),
        ):
            with pytest.raises(ImageError, match=seen):
                open_image(data)

    @pytest.mark.parametrize(("tag", "value"), [("t339", 2), ("t339", 3), ("t258", 32)])
    def test_numbers_without_a_range_are_refused(self, tag, value):
        with pytest.raises(ImageError, match="no fixed range"):
            open_image(grey_tiff(RAMP, "<", 16, **{tag: value}))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("mode", "bits"), [("LA", 8), *((mode, bits) for mode in ("RGB", "RGBA", "CMYK") for bits in (8, 16))]
)
def test_planes_that_are_not_compressed_are_read_as_pixels_are(mode, bits, order):
    picture = MODES[mode]
    planes = np.moveaxis(np.asarray(picture), -1, 0).astype(f"{order}u{bits // 8}") * (257 if bits == 16 else 1)
    kinds = {256: 61, 257: 43, 259: 1, 262: {"LA": 1, "CMYK": 5}.get(mode, 2), 277: len(planes), 278: 43, 284: 2}
    kinds |= {338: 2} if mode.endswith("A") else {}
    tail = 8 + 2 + 12 * (len(kinds) + 3) + 4
    lists = {258: ("H", [bits] * len(planes)), 279: ("I", [planes[0].nbytes] * len(planes))}
    start = tail + 8 * len(planes) + 2 * len(planes)
    lists[273] = ("I", [start + index * planes[0].nbytes for index in range(len(planes))])
    entries = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in kinds.items()]
    data = b""
    for tag, (letter, values) in sorted(lists.items()):
        value = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(value) > 4:
            value, data = struct.pack(f"{order}I", tail + len(data)), data + value
        entries.append((tag, 3 if letter == "H" else 4, len(values), value))
    data = data.ljust(start - tail, b"\0") + planes.tobytes()
    assert (np.asarray(open_image(tiff(*sorted(entries), order=order, data=data))) == by_pillow_of(picture)).all()


def test_a_bmp_with_numbers_in_its_reserved_bytes():
    data = encoded(COLOUR, "BMP")
    assert open_image(data[:6] + b"\1\0\2\0" + data[10:]) == COLOUR


def test_planes_that_pillow_takes_for_others_are_refused():
    data = encoded(MODES["LA"], "TIFF", compression="tiff_lzw")
    assert open_image(data).size == COLOUR.size
    order, entry = "<", struct.pack("<HHI", 284, 3, 1)
    assert data.count(entry) == 1
    place = data.index(entry) + 8
    data = data[:place] + struct.pack(f"{order}H", 2) + data[place + 2 :]
    with pytest.raises(ImageError):
        open_image(data)


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
    "BMP": bmp(20_000, 20_000, compression=1),
    "BMP from the top": bmp(20_000, -20_000, compression=1),
    "TIFF": grey_tiff(RAMP, "<", 16, t256=60_000, t257=60_000),
    "TIFF of huge tiles": grey_tiff(RAMP, "<", 16, t322=60_000, t323=60_000, t324=8, t325=8),
    "TIFF of many strips": grey_tiff(RAMP, "<", 16, t257=200_000, t256=1000, t278=1, t277=4),
    "AVIF": HUGE_AVIF,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_a_decoder_runs(monkeypatch, name):
    monkeypatch.setattr(images, "_DECODERS", {})
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


def test_strips_that_lie_over_each_other_are_not_copied_again_and_again():
    """A thousand strips of the same megabyte would become a gigabyte."""
    entries = [(256, 100), (257, 1000), (258, 8), (259, 5), (262, 1), (277, 1), (278, 1)]
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    fields = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in entries]
    fields += [(273, 4, 1000, struct.pack("<I", start)), (279, 4, 1000, struct.pack("<I", start + 4000))]
    data = struct.pack("<1000I", *[start + 8000] * 1000) + struct.pack("<1000I", *[1 << 20] * 1000) + bytes(1 << 20)
    with pytest.raises(ImageError, match="breaks off"):
        open_image(tiff(*sorted(fields), data=data))


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
        difference = np.abs(np.asarray(picture, int) - np.asarray(by_pillow_of(MODES[mode]), int))
        assert difference.mean() < 6

    @pytest.mark.parametrize("turn", range(1, 9))
    def test_orientation(self, turn):
        file = io.BytesIO()
        pillow_heif.from_pillow(COLOUR).save(file, exif=ORIENTED[turn].tobytes())
        turned = Image.new("RGB", COLOUR.size)
        turned.paste(COLOUR)
        turned.info["exif"] = ORIENTED[turn].tobytes()
        assert open_image(file.getvalue()).size == image_size(file.getvalue()) == open_image(turned).size


def by_pillow_of(picture: Image.Image) -> Image.Image:
    return open_image(picture)


def test_heic_names_the_extra_that_reads_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find_spec(name))
    data = FILES["AVIF RGB"].replace(b"avif", b"heic")
    with pytest.raises(ImageError, match=r"is a HEIC picture.*qwen-vl-classifier\[heic\]") as caught:
        open_image(data)
    assert caught.value.code == "image_format"


class TestReduction:
    """Pictures above 25 megapixels, which only limits of the user's own let in."""

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
    def test_a_larger_picture_is_read_at_a_half(self, monkeypatch, format):
        monkeypatch.setattr(images, "FULL_SIZE_PIXELS", 1000)
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
        monkeypatch.setattr(images, "FULL_SIZE_PIXELS", 1000)
        for format in ("JPEG", "PNG"):
            data = encoded(COLOUR, format, exif=ORIENTED[turn])
            assert open_image(data).size == image_size(data) == ((31, 22) if turn == 1 else (22, 31))
        lazy = Image.open(io.BytesIO(encoded(COLOUR, "PNG")))
        assert open_image(lazy).size == (31, 22)

    def test_beyond_what_the_decoder_reduces(self, monkeypatch):
        monkeypatch.setattr(images, "FULL_SIZE_PIXELS", 4)
        data = encoded(COLOUR, "JPEG")
        assert open_image(data).size == image_size(data) == (2, 2)


@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damage_gives_a_picture_or_an_image_error(name, changes):
    data = bytearray(FILES[name])
    for position, value in changes:
        data[position % len(data)] = value
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            picture = open_image(bytes(data))
        except ImageError:
            picture = None
    assert not seen
    if picture is not None:
        assert picture.size == image_size(bytes(data))


def test_sample_pictures_of_other_libraries():
    """Whatever pictures other packages bring: ours and Pillow's readings agree."""
    import matplotlib
    import sklearn

    folders = [Path(package.__file__).parent for package in (matplotlib, sklearn)]
    paths = [path for folder in folders for end in ("png", "jpg", "gif", "bmp") for path in folder.rglob(f"*.{end}")]
    assert len(paths) > 5
    for path in paths:
        assert open_image(path).tobytes() == by_pillow(path.read_bytes()).tobytes(), path
