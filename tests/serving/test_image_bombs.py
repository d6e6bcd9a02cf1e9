"""Pictures that mean harm get a picture or the right refusal, and the processes go on for the next request."""

from __future__ import annotations

import random

import pytest

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving.decoder import DecoderPool
from tests.serving.bombs import BOMBS, DAMAGED, EITHER, PICTURE, TOO_LARGE, saved
from tests.waiting import LIMIT, run

LIMITS = ImageLimits(max_bytes=10_000_000)
GOOD = saved("PNG")
PIXELS = open_image(GOOD).tobytes()


async def outcome(pool: DecoderPool, data: bytes) -> str:
    """Decode a file and then a good one, and say what became of the first."""
    try:
        image = await pool.decode(data)
    except ImageError as error:
        said, result = str(error), error.code
    else:
        said, result = "", PICTURE
        assert image.mode == "RGB"
        assert image.width * image.height <= LIMITS.max_pixels
    assert len(said) < 300
    assert said.isprintable()
    assert (await pool.decode(GOOD)).tobytes() == PIXELS
    return result


def outcomes(files: dict[str, bytes], *, memory: int = 1_000_000_000) -> tuple[dict[str, str], int]:
    """Decode many files, and tell how many processes were lost."""

    async def work() -> tuple[dict[str, str], int]:
        pool = DecoderPool(workers=1, timeout=LIMIT, memory_bytes=memory, limits=LIMITS)
        await pool.start()
        try:
            results, lost, before = {}, 0, pool.processes
            for name, data in files.items():
                results[name] = await outcome(pool, data)
                lost += pool.processes != before
                before = pool.processes
            return results, lost
        finally:
            await pool.close()

    return run(work())


def test_each_gets_a_picture_or_the_right_refusal() -> None:
    assert len(BOMBS) >= 90
    seen, lost = outcomes({name: make() for name, (make, _) in BOMBS.items()})
    wanted = {
        name: seen[name] if expected == EITHER and seen[name] in (PICTURE, DAMAGED) else expected
        for name, (_, expected) in BOMBS.items()
    }
    assert seen == wanted
    assert lost == 0


@pytest.mark.soak
def test_a_real_memory_bomb() -> None:
    bombs = ("png of 25 MP with alpha", "png of 25 MP in 16-bit grey", "png of 25 MP in palette with alpha")
    seen, lost = outcomes({name: BOMBS[name][0]() for name in bombs}, memory=200_000_000)
    assert set(seen.values()) == {TOO_LARGE}
    assert lost == len(bombs)


@pytest.mark.parametrize("count", [400, pytest.param(40_000, marks=pytest.mark.soak)])
def test_random_damage(count: int) -> None:
    chance = random.Random(7)
    files = [GOOD, saved("JPEG"), saved("JPEG", progressive=True), saved("WEBP"), saved("WEBP", lossless=True)]
    damaged = {}
    for number in range(count):
        data = bytearray(chance.choice(files))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        damaged[str(number)] = bytes(data)
    seen, lost = outcomes(damaged)
    assert lost == 0
    assert {PICTURE, DAMAGED} <= set(seen.values())
