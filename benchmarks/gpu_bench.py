"""What the parts of the GPU benchmark share: the card, a checkpoint made on it, drawn pictures, models loaded once."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from checkpoints import SHAPES, Shape, write_checkpoint
from encoder_baselines import PlainLoop
from pictures import photo, text
from racing import synchronise, timed

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.devices import choose_dtype
from qwen_vl_classifier.backbone.processor import EncodedExample

LAST = Tap(-1, "mean")
TEXTS_EACH = 8
_SHAPES_BY_MEMORY = ((40, "3b"), (20, "3b-half"), (0, "59m"))  # least GiB; float32 is loaded twice to compare
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # of Linux; files there are in memory
_TEXT_TOKENS = 16
_FEW = 16  # rows from which a rate is guessed


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work is done.

    Attributes:
        large: Side of large pictures in pixels.
        small: Side of small ones.
        seconds: What a contender of a race is to take, about.
        fewest: Rows of a race at least; a multiple of the plain loop's batch where there are enough.
        most: Rows of a race at most.
        part: Rows that the plain loop passes in a round.
        repeats: Rounds that count, at most.
        product: Side of the square matrices whose product gives the card's own rate.
        training: Training rows.
        batch: Of training.
        probe: Rows of `train`.
        callers: Of the server.
        requests: In a round of the server.
        open_seconds: How long the server is asked at 80 % of its capacity.
        budgets: Of tokens, to compare; the third is the default of GPUs.
    """

    large: int
    small: int
    seconds: float
    fewest: int
    most: int
    part: int
    repeats: int
    product: int
    training: int
    batch: int
    probe: int
    callers: int
    requests: int
    open_seconds: float
    budgets: tuple[int, ...]


FULL = Sizes(896, 364, 4.5, 32, 1024, 16, 4, 8192, 192, 16, 240, 64, 256, 12.0, (4096, 8192, 16384, 32768, 65536))
DRY = Sizes(84, 56, 0.0, 2, 2, 2, 1, 64, 8, 4, 24, 2, 4, 0.2, (64, 256))


class Bench:
    """A device with a checkpoint, and everything that runs it, loaded when first asked for.

    Args:
        device: Where to run.
        folder: For checkpoint, pictures and whatever is saved; it is removed by whoever made it.
        dry: Whether shapes and work are tiny.
    """

    def __init__(self, device: str, folder: Path, *, dry: bool) -> None:
        self.device = torch.device(device)
        self.folder = folder
        self.dry = dry
        self.sizes = DRY if dry else FULL
        self.shape = SHAPES["nano"] if dry or self.device.type != "cuda" else choose_shape(self.device)
        self.dtype = choose_dtype("auto", [self.device])
        self.product_rate = 0.0  # operations a second, once it is measured
        self.float32_features: Any = None  # what bfloat16 is compared with
        self._files: dict[int, list[Path]] = {}

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return write_checkpoint(self.shape, self.folder / "checkpoint", device=str(self.device))

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone in the dtype that "auto" stands for."""
        return self.load()

    @cached_property
    def plain(self) -> PlainLoop:
        """The plain loop in the same dtype."""
        return self.load_plain(self.backbone)

    def load(self, dtype: str = "auto", **options: Any) -> Backbone:
        """Load one more backbone."""
        return Backbone.load(self.checkpoint, device=str(self.device), dtype=dtype, **options)  # type: ignore[arg-type]

    def load_plain(self, backbone: Backbone) -> PlainLoop:
        """Load the plain loop beside a backbone, in its dtype."""
        return PlainLoop(self.checkpoint, backbone.processor, dtype=backbone.dtype, device=self.device, batch_size=8)

    def rows(self, side: int, count: int, *, texts_each: int = 1) -> list[Example]:
        """Return rows about distinct pictures in JPEG files, with labels 0 and 1 in turn."""
        files = self._files.setdefault(side, [])
        missing = range(len(files), -(-count // texts_each))
        folder = self.folder / f"pictures-{side}"
        folder.mkdir(exist_ok=True)

        def draw(number: int) -> Path:
            path = folder / f"{number:05d}.jpg"
            path.write_bytes(photo(np.random.default_rng((side, number)), side, side))
            return path

        with ThreadPoolExecutor() as pool:
            files += pool.map(draw, missing)
        rng = np.random.default_rng(side)
        return [Example(files[number // texts_each], text(rng, _TEXT_TOKENS), number % 2) for number in range(count)]

    def enough_rows(self, side: int, *, texts_each: int = 1) -> tuple[list[Example], list[EncodedExample]]:
        """Return as many rows as the pass takes a few seconds for, and what the processor makes of them."""
        few = self.backbone.prepare(self.rows(side, min(_FEW, self.sizes.most), texts_each=texts_each))
        self.backbone.encode_prepared(few, [LAST])  # the first one warms up
        rate = len(few) / timed(lambda: self.backbone.encode_prepared(few, [LAST]))
        count = int(min(max(rate * self.sizes.seconds, self.sizes.fewest), self.sizes.most))
        rows = self.rows(side, max(1, count // texts_each) * texts_each, texts_each=texts_each)
        return rows, self.backbone.prepare(rows)

    def free_memory(self) -> None:
        """Give back the device's memory that nobody uses any more, models among it."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def forget_plain(self) -> None:
        """Free the memory of the plain loop; it is loaded anew when asked for."""
        self.__dict__.pop("plain", None)
        self.free_memory()

    def peak_memory(self, work: Callable[[], object]) -> float:
        """Do some work and return the most memory that it took on the device, in GiB; 0 on a CPU."""
        if self.device.type != "cuda":
            work()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def choose_shape(device: torch.device) -> Shape:
    """Return the largest shape that the device holds in float32 twice, activations included."""
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return SHAPES[next(name for least, name in _SHAPES_BY_MEMORY if memory >= least)]


def working_folder(device: str) -> str | None:
    """Return where temporary files go: memory if it has room for a checkpoint, else where they usually go."""
    if device == "cuda" and _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 16e9:
        return str(_SHARED_MEMORY)
    return None


def describe_machine(bench: Bench) -> dict[str, Any]:
    """Name card, driver, versions and what runs, as the first line of a run has it."""
    cuda = bench.device.type == "cuda"
    properties: Any = torch.cuda.get_device_properties(bench.device) if cuda else None
    card = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB" if cuda else platform.machine()
    return {
        "card": card,
        "driver": _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "Pillow": PIL.__version__,
        "shape": bench.shape.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "revision": _printed("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        **({"dry": True} if bench.dry else {}),
    }


def _printed(*command: str) -> str:
    """Return the first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.splitlines()), "unknown")


def temporary_folder(device: str) -> tempfile.TemporaryDirectory[str]:
    """Make a folder for a run."""
    return tempfile.TemporaryDirectory(prefix="qwen-vl-gpu-", dir=working_folder(device), ignore_cleanup_errors=True)
