from __future__ import annotations

import pytest
import torch
from layers import fastest_cpu

from quantkit.errors import KernelError
from quantkit.kernels import BACKENDS, LinearSpec, choose_backend
from quantkit.scheme import QuantScheme

W4 = QuantScheme(4, 64)


def spec(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", scheme: QuantScheme = W4) -> LinearSpec:
    return LinearSpec(128, 64, scheme, dtype, device)


def test_names_are_unique() -> None:
    assert len({backend.name for backend in BACKENDS}) == len(BACKENDS)


def test_first_that_fits() -> None:
    assert choose_backend(spec()).name == fastest_cpu()
    assert choose_backend(spec(torch.float32)).name == fastest_cpu(dtype=torch.float32)
    assert choose_backend(spec(torch.float64)).name == "reference"
    assert choose_backend(spec(device="cuda")).name == "reference"


def test_by_name() -> None:
    assert choose_backend(spec(), "reference").name == "reference"
    with pytest.raises(KernelError, match=r"float32.*cpu refuses activations of torch.float32.*slow"):
        choose_backend(spec(torch.float32), "cpu")
    known = "cpu_jit, cpu, cpu_int8, triton, triton_int8, cuda_int8, reference, simulated"
    with pytest.raises(KernelError, match=f"no backend 'marlin'; choose one of {known}"):
        choose_backend(spec(), "marlin")


def test_when_nothing_fits_every_refusal_is_printed_on_one_line() -> None:
    with pytest.raises(KernelError) as caught:
        choose_backend(spec(torch.int8, "meta"))
    text = str(caught.value)
    assert "\n" not in text
    assert all(f"{backend.name} refuses" in text for backend in BACKENDS)
    assert "Linear(128, 64, w4a16_g64_sym, int8, meta)" in text


def test_spec_is_hashable_and_compares_by_value() -> None:
    assert {spec(): 1}[spec()] == 1
    assert spec() != spec(scheme=QuantScheme(4, 32))
