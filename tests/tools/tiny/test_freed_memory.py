"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from Linux's /proc")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept_where_that_is_asked_for(keep):
    """In a process of its own: the setting cannot be taken back."""
    program = f"""
from pathlib import Path
from tools.tiny.freed_memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
block = bytearray(50_000_000)
full = pages()
del block
print(full - pages())
"""
    freed = int(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    )
    assert (freed < 1000) == keep  # the block has about 12,000 pages
