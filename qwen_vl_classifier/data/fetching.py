"""A picture's URL -> the bytes behind it, fetched only from hosts that were named."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence


class Fetcher:
    """Fetches pictures from hosts that were named."""

    def __init__(
        self,
        hosts: Collection[str],
        *,
        max_bytes: int = 10_000_000,
        timeout: float = 5.0,
        resolve: Callable[[str, int], Sequence[str]] | None = None,
        allow: Callable[[str], bool] | None = None,
    ) -> None:
        raise NotImplementedError

    def fetch(self, url: str) -> bytes:
        """Fetch a picture."""
        raise NotImplementedError
