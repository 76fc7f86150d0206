"""Hidden states between blocks: the same in memory and in a file, and a full disk is an error."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantkit.activations import Activations
from quantkit.errors import InterruptedRunError

SHAPES = [(1, 5, 3), (1, 2, 3), (1, 9, 3)]


@pytest.mark.parametrize("budget", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store(tmp_path: Path, budget: int, dtype: torch.dtype) -> None:
    store = Activations(SHAPES, dtype, budget, tmp_path)
    assert store.nbytes == 16 * 3 * dtype.itemsize
    assert (store.path is not None) == (budget == 0)
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    for index, value in enumerate(values):
        store[index] = value
    store[1] = values[1] + 1
    assert len(store) == 3
    assert all(torch.equal(store[i], values[i] + (i == 1)) for i in range(3))
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process may not grow beyond 1 MB."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError, match="no room for 4000000 bytes of activations"):
        Activations([(1, 1000, 1000)], torch.float32, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
