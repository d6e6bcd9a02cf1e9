"""Store the tokens that a frozen vision tower makes of pictures, so that each picture passes through it once in a run.

Tokens are kept in memory as long as there is room, then on disk in the run's folder, where a resumed run finds them.
Nothing is dropped to make room: every epoch needs every picture once, so whatever was dropped would be needed next.

On CPUs the tower reads one picture at a time. Its last bits depend on what else is in the batch, and so a picture has
the same tokens to the last bit whether they were kept, read from disk, or made again after an interruption.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.devices import free_memory
from qwen_vl_classifier.backbone.encoder import picture_tokens, vision_trains
from qwen_vl_classifier.backbone.layers.transfer import to_device
from qwen_vl_classifier.backbone.layers.vision_plan import Grid
from qwen_vl_classifier.backbone.packing import PackedBatch
from qwen_vl_classifier.backbone.pixels import Pictures, PictureTokens, Pixels
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.files.bounded import read_file
from qwen_vl_classifier.files.whole import new_file
from qwen_vl_classifier.images.identity import stamp_of

_MOST_BYTES = 1 << 30  # of a file: a picture has at most some thousand tokens
_CHECKSUM = "crc32"
_SHARE = 0.25  # of the free memory


class KeptTokens:
    """The tokens that a frozen vision tower makes of pictures, each made once.

    Args:
        backbone: Its vision tower must not train.
        fingerprint: Of the tower: what its weights are. Its type and autocasting are added here.
        folder: Where to keep what memory has no room for; made when it is needed.
        memory: Most bytes in memory.
        disk: Most bytes on disk, beside those that are there.
        reserve: Bytes that stay free on the disk in any case.

    Attributes:
        made: Number of pictures that the tower has read.
    """

    def __init__(
        self, backbone: Backbone, fingerprint: str, folder: Path, *, memory: int, disk: int, reserve: int = 0
    ) -> None:
        self.backbone = backbone
        self.folder = folder
        self.made = 0
        self._fingerprint = f"{fingerprint} {backbone.dtype} {backbone.device.type}"
        self._memory_left, self._disk_left, self._reserve = memory, disk, reserve
        self._tokens: dict[bytes, PictureTokens] = {}
        self._sizes: dict[bytes, int] = {}  # of those on disk
        self._fresh: list[tuple[bytes, PictureTokens]] = []  # of the last pass, still on the device
        self._known: dict[tuple[bytes, ...], Pictures] = {}  # by the stamps of their sources, without pixels

    @classmethod
    def of_run(
        cls,
        backbone: Backbone,
        fingerprint: str,
        folder: Path,
        *,
        most: int,
        is_lasting: bool,
        reserve: int,
        processes: int,
    ) -> KeptTokens | None:
        """Keep tokens in a run, or return `None` where the vision tower trains.

        Several processes keep all of them on disk, since each epoch deals the pictures out anew.

        Args:
            backbone: That of the run.
            fingerprint: Of its vision tower.
            folder: As above.
            most: Most bytes to keep, in memory and on disk together.
            is_lasting: Whether the folder was asked for; a temporary one may lie in memory itself, and gets nothing.
            reserve: As above.
            processes: How many train together.
        """
        if vision_trains(backbone.model):
            return None
        there = 0
        for path in folder.glob("*.safetensors"):  # of a run that goes on, or of another process
            with suppress(OSError):
                there += path.stat().st_size
        memory = min(most, int(free_memory(torch.device("cpu")) * _SHARE)) if processes == 1 else 0
        disk = max(0, most - memory - there) // processes if is_lasting else 0
        return cls(backbone, fingerprint, folder, memory=memory, disk=disk, reserve=reserve)

    @property
    def pictures(self) -> int:
        """Number of pictures whose tokens are kept."""
        return len(self._tokens) + len(self._sizes)

    @property
    def in_memory(self) -> int:
        """Bytes that are kept in memory."""
        return sum(tokens.nbytes for tokens in self._tokens.values())

    @property
    def on_disk(self) -> int:
        """Bytes that are kept on disk, as far as this process has met them."""
        return sum(self._sizes.values())

    def read(self, example: Example, *, autocast: bool = False) -> Pictures:
        """Return the pictures of an example: their tokens if all are kept, else their pixels.

        A picture whose tokens are kept is not opened, unless its file has changed. PIL images are always looked at,
        since their pixels may change at any time. Called in several threads at a time.

        Args:
            example: The example.
            autocast: Whether the pass that follows autocasts to bfloat16.

        Raises:
            ImageError: A picture cannot be opened.
        """
        stamps = tuple(map(stamp_of, example.images))
        known = self._known.get(stamps)
        if known is None:
            known = self.backbone.processor.read_pictures(example, identify=False)
            is_stable = not any(isinstance(source, Image.Image) for source in example.images)
            if is_stable and tuple(map(stamp_of, example.images)) == stamps:  # not replaced while it was read
                self._known[stamps] = replace(known, pixels=())
        tokens = [self._get(self._key(digest, autocast)) for digest in known.digests]
        if None not in tokens:
            return replace(known, pixels=(), tokens=tuple(filter(None, tokens)))
        return known if known.pixels else self.backbone.processor.read_pictures(example, identify=False)

    def tokens_of(
        self, batch: PackedBatch, examples: Sequence[EncodedExample], *, keep: bool = True
    ) -> PictureTokens | None:
        """Return the tokens of the distinct pictures of a batch, in their order, on the model's device.

        Args:
            batch: Packed without pixels.
            examples: Its examples.
            keep: Whether to keep those that are not kept yet.
        """
        self._settle()
        if not batch.digests:
            return None
        device = self.backbone.device
        autocast = torch.is_autocast_enabled(device.type)
        keys = [self._key(digest, autocast) for digest in batch.digests]
        sources = {
            digest: (example.pictures, place)
            for example in examples
            for place, digest in enumerate(example.pictures.digests)
        }
        found: dict[bytes, PictureTokens] = {}
        missing: dict[bytes, tuple[Pixels, Grid]] = {}
        for key, digest in zip(keys, batch.digests, strict=True):
            pictures, place = sources[digest]
            kept = pictures.tokens[place] if pictures.tokens else self._get(key)
            if kept is not None:
                found[key] = kept
            else:
                missing[key] = pictures.pixels[place], pictures.grids[place]
        found = to_device(found, device)
        at_once = 1 if device.type == "cpu" else len(missing)
        for start in range(0, len(missing), at_once or 1):
            group = [*missing.items()][start : start + at_once]
            made = self._make([picture for _, picture in group])
            found.update(zip((key for key, _ in group), made, strict=True))
        self._fresh = [(key, found[key]) for key in missing if keep]
        return PictureTokens.joined([found[key] for key in keys])

    def describe(self) -> str:
        """Describe what is stored."""
        return (
            f"vision tokens of {self.pictures:,} pictures kept: {self.in_memory / 1e9:.2f} GB in memory, "
            f"{self.on_disk / 1e9:.2f} GB on disk"
        )

    def _key(self, digest: bytes, autocast: bool) -> bytes:
        return hashlib.sha256(f"{self._fingerprint} {autocast} ".encode() + digest).digest()

    def _make(self, pictures: Sequence[tuple[Pixels, Grid]]) -> list[PictureTokens]:
        """Run the tower on some pictures together."""
        processor, grids = self.backbone.processor, [grid for _, grid in pictures]
        pixels = to_device(tuple(torch.from_numpy(picture) for picture, _ in pictures), self.backbone.device)
        tokens = picture_tokens(self.backbone.model, processor.patches(pixels, self.backbone.dtype), grids)
        self.made += len(pictures)
        return tokens.split([math.prod(grid) // processor.merge_size**2 for grid in grids])

    def _settle(self) -> None:
        """Keep what the pass before has made: that pass is over, so that nothing waits for the copy."""
        fresh, self._fresh = self._fresh, []
        for key, tokens in fresh:
            if tokens.nbytes <= self._memory_left:
                self._tokens[key] = _on_host(tokens)
                self._memory_left -= tokens.nbytes
            elif tokens.nbytes <= self._disk_left:
                self._write(key, _on_host(tokens))

    def _get(self, key: bytes) -> PictureTokens | None:
        """Return tokens that are kept, on the host."""
        return self._tokens.get(key) or self._read(key)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.safetensors"

    def _write(self, key: bytes, tokens: PictureTokens) -> None:
        """Write tokens to disk; where that fails, later epochs make them again."""
        tensors = {str(number): tensor for number, tensor in enumerate((tokens.tokens, *tokens.levels))}
        content = save({**tensors, _CHECKSUM: torch.tensor(_checksum(tokens))})
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            if shutil.disk_usage(self.folder).free - len(content) < self._reserve:
                return
            with new_file(self._path(key), clear=False) as file:
                file.write(content)
            self._sizes[key] = tokens.nbytes
            self._disk_left -= tokens.nbytes

    def _read(self, key: bytes) -> PictureTokens | None:
        """Read tokens from disk; what is damaged is made again."""
        try:
            tensors = load(read_file(self._path(key), most=_MOST_BYTES))
            checksum = tensors.pop(_CHECKSUM).item()
            first, *levels = (tensors[str(number)] for number in range(len(tensors)))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        tokens = PictureTokens(first, tuple(levels))
        if _checksum(tokens) != checksum:
            return None
        self._sizes[key] = tokens.nbytes
        return tokens


def _on_host(tokens: PictureTokens) -> PictureTokens:
    """Copy tokens, which may be views of those of a whole batch, and made where gradients cannot be asked for."""
    with torch.inference_mode(mode=False):
        first, *levels = (tensor.to("cpu", copy=True) for tensor in (tokens.tokens, *tokens.levels))
    return PictureTokens(first, tuple(levels))


def _checksum(tokens: PictureTokens) -> int:
    checksum = 0
    for tensor in (tokens.tokens, *tokens.levels):
        checksum = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, checksum)
    return checksum
