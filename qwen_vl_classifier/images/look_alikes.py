"""Pictures that look alike: a 64-bit hash of coarse brightness, and the search for near pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

NEAR_BITS = 4
NEAR_LEVELS = 4.0

_COLUMNS, _ROWS = 9, 8
_SIDE = 8
_HASH_BYTES = 8
_DETAIL = 64  # a larger picture is first reduced to about so many pixels a side
_NOISE = 1  # grey levels by which compression alone makes even areas uneven
_BLOCK = 64
_PAIRS = 50_000


@dataclass(frozen=True, slots=True)
class Looks:
    """Short descriptions of pictures, to be compared.

    Attributes:
        hashes: Shape (n,), unsigned 64-bit: see `look_of`.
        thumbnails: uint8, shape (n, 192): 8 x 8 pixels of three channels.
    """

    hashes: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]

    @classmethod
    def joined(cls, looks: Sequence[bytes]) -> Looks:
        """Join what `look_of` returned for several pictures."""
        table = np.frombuffer(b"".join(looks), dtype=np.uint8).reshape(len(looks), _HASH_BYTES + _SIDE * _SIDE * 3)
        return cls(np.ascontiguousarray(table[:, :_HASH_BYTES]).view(np.uint64)[:, 0], table[:, _HASH_BYTES:])

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the thumbnails as pictures, shape (n, 8, 8, 3)."""
        return self.thumbnails.reshape(-1, _SIDE, _SIDE, 3)


def look_of(picture: Image.Image) -> bytes:
    """Describe a picture by a hash of 8 bytes followed by a thumbnail of 192.

    A picture is shrunk to 9 x 8 grey pixels; each bit says whether a pixel is brighter than its left neighbour (the
    difference hash of Krawetz, 2013, "Kind of Like That", hackerfactor.com), here by more than one level.

    Args:
        picture: As `open_image` returned it.
    """
    factor = min(picture.width // _DETAIL, picture.height // _DETAIL)
    if factor > 1:  # far faster than averaging over all pixels twice
        picture = picture.reduce(factor)
    levels = np.asarray(picture.convert("L").resize((_COLUMNS, _ROWS), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(levels[:, 1:] > levels[:, :-1] + _NOISE)
    return bits.tobytes() + picture.resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()


def near_pairs(one: Looks, other: Looks | None = None) -> Iterator[tuple[int, int, int]]:
    """Find pairs that differ in at most 4 bits of the hash and by at most 4 of 255 levels of the thumbnail on average.

    Pictures that are mostly of one colour agree in most bits of the hash whatever they show; the thumbnail tells them
    apart.

    Args:
        one: Pictures.
        other: Others to compare them with; `None` compares them among themselves, each pair once.

    Yields:
        The numbers of two pictures and the bits in which they differ; of pairs in `one`, the larger number first.
    """
    others = one if other is None else other
    for start in range(0, len(one.hashes), _BLOCK):
        bits = np.bitwise_count(one.hashes[start : start + _BLOCK, None] ^ others.hashes)
        rows, columns = np.nonzero(bits <= NEAR_BITS)
        if other is None:
            later = columns < rows + start
            rows, columns = rows[later], columns[later]
        for first in range(0, len(rows), _PAIRS):
            left, right = rows[first : first + _PAIRS], columns[first : first + _PAIRS]
            apart = one.thumbnails[left + start].astype(np.int16) - others.thumbnails[right]
            alike = np.abs(apart).mean(axis=1) <= NEAR_LEVELS
            for row, column in zip(left[alike].tolist(), right[alike].tolist(), strict=True):
                yield row + start, column, int(bits[row, column])
