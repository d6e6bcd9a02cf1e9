"""Pictures as bytes, as the patches that a vision tower reads, and as the tokens that it makes of them.

A picture is kept as Pillow resized it: one byte for each channel of each pixel, an eighth of its patches in float32.
Patches are made on the model's device, in the batch that needs them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from qwen_vl_classifier.backbone.layers.transfer import Movable, to_device
from qwen_vl_classifier.backbone.layers.vision_plan import Grid

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""A picture: shape (height, width, 3)."""

CHANNELS = 3
_VALUES = 256  # of a byte


@dataclass(frozen=True, slots=True)
class PictureTokens(Movable):
    """What the vision tower makes of pictures.

    Attributes:
        tokens: The image tokens of each picture, one picture after the other, shape (tokens, hidden).
        levels: Features of earlier layers of the tower, of the same shape, which Qwen3-VL adds after each of its first
            decoder layers (arXiv:2406.04334).
    """

    tokens: Tensor
    levels: tuple[Tensor, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[PictureTokens]) -> PictureTokens:
        """Return those of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        levels = zip(*(part.levels for part in parts), strict=True)
        return cls(torch.cat([part.tokens for part in parts]), tuple(map(torch.cat, map(list, levels))))

    def split(self, sizes: Sequence[int]) -> list[PictureTokens]:
        """Return those of each picture, by the number of its tokens."""
        parts = zip(*(torch.split(tensor, list(sizes)) for tensor in (self.tokens, *self.levels)), strict=True)
        return [PictureTokens(tokens, tuple(levels)) for tokens, *levels in parts]

    def select(self, places: Tensor) -> PictureTokens:
        """Return some of the tokens, by their places: int64, shape (chosen,)."""
        return PictureTokens(
            self.tokens.index_select(0, places), tuple(level.index_select(0, places) for level in self.levels)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return sum(tensor.nbytes for tensor in (self.tokens, *self.levels))


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of one example, at the size at which the model reads them.

    Attributes:
        pixels: Each picture, of shape (height, width, 3); none where their tokens are known.
        grids: Time, height and width of each picture in patches.
        digests: The digest of each picture's pixels and grid.
        key: Digest of all of them. It is the same for the same pictures (see `images/identity.py`), and changes if a
            new version of a library resizes in another way.
        tokens: The tokens of each picture, where the vision tower need not read it again.
    """

    pixels: tuple[Pixels, ...]
    grids: tuple[Grid, ...]
    digests: tuple[bytes, ...]
    key: bytes
    tokens: tuple[PictureTokens, ...] = ()

    @classmethod
    def of(cls, pixels: Sequence[Pixels], patch_size: int) -> Pictures:
        """Make them of resized pictures, whose sides are multiples of the patch size."""
        grids = tuple((1, len(picture) // patch_size, picture.shape[1] // patch_size) for picture in pixels)
        digests = []
        for picture, grid in zip(pixels, grids, strict=True):
            digest = hashlib.sha256(np.ascontiguousarray(picture).data)
            digest.update(repr(grid).encode())
            digests.append(digest.digest())
        return cls(tuple(pixels), grids, tuple(digests), _key_of(digests))

    @classmethod
    def joined(cls, parts: Sequence[Pictures]) -> Pictures:
        """Return the pictures of several, one after the other, as if they had been made together."""
        digests = [digest for part in parts for digest in part.digests]
        return cls(
            tuple(picture for part in parts for picture in part.pixels),
            tuple(grid for part in parts for grid in part.grids),
            tuple(digests),
            _key_of(digests),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that pixels and tokens take."""
        return sum(picture.nbytes for picture in self.pixels) + sum(tokens.nbytes for tokens in self.tokens)


def _key_of(digests: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(digests)).digest()


class PatchMaker:
    """Make the patches of pictures, equal to those of a transformers image processor to the last bit.

    Rescaling and normalisation map each of the 256 values of a channel to a number. The table of these numbers is read
    from the processor itself, so that no device divides in its own way.

    Args:
        image_processor: A transformers image processor of the Qwen2-VL kind (PIL backend).
    """

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self.patch_size = int(image_processor.patch_size)
        self.merge_size = int(image_processor.merge_size)
        self.frames = int(image_processor.temporal_patch_size)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def patch_dim(self) -> int:
        """Number of values in a patch."""
        return CHANNELS * self.frames * self.patch_size**2

    def __call__(self, pixels: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the patches of pictures, one picture after the other.

        Args:
            pixels: At least one picture, uint8 of shape (height, width, 3), all on one device, where the patches are
                made. Sides are multiples of the merged patch size.
            dtype: Type of the patches.

        Returns:
            Shape (patches, patch_dim): channel, frame, row and column of each patch, in this order. Patches of one
            image token follow each other.
        """
        device = pixels[0].device
        ends = np.cumsum([0, *(picture.numel() for picture in pixels)]).tolist()
        cut = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        for start, end, picture in zip(ends, ends[1:], pixels, strict=False):
            self._cut(picture, cut[start:end])
        channels = cut.view(-1, CHANNELS, self.patch_size**2).int()
        table = self._table_on(device, dtype)
        places = channels.add_(torch.arange(0, len(table), _VALUES, dtype=torch.int32, device=device)[:, None])
        values = table.index_select(0, places.flatten()).view(-1, CHANNELS, 1, self.patch_size**2)
        return values.expand(-1, -1, self.frames, -1).reshape(-1, self.patch_dim)

    def _table_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the table, channel after channel, copied to a device once."""
        place = device, dtype
        if place not in self._tables:
            self._tables[place] = to_device(torch.from_numpy(self._table), device).to(dtype).flatten()
        return self._tables[place]

    def _cut(self, picture: Tensor, into: Tensor) -> None:
        """Bring the bytes of a picture into the order of its patches."""
        side, merge = self.patch_size, self.merge_size
        rows, columns = (length // (merge * side) for length in picture.shape[:2])
        by_place = picture.reshape(rows, merge, side, columns, merge, side, CHANNELS)
        by_patch = by_place.permute(0, 3, 1, 4, 6, 2, 5)
        into.view(by_patch.shape).copy_(by_patch)

    @cached_property
    def _table(self) -> npt.NDArray[np.float32]:
        """The number of each value of each channel, shape (3, 256)."""
        side = self.patch_size * self.merge_size
        cells = math.isqrt(_VALUES)
        values = np.arange(_VALUES, dtype=np.uint8).reshape(cells, cells).repeat(side, 0).repeat(side, 1)
        picture = Image.fromarray(np.stack([values] * CHANNELS, axis=-1))
        patches = self._image_processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"]
        of_values = np.asarray(patches, dtype=np.float32).reshape(
            _VALUES, -1, CHANNELS, self.frames, self.patch_size**2
        )
        return of_values[:, 0, :, 0, 0].T.copy()
