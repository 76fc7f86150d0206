"""Whatever a directory holds, reading it ends: in a model, or in an error that quantkit raises on purpose.

``make test`` tries a few directories, always the same; ``make fuzz`` tries new ones for FUZZ_SECONDS (300) seconds.
Memory is limited while they run, and nothing may be written.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import save_tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import Files, changed_files
from transformers.utils import logging

import quantkit
from quantkit.errors import QuantkitError
from quantkit.verify import verify

_ADDRESS_SPACE = 6 * 2**30  # above what the process has when it begins
_GROWTH_KIB = 400 * 2**10
_CPU_SECONDS = 20.0  # a model of one block loads in a tenth of a second
_READERS: tuple[tuple[str, Callable[[Path], object]], ...] = (("load", quantkit.load), ("verify", verify))


def _saved(path: Path) -> Files:
    kept = (".safetensors", ".index.json", "config.json", "quantize_config.json")
    return Files({p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name.endswith(kept)})


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Directories as they should be: dense, and in every layout that quantkit writes."""
    root = tmp_path_factory.mktemp("valid")
    dense = save_tiny("llama", root / "dense", torch.bfloat16, num_hidden_layers=1)
    experts = save_tiny("mixtral", root / "experts", torch.bfloat16, num_hidden_layers=1)
    found = {"dense": _saved(dense), "experts": _saved(experts)}
    for name, source, scheme in (
        ("packed", dense, "w4a16_g32_asym"),
        ("int8", dense, "w8a8"),
        ("packed experts", experts, "w3a16_g32"),
        ("gptq", dense, "w4a16_g32_asym"),
        ("awq", dense, "w4a16_g32_asym"),
    ):
        fmt = name if name in ("gptq", "awq") else "compressed-tensors"
        quantkit.quantize(source, root / name, recipe={"scheme": scheme, "method": "rtn", "format": fmt})
        found[name] = _saved(root / name)
    return found


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    """No more address space than a small model needs; resident memory that does not grow from one to the next."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ADDRESS_SPACE, hard))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        logging.set_verbosity_warning()
        logging.enable_progress_bar()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _GROWTH_KIB, f"resident memory grew by {grown / 2**10:.0f} MiB"


def check(path: Path, files: Files) -> None:
    """Read a directory of these files with every reader."""
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)
    for name, reader in _READERS:
        start = time.process_time()
        try:
            reader(path)
        except QuantkitError as error:
            said = str(error)
            assert "\n" not in said, f"{name}: {said}"
            assert said.isprintable(), f"{name}: {said!r}"
        assert time.process_time() - start < _CPU_SECONDS, name
    assert {p.name: p.read_bytes() for p in path.iterdir()} == files, "something was written"


def test_the_valid_ones_are_read(valid: dict[str, Files], tmp_path: Path) -> None:
    for name, files in valid.items():
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        assert isinstance(quantkit.load(tmp_path / name), torch.nn.Module)


def _fuzz(valid: dict[str, Files], path: Path, examples: int, fixed: bool) -> None:
    @settings(
        max_examples=examples,
        derandomize=fixed,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # the directory that failed is left as it is; a smaller one would tell no more
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(valid)).flatmap(lambda name: changed_files(valid[name])))
    def run(files: Files) -> None:
        check(path / "model", files)

    run()


def test_a_few(valid: dict[str, Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _fuzz(valid, tmp_path, examples=40, fixed=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.fuzz
def test_many(valid: dict[str, Files], tmp_path: Path) -> None:
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "300"))
    rounds = 0
    while time.monotonic() < end:
        _fuzz(valid, tmp_path, examples=100, fixed=False)
        rounds += 1
    assert rounds
