"""Thousands of damaged pictures, in a process with little memory: each opens or is refused; nothing else happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import ROOT
from tests.images import damage

FEW, MANY, AT_A_TIME = 300, 40_000, 4_000


def open_damaged(first: int, stop: int, folder: Path) -> dict[str, int]:
    place = folder / "number"
    command = [sys.executable, "-m", "tests.images.damage", str(first), str(stop), str(place)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.returncode, run.stderr) == (0, ""), f"damaged({int(place.read_bytes())}): {run.stderr[-3000:]}"
    found: dict[str, int] = json.loads(run.stdout)
    assert sum(found.values()) == stop - first
    return found


def test_a_few_hundred(tmp_path):
    found = open_damaged(0, FEW, tmp_path)
    assert min(found.values()) > FEW / 10


def test_they_are_the_same_in_every_run():
    assert [damage.damaged(number) for number in range(20)] == [damage.damaged(number) for number in range(20)]
    assert {damage.damaged(number)[0] for number in range(len(damage.SOUND))} == damage.SOUND.keys()


@pytest.mark.soak
@pytest.mark.parametrize("first", range(FEW, MANY, AT_A_TIME))
def test_forty_thousand(tmp_path, first):
    open_damaged(first, first + AT_A_TIME, tmp_path)
