"""What the kernels are compiled for: the choice of a target, machine code of every target, the self-test."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import JitBackend, LinearSpec, jit_check
from quantkit.kernels.jit import product, tiles_of
from quantkit.kernels.jit_compile import assembly
from quantkit.kernels.jit_targets import TARGETS, VARIABLE, Target, available, chosen_target
from quantkit.kernels.jit_text import Kind
from quantkit.kernels.jit_tile_ir import tile_ir
from quantkit.scheme import QuantScheme, parse_scheme

needs_llvmlite = pytest.mark.skipif(find_spec("llvmlite") is None, reason="llvmlite is not installed")
needs_target = pytest.mark.skipif(
    find_spec("llvmlite") is None or not available(), reason="no llvmlite, or no kernels for this CPU"
)


def test_the_environment_names_a_lesser_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    here = available()
    assert chosen_target() is (here[0] if here else None)
    for target in here:
        monkeypatch.setenv(VARIABLE, target.name)
        assert chosen_target() is target


@pytest.mark.parametrize("name", ["avx3", "", "neon avx2"])
def test_a_wrong_name_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(KernelError, match=f"^{VARIABLE}: '{name}' is not a target of this CPU, which has [^\n]*$"):
        chosen_target()


def test_a_target_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = next(target for target in TARGETS if target not in available())
    monkeypatch.setenv(VARIABLE, missing.name)
    with pytest.raises(KernelError, match=missing.name):
        chosen_target()


@pytest.mark.parametrize(("tokens", "most"), [(1, 6), (5, 6), (6, 6), (7, 6), (16, 6), (96, 6), (101, 6), (400, 4)])
def test_tiles_cover_all_rows_once(tokens: int, most: int) -> None:
    covered: list[int] = []
    for start, size, tiles in tiles_of(tokens, most):
        assert 1 <= size <= most
        assert tiles >= 1
        covered += range(start, start + size * tiles)
    assert covered == list(range(tokens))


def hot_loop(text: str) -> list[str]:
    """The instructions of the block with the most multiplications, up to its jump."""
    blocks: dict[str, list[str]] = {}
    label = ""
    for line in map(str.strip, text.splitlines()):
        found = re.match(r"(\.LBB\w+):", line)
        if found:
            label = found[1]
        elif line and not line.startswith((".", "#", "//")):
            blocks.setdefault(label, []).append(line)
    label = max(blocks, key=lambda name: sum("fmadd" in line or "fmla" in line for line in blocks[name]))
    end = next(i for i, line in enumerate(blocks[label]) if line.endswith(label))
    return blocks[label][:end]


@needs_llvmlite
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_machine_code_of_every_target(target: Target, bits: int) -> None:
    """One row of x: a fused multiplication for each register of weights, no other arithmetic in floating point for
    nibbles and one conversion for bytes, nothing spilled, no calls but the own one; half precision too."""
    units, columns = 2, 8 if bits == 4 else 4
    registers = units * columns * 16 * 32 // {"avx2": 256, "avx_vnni": 256, "neon": 128}.get(target.name, 512)
    loop = hot_loop(assembly(tile_ir(Kind(bits, 64, True, "bfloat"), "bfloat", 1, target.chains), target))
    names = [line.split()[0] for line in loop]
    assert sum("fmadd" in name or name == "fmla" for name in names) == registers
    assert sum(name in ("vcvtdq2ps", "scvtf") for name in names) == (0 if bits == 4 else registers)
    assert not [name for name in names if name.startswith(("vsub", "vadd", "vmul", "fsub", "fadd", "fmul"))]
    # A constant may be spilled where it is the 17th of 16 registers; sums never.
    assert sum(bool(re.search(r"%[xyz]mm\d+, -?\d*\(%rsp|^st[rp]\b", line)) for line in loop) <= 1
    for dtype in ("bfloat", "half", "float"):
        text = assembly(tile_ir(Kind(bits, 64, False, dtype), dtype, target.tile, target.chains), target)
        assert set(re.findall(r"\b(?:callq?|bl)\s+(\S+)", text)) <= {"*%rax", "activations"}


def test_an_untried_target_is_tested_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong is refused with its error and a warning; torch's operators are next."""
    untried = next(target for target in TARGETS if not target.tried)
    monkeypatch.setattr(jit_check, "chosen_target", lambda: untried)
    monkeypatch.setattr("quantkit.kernels.jit_backend.chosen_target", lambda: untried)
    monkeypatch.setattr("quantkit.kernels.jit_backend.find_spec", lambda _: object())
    monkeypatch.setattr(jit_check, "product", lambda x, *_: torch.full((x.shape[0], 32), torch.nan))
    jit_check._tested.cache_clear()
    spec = LinearSpec(64, 64, parse_scheme("w4a16_g64"), torch.bfloat16, "cpu")
    with pytest.warns(UserWarning, match=f"cpu_jit refuses this CPU, where its kernels for {untried.name} failed"):
        reason = JitBackend().why_not(spec)
    assert "W4 is wrong by inf" in (reason or "")
    jit_check._tested.cache_clear()


@needs_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_self_test_passes_here(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fails where a product is off by one part in fifty."""
    target = chosen_target()
    assert target is not None
    jit_check._tested.cache_clear()
    assert jit_check._tested(target, dtype) is None
    right = product

    def wrong(x: Tensor, *others: object) -> Tensor:
        return right(x, *others) * 1.02  # type: ignore[arg-type]

    monkeypatch.setattr(jit_check, "product", wrong)
    jit_check._tested.cache_clear()
    with pytest.warns(UserWarning, match="failed their test"):
        assert jit_check._tested(target, dtype) is not None
    jit_check._tested.cache_clear()


@needs_target
@pytest.mark.parametrize("name", [target.name for target in available()])
def test_every_target_of_this_cpu_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    for bits in (4, 8):
        for symmetric in (True, False):
            scheme = QuantScheme(bits, 64, symmetric=symmetric)
            for dtype, most in ((torch.bfloat16, 0.01), (torch.float16, 0.001), (torch.float32, 1e-6)):
                assert jit_check._error(scheme, dtype, 20) < most
