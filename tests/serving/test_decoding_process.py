"""How a decoding process is started, what it has, and when it ends."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qwen_vl_classifier.errors import ClosedError, ConfigError, ImageError
from qwen_vl_classifier.serving import decoding_process
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.decoding_process import DecodingProcess
from tests.serving.batch_scorer import settle
from tests.serving.decoder_pools import GOOD, LIMITS, MEMORY, check_good, refusal, using
from tests.waiting import LIMIT, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("hostile")
class TestWhatTheProcessHas:
    def tell(self, expression: str) -> str:
        async def work(pool: DecoderPool) -> str:
            return str(await refusal(pool, b"!tell " + expression.encode()))

        return using(work)

    def test_none_of_the_servers_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QWEN_VL_CLASSIFIER_API_KEY", "secret")
        assert set(eval(self.tell("sorted(os.environ)"))) <= {"PYTHONPATH", "LD_LIBRARY_PATH", "LC_CTYPE"}

    def test_no_model_and_no_arrays(self) -> None:
        names = {"torch", "transformers", "numpy", "fastapi", "asyncio", "PIL"}
        assert self.tell(f"{names}&{{*sys.modules}}".replace(" ", "")) == "{'PIL'}"

    def test_no_files_but_its_pipes(self, tmp_path: Path) -> None:
        with (tmp_path / "open").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            if sys.platform == "linux":
                # One more is that of the folder which is being listed.
                assert len(eval(self.tell("os.listdir('/proc/self/fd')"))) == 5

    def test_little_processor_time_even_when_nobody_watches(self) -> None:
        soft, _ = eval(self.tell(f"__import__('resource').getrlimit({resource.RLIMIT_CPU})"))
        assert LIMIT < soft < 2 * LIMIT  # the timeout of these tests, a second, and what starting took

    @pytest.mark.parametrize(
        "attempt",
        [
            "open('{folder}/x','w').write('x'*9)+os.fsync(1)",
            "[os.dup(0)for(_)in(range(20))]",
            pytest.param(
                "os.fork()", marks=pytest.mark.skipif(os.geteuid() == 0, reason="the system lets root start processes")
            ),
        ],
    )
    def test_what_it_may_not(self, attempt: str, tmp_path: Path) -> None:
        async def work(pool: DecoderPool) -> ImageError:
            return await refusal(pool, b"!tell " + attempt.format(folder=tmp_path).encode())

        assert "crashed the process" in str(using(work))
        assert not (tmp_path / "x").exists() or (tmp_path / "x").stat().st_size == 0


class TestStart:
    @pytest.fixture
    def none_left(self) -> Iterator[None]:
        before = psutil.Process().children()
        yield
        # Those that ended and are not waited for would be among them.
        assert set(psutil.Process().children()) <= set(before)

    @pytest.mark.usefixtures("none_left")
    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold processes to this limit")
    def test_too_little_memory_is_an_error_of_configuration(self) -> None:
        with pytest.raises(ConfigError, match=r"does not start \(.*raise decode_memory"):
            using(check_good, memory=1_000_000, workers=2)

    @pytest.mark.usefixtures("none_left")
    def test_one_that_says_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding_process, "CHILD", "this")
        with pytest.raises(ConfigError, match="does not start"):
            using(check_good)

    @pytest.mark.usefixtures("none_left")
    def test_one_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding_process, "CHILD", "no_such_module")
        with pytest.raises(ConfigError, match="no_such_module"):
            using(check_good)

    @pytest.mark.usefixtures("none_left")
    def test_closing_while_they_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started, go_on = threading.Semaphore(0), threading.Event()
        wait_until_ready = DecodingProcess._wait_until_ready

        def held(process: DecodingProcess) -> None:
            started.release()
            go_on.wait()
            wait_until_ready(process)

        monkeypatch.setattr(DecodingProcess, "_wait_until_ready", held)

        async def work() -> None:
            pool = DecoderPool(workers=2, timeout=LIMIT, memory_bytes=MEMORY, limits=LIMITS)
            starting = asyncio.create_task(pool.start())
            for _ in range(2):
                await asyncio.to_thread(started.acquire)
            closing = asyncio.create_task(pool.close())
            await settle()
            assert not closing.done(), "there are processes to end"
            go_on.set()
            await closing
            with pytest.raises(ClosedError):
                await starting

        run(work())

    def test_when_the_server_is_gone_the_process_ends(self) -> None:
        process = DecodingProcess(LIMITS, timeout=LIMIT, memory_bytes=MEMORY)
        try:
            assert process.decode(GOOD).size == (48, 32)
            assert process._process.stdin is not None
            process._process.stdin.close()
            assert process._process.wait(LIMIT) == 0
        finally:
            process.close()

    def test_where_warnings_are_errors(self, tmp_path: Path) -> None:
        program = (
            "import asyncio\nfrom qwen_vl_classifier.serving.decoder import DecoderPool\n"
            "from qwen_vl_classifier.images.limits import ImageLimits\n"
            "async def main():\n"
            f"    pool = DecoderPool(workers=2, timeout={LIMIT}, memory_bytes=10**9, limits=ImageLimits())\n"
            "    await pool.start()\n"
            "    print((await pool.decode(open('good.png', 'rb').read())).size)\n"
            "    await pool.close()\n"
            "asyncio.run(main())\n"
        ).replace("open('good.png', 'rb').read()", repr(GOOD))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("(48, 32)\n", "")
