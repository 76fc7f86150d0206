"""The heap's settings: harmless to call, and freed tensors leave the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.heap import HUGE_PAGE, use_huge_pages
from quantkit.kernels.jit import aligned

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


def _huge_bytes(address: int) -> int:
    """How much of the mapping around an address lies in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def _pages_are_given() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text(encoding="ascii")


@pytest.mark.skipif(not _pages_are_given(), reason="this system gives no transparent huge pages")
def test_large_packed_weights_lie_in_huge_pages() -> None:
    """All of their whole pages, unless the system has none to give at the moment; small ones are only aligned."""
    packed = aligned(torch.ones(5 * HUGE_PAGE // 2, dtype=torch.uint8))
    assert packed.data_ptr() % HUGE_PAGE == 0
    assert int(packed.sum()) == packed.numel()
    given = _huge_bytes(packed.data_ptr())
    if not given:
        pytest.skip("this system had no huge pages left")
    assert given >= 2 * HUGE_PAGE
    small = aligned(torch.ones(1000))
    assert small.data_ptr() % 64 == 0
    assert float(small.sum()) == 1000
