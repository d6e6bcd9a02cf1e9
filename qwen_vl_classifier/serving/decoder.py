"""Pictures decoded in child processes, so that a crash or a memory bomb costs one request."""

from __future__ import annotations

from PIL import Image

from qwen_vl_classifier.data.images import ImageLimits


class DecoderPool:
    """Child processes that decode pictures."""

    def __init__(self, *, workers: int, timeout: float, memory_bytes: int, limits: ImageLimits) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Start the processes."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the processes."""
        raise NotImplementedError

    async def decode(self, data: bytes) -> Image.Image:
        """Decode a picture to RGB."""
        raise NotImplementedError
