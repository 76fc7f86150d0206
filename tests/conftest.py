"""Shared fixtures: tiny models of every family, saved once a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import VOCAB, save_tiny
from torch import Tensor

import quantkit.transformers
from quantkit.source import BUILTIN_PATH

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
os.environ["OMP_NUM_THREADS"] = "1"  # and the processes that tests start sum in the same order
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any import of triton: its kernels run on the CPU, in Python


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> directory of a tiny float32 model without a tokenizer; not to be changed."""
    root = tmp_path_factory.mktemp("families")

    def saved(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_tiny(family, path)

    return saved


@pytest.fixture(scope="session")
def tokens() -> list[Tensor]:
    """Calibration samples for the tiny models, of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in (40, 40, 24, 33, 40, 24)]


@pytest.fixture
def registered() -> Iterator[None]:
    """quantkit comes first, also where compressed-tensors is installed; other tests see the registry as it was."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    quantkit.transformers.register()
    yield
    AUTO_QUANTIZATION_CONFIG_MAPPING.clear()
    AUTO_QUANTIZATION_CONFIG_MAPPING.update(before)


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may spoil."""
    return Path(shutil.copytree(BUILTIN_PATH, tmp_path / "model"))
