"""The heap's settings: harmless to call, and freed tensors leave the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantkit.heap import use_huge_pages

_FREED = """
import torch
from quantkit.heap import map_large_blocks, trim

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
map_large_blocks()
torch.ones(8).sum()
before = resident()
kept = []
for _ in range(40):
    held = [torch.ones(2_000_000) for _ in range(4)]
    kept.append(torch.ones(20_000))  # small blocks between the large ones
    del held
trim()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_tensors_leave_the_process() -> None:
    """32 MB are allocated and freed 40 times, with 80 KB kept each time: no more than what is kept stays resident."""
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3.2e6 + 4e6


def test_the_users_setting_of_huge_pages_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
