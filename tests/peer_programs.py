"""Other programs, each run by the interpreter of an environment of its own.

The directory in ``QUANTKIT_PEERS`` (by default ``.venv-peers`` in the repository) holds an environment for each, as the
Makefile sets them up: ``vllm``, ``transformers``, ``gptqmodel``, ``llmcompressor``, ``autoround``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).parent.parent
# bf16 clients lie within 0.01 of the negative log-likelihood and 0.05 of the mean difference on a trained model.
NLL_BOUND, MEAN_BOUND = 0.01, 0.05


def interpreter(program: str) -> Path:
    """The python of a program's environment; the test is skipped where there is none."""
    found = Path(os.environ.get("QUANTKIT_PEERS", REPOSITORY / ".venv-peers")) / program / "bin" / "python"
    if not found.is_file():
        pytest.skip(f"no environment of {program} at {found}: see the Makefile")
    return found


def run(program: str, *arguments: str, cwd: Path, timeout: int = 1800) -> str:
    """What a program's environment prints; quantkit is not on its path."""
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": "2",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [str(interpreter(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def words_after(mark: str, output: str) -> dict[str, str]:
    """The lines ``MARK NAME REST`` of an output, NAME -> REST; the program's own lines may stand before the mark."""
    lines = [line.partition(f"{mark} ")[2] for line in output.splitlines() if f"{mark} " in line]
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}


def log_probabilities(output: str) -> dict[str, Tensor]:
    """The lines ``LOGPROBS NAME [...]`` of an output."""
    return {name: torch.tensor(json.loads(rest)) for name, rest in words_after("LOGPROBS", output).items()}


def assert_close(ours: Tensor, theirs: Tensor, nll: float = NLL_BOUND, mean: float = MEAN_BOUND) -> None:
    """Log-probabilities of the same tokens by two programs."""
    assert abs(float(ours.mean() - theirs.mean())) < nll
    assert float((ours - theirs).abs().mean()) < mean
