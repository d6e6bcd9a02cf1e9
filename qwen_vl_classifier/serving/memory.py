"""How many bytes all requests together may hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qwen_vl_classifier.errors import ImageError, QueueFullError


class ByteBudget:
    """Bytes that are held for requests, counted and bounded.

    Args:
        most: For all requests together.

    Attributes:
        held: How many are held now.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Count bytes as held until the context ends.

        Raises:
            QueueFullError: There is no room for them now.
        """
        self.take(nbytes)
        try:
            yield
        finally:
            self.release(nbytes)

    def take(self, nbytes: int) -> None:
        """Count bytes as held.

        Raises:
            QueueFullError: There is no room for them now.
        """
        if self.held + nbytes > self.most:
            raise QueueFullError(
                f"requests hold {self.held:,} bytes and {nbytes:,} more came; wanted at most {self.most:,} in all; "
                "try again later"
            )
        self.held += nbytes

    def release(self, nbytes: int) -> None:
        """Give bytes back."""
        self.held -= nbytes


class PictureShare:
    """The part of a budget that the pictures of one request take up; a context, which gives it back.

    Args:
        budget: Of all requests.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    def __enter__(self) -> PictureShare:
        return self

    def __exit__(self, *_: object) -> None:
        self.release(self._held)

    def take(self, nbytes: int) -> None:
        """Count bytes as held.

        Raises:
            QueueFullError: There is no room for them now.
            ImageError: There never would be: one request gets half of the budget at most.
        """
        if self._held + nbytes > self._budget.most // 2:
            raise ImageError(
                "the pictures of this request take up more memory than one request may have; send fewer or smaller "
                "ones at a time",
                code="image_too_large",
            )
        self._budget.take(nbytes)
        self._held += nbytes

    def release(self, nbytes: int) -> None:
        """Give bytes back before the request ends."""
        self._budget.release(nbytes)
        self._held -= nbytes
