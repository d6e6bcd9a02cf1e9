"""Decode pictures in separate processes, so that one that crashes its decoder costs one request and no more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from qwen_vl_classifier.errors import ClosedError, ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving.decoding_process import DecodingProcess, LostError

_RETRY_SECONDS = 1.0  # between attempts to start a process in the place of one that was lost

_CLOSED = "the decoder of pictures is closed"

_log = logging.getLogger(__name__)


class DecoderPool:
    """A few processes that decode pictures for all requests, one picture at a time each.

    Who waits first is served first. A picture that takes too long or too much memory is that picture's error, and a new
    process takes the place of its own. A process may also be lost by no fault of the picture: it is tried once more, in
    the new one, and a picture that two processes are lost over is to blame.

    Args:
        workers: How many processes.
        timeout: Seconds that one picture may take, waiting for a process not counted.
        memory_bytes: Memory that one process may take.
        limits: The largest picture to let in.
    """

    def __init__(self, *, workers: int, timeout: float, memory_bytes: int, limits: ImageLimits) -> None:
        self._workers = workers
        self._timeout = timeout
        self._memory_bytes = memory_bytes
        self._limits = limits
        self._idle: deque[DecodingProcess] = deque()
        self._busy: set[DecodingProcess] = set()
        self._places = asyncio.Semaphore(0)  # one for each idle process
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: list[asyncio.Future[DecodingProcess]] = []
        # Each thread waits for one process.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode-image")
        self._closed = asyncio.Event()

    @property
    def processes(self) -> list[int]:
        """The system's numbers of the processes, busy ones first."""
        return [process.pid for process in (*self._busy, *self._idle)]

    async def start(self) -> None:
        """Start the processes, all at once.

        Raises:
            ConfigError: They do not start.
            ClosedError: The pool was closed meanwhile.
        """
        loop = asyncio.get_running_loop()
        self._starting = [loop.run_in_executor(self._threads, self._start_process) for _ in range(self._workers)]
        # Not `gather`, which would be cancelled with its threads' results: `close` needs the processes to end them.
        await asyncio.wait(self._starting)
        started: list[DecodingProcess | BaseException] = [one.exception() or one.result() for one in self._starting]
        for process in started:
            if isinstance(process, DecodingProcess):
                self._idle.append(process)
                self._places.release()
        failed = [outcome for outcome in started if isinstance(outcome, BaseException)]
        if failed or self._closed.is_set():
            await self.close()
            raise failed[0] if failed else ClosedError(_CLOSED)

    async def close(self) -> None:
        """End the processes. Pictures that wait or are being decoded get a `ClosedError`."""
        self._closed.set()
        for process in self._busy:
            process.kill()
        self._places.release()  # wakes the first that waits, who wakes the next
        await asyncio.gather(*self._tasks)
        for started in await asyncio.gather(*self._starting, return_exceptions=True):
            if isinstance(started, DecodingProcess):
                started.close()
        while self._idle:
            self._idle.popleft().close()
        self._threads.shutdown(wait=False)

    async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
        """Decode a picture as `open_image` does.

        Whoever is cancelled while waiting gives up the place in the queue. A picture that is being decoded is decoded
        to its end all the same, which is cheaper than a new process, and nobody gets it.

        Args:
            data: An image file.
            seconds: Processor time that it may take now; 0 for no such limit.

        Returns:
            A picture of mode RGB, without metadata.

        Raises:
            ImageError: It cannot, or must not, be decoded; see `DecodingProcess.decode`.
            TooSlowError: It took longer than `seconds`.
            ClosedError: The pool is closed.
        """
        if len(data) > self._limits.max_bytes:
            raise ImageError(
                f"the image has {len(data):,} bytes; expected at most {self._limits.max_bytes:,}; compress it or scale "
                "it down",
                code="image_too_large",
            )
        await self._places.acquire()
        if self._closed.is_set():
            self._places.release()
            raise ClosedError(_CLOSED)
        answer: asyncio.Future[Image.Image] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # it may be that nobody asks any more
        task = asyncio.create_task(self._decode(self._idle.popleft(), data, seconds, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await answer

    async def _decode(
        self, process: DecodingProcess, data: bytes, seconds: float, answer: asyncio.Future[Image.Image]
    ) -> None:
        """Have one picture decoded, and see to it that its place is free again afterwards."""
        loop = asyncio.get_running_loop()
        last = False
        while not answer.done():
            process = process if process.usable else await self._replace(process)
            self._busy.add(process)
            try:
                image = await loop.run_in_executor(self._threads, process.decode, data, seconds)
            except Exception as error:
                if isinstance(error, LostError) and not (last or self._closed.is_set()):
                    last = True
                elif not answer.done():
                    answer.set_exception(ClosedError(_CLOSED) if self._closed.is_set() else error)
            else:
                if not answer.done():
                    answer.set_result(image)
            self._busy.discard(process)
        if not process.usable:
            process = await self._replace(process)
        self._idle.append(process)
        self._places.release()

    async def _replace(self, lost: DecodingProcess) -> DecodingProcess:
        """Start another process until one starts; once the pool is closed, give back the lost one."""
        loop = asyncio.get_running_loop()
        while not self._closed.is_set():
            _log.warning("a process that decodes pictures ended; another one is started")
            try:
                return await loop.run_in_executor(self._threads, self._start_process, lost)
            except Exception as error:  # no file descriptors, threads or memory: a place is never given up
                _log.error("%s", error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), _RETRY_SECONDS)
        return lost

    def _start_process(self, lost: DecodingProcess | None = None) -> DecodingProcess:
        if lost:
            lost.close()
        return DecodingProcess(self._limits, timeout=self._timeout, memory_bytes=self._memory_bytes)
