"""TIFF: grey values of more than 8 bits, colours in planes, and strips that a file declares wrongly."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.limits import image_limits
from qwen_vl_classifier.images.opening import open_image
from tests.images.picture_files import COLOUR, MODES, RAMP, encoded, grey_tiff, tiff


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
        with pytest.raises(ImageError, match=r"16-bit grey values up to 4095.*grey_bits=12") as caught:
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
    assert (np.asarray(open_image(tiff(*sorted(entries), order=order, data=data))) == open_image(picture)).all()


def test_planes_that_pillow_takes_for_others_are_refused():
    data = encoded(MODES["LA"], "TIFF", compression="tiff_lzw")
    assert open_image(data).size == COLOUR.size
    order, entry = "<", struct.pack("<HHI", 284, 3, 1)
    assert data.count(entry) == 1
    at = data.index(entry) + 8
    data = data[:at] + struct.pack(f"{order}H", 2) + data[at + 2 :]
    with pytest.raises(ImageError):
        open_image(data)


def test_strips_that_lie_over_each_other_are_not_copied_again_and_again():
    """A thousand strips of the same megabyte would become a gigabyte."""
    entries = [(256, 100), (257, 1000), (258, 8), (259, 5), (262, 1), (277, 1), (278, 1)]
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    fields = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in entries]
    fields += [(273, 4, 1000, struct.pack("<I", start)), (279, 4, 1000, struct.pack("<I", start + 4000))]
    data = struct.pack("<1000I", *[start + 8000] * 1000) + struct.pack("<1000I", *[1 << 20] * 1000) + bytes(1 << 20)
    with pytest.raises(ImageError, match="is truncated"):
        open_image(tiff(*sorted(fields), data=data))
