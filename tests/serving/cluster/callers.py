"""Clients that ask one thing after the other and note what they are told."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.waiting import LIMIT, until

TEXTS = tuple(f"claim {number}" for number in range(4))
_PAUSE = 0.1  # seconds between two requests of a caller: replicas that start need the processor too


class Callers:
    """Several clients with a connection each.

    Args:
        url: Of the server.
        count: How many.
        until_status: The status at which a caller ends.

    Attributes:
        statuses: How often each status came.
        problems: The codes of answers that are none.
        scores: What was said of each text.
        failures: What the connections raised.
    """

    def __init__(self, url: str, count: int = 4) -> None:
        self.statuses: Counter[int] = Counter()
        self.problems: Counter[str] = Counter()
        self.scores: dict[str, set[float]] = {text: set() for text in TEXTS}
        self.failures: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(count)
        self._futures = [self._threads.submit(self._ask, number) for number in range(count)]

    def _ask(self, caller: int) -> None:
        with httpx.Client(base_url=self._url, timeout=LIMIT, trust_env=False) as client:
            for number in itertools.count(caller):
                if self._over.wait(_PAUSE):
                    return
                text = TEXTS[number % len(TEXTS)]
                try:
                    answer = client.post("/v1/classify", json=body_of(text))
                except httpx.TransportError as error:
                    self.failures.append(repr(error))
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self.scores[text].add(answer.json()["data"][0]["score"])
                else:
                    self.problems[answer.json()["error"]["code"]] += 1

    def go_on(self) -> None:
        """Return after some more answers."""
        before = self.statuses[200]
        until(lambda: self.statuses[200] >= before + 3 * len(self._futures), "answers to callers")

    def finish(self) -> None:
        """End, once each has its last answer."""
        self._over.set()
        for future in self._futures:
            future.result(timeout=LIMIT)
        self._threads.shutdown()


def body_of(text: str) -> dict[str, Any]:
    return {"input": [{"text": text}]}
