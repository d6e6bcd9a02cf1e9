"""Identity: the same pixels are the same picture, whatever holds them; nothing is decoded twice, nothing is stale."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images import identity as module
from qwen_vl_classifier.images.identity import looks_of, picture_identities, picture_identity, stamp_of
from qwen_vl_classifier.images.limits import image_limits
from qwen_vl_classifier.images.opening import open_image
from tests.images.picture_files import encoded


def noise(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def turned(picture: Image.Image) -> bytes:
    """Store a picture lying on its side, with the EXIF that sets it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


@pytest.fixture
def opened(monkeypatch) -> list:
    """What is opened from here on for the sake of identity."""
    sources: list = []
    monkeypatch.setattr(module, "open_image", lambda source: sources.append(source) or open_image(source))
    return sources


def test_the_same_pixels_are_the_same_picture(tmp_path):
    picture = noise(0)
    path = tmp_path / "a.png"
    picture.save(path)
    shutil.copy(path, tmp_path / "copy.png")
    (tmp_path / "soft.png").symlink_to("a.png")
    (tmp_path / "hard.png").hardlink_to(path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "lossless.webp").write_bytes(encoded(picture, "WEBP", lossless=True))
    same = [
        path,
        str(path),
        f"{tmp_path}/./a.png",
        f"{tmp_path}/sub/../a.png",
        tmp_path / "copy.png",
        tmp_path / "soft.png",
        tmp_path / "hard.png",
        tmp_path / "lossless.webp",
        path.read_bytes(),
        encoded(picture, "PNG", compress_level=1),
        turned(picture),
        picture,
        picture.copy(),
        picture.convert("RGBA"),
        Image.open(path),
        Image.open(io.BytesIO(turned(picture))),
    ]
    identities = {picture_identity(source) for source in same}
    assert len(identities) == 1
    assert {pair for (pair,) in picture_identities([(source,) for source in same])} == identities


def test_other_pixels_are_another_picture():
    picture = noise(0)
    almost = picture.copy()
    almost.putpixel((3, 3), tuple(255 - value for value in picture.getpixel((3, 3))))
    others = [
        picture,
        almost,
        noise(1),
        picture.resize((48, 36)),
        encoded(picture, "JPEG", quality=95),
        picture.transpose(Image.Transpose.ROTATE_90),
        Image.frombytes("RGB", (18, 24), picture.tobytes()),
    ]
    assert len({picture_identity(source) for source in others}) == len(others)


def test_a_relative_path_is_the_absolute_one(tmp_path, monkeypatch):
    noise(0).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert stamp_of("a.png") == stamp_of("./a.png") == stamp_of(Path("a.png")) == stamp_of(tmp_path / "a.png")
    assert stamp_of("gone.png") == stamp_of("./gone.png") == stamp_of(tmp_path / "gone.png") != stamp_of("a.png")


def test_what_was_opened_is_not_opened_again(tmp_path, opened):
    path = tmp_path / "a.png"
    noise(77).save(path)  # which no other test has opened as these bytes
    shutil.copy(path, tmp_path / "copy.png")
    (tmp_path / "link.png").symlink_to(path)
    sources = [path, path.read_bytes(), tmp_path / "copy.png", tmp_path / "link.png", str(path)]
    for _ in range(3):
        picture_identities([(source,) for source in sources])
        looks_of(sources)
    assert len(opened) == 3


def test_encoding_is_the_only_time_that_a_picture_is_opened(tmp_path, tiny_backbone, opened):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        noise(number, (56, 56)).save(path)
    examples = [Example((path, path.read_bytes()), "x") for path in paths]
    tiny_backbone.prepare(examples)
    assert len({*picture_identities([example.images for example in examples])}) == 4
    looks_of(paths)
    assert opened == []


def test_a_file_that_is_written_again_is_another_picture(tmp_path):
    path = tmp_path / "a.png"
    noise(0).save(path)
    before, times = picture_identity(path), path.stat()
    replacement = tmp_path / "b.png"
    noise(1).save(replacement)
    os.truncate(path, 0)
    path.write_bytes(replacement.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert picture_identity(path) == picture_identity(replacement) != before


def test_a_file_that_is_replaced_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    noise(0).save(path)

    def replaced(source):
        picture = open_image(source)
        noise(1).save(path)
        return picture

    with monkeypatch.context() as patched:
        patched.setattr(module, "open_image", replaced)
        assert picture_identity(path) == picture_identity(noise(0))
    assert picture_identity(path) == picture_identity(noise(1))


def test_a_pil_image_that_is_changed_is_another_picture():
    picture = noise(0)
    before = picture_identity(picture)
    picture.paste((1, 2, 3), (0, 0, 5, 5))
    assert picture_identity(picture) != before
    assert picture_identities([(picture,)]) == [(picture_identity(picture),)]


def test_text_alone_has_no_pictures_and_several_keep_their_order():
    one, other = noise(0), noise(1)
    found = picture_identities([(), (one, other), (other, one)])
    assert found[0] == ()
    assert found[1] == found[2][::-1]


def test_a_file_that_is_read_in_another_way_is_another_picture(tmp_path):
    grey = np.random.default_rng(5).integers(0, 4096, (200, 200)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    found = []
    for bits in (12, 16):
        with image_limits(grey_bits=bits):
            found.append(picture_identity(tmp_path / "a.png"))
    assert found[0] != found[1]


def test_a_picture_that_cannot_be_opened_is_named_or_known_by_its_source(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for source in (bad, "gone.png", b"no picture", "nul\0.png"):
        with pytest.raises(ImageError):
            picture_identities([(source,)])
    sources = [bad, str(bad), "gone.png", "./gone.png", b"no picture", b"no picture", "nul\0.png"]
    found = picture_identities([(source,) for source in sources], lenient=True)
    assert [found.index(pair) for pair in found] == [0, 0, 2, 2, 4, 4, 6]


def test_the_memory_is_bounded(monkeypatch):
    memo = module._Memo(3)
    for number in range(10):
        memo.put(b"%d" % number, b"x")
    assert [memo.get(b"%d" % number) for number in range(10)] == [None] * 7 + [b"x"] * 3


def test_a_picture_is_hashed_once_however_often_it_is_opened(tmp_path, monkeypatch, tiny_backbone):
    """And not at all where nobody compares pictures."""
    hashed: list = []
    digest = module.pixel_identity
    monkeypatch.setattr(module, "pixel_identity", lambda picture: hashed.append(picture) or digest(picture))
    path = tmp_path / "a.png"
    noise(41).save(path)
    example, read = Example(path, "x"), tiny_backbone.processor.read_pictures
    read(example, identify=False)
    assert len(hashed) == 0
    assert read(example).key == read(example).key
    assert len(hashed) == 1
    noise(42).save(path)
    read(example)
    assert len(hashed) == 2
    assert picture_identity(path) == digest(noise(42))
    assert len(hashed) == 2
    read(Example(noise(43), "x"))
    read(Example(noise(43), "x"))  # a PIL image may have been changed meanwhile
    assert len(hashed) == 4
