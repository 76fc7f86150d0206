"""The study of layers on a GPU, from end to end on a device that is pretended: what would stop its first real run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pretended_gpu import pretended_gpu

EVALS = Path(__file__).resolve().parent.parent / "evals"


@pytest.fixture(autouse=True)
def evals_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVALS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the study itself runs")
def test_the_whole_study(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from speed import gpu

    schemes = ("w4a16_g64_asym", "w8a16_channel")
    for name, value in {
        "SHAPES": ((64, 128),),
        "TOKENS": (1, 65),
        "SCHEMES": schemes,
        "_COPY_BYTES": 1 << 16,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    with pretended_gpu():
        results = gpu.study(2)
    names = {"F.linear", *schemes}
    assert len(results["cases"]) == 2 * 2 * len(names)
    assert {case["name"] for case in results["cases"]} == names
    assert all(case["seconds"][0] > 0 and case["over_floor"] > 0 for case in results["cases"])
    text = gpu.render(results)
    assert "on Pretended; 2 rounds." in text
    assert len(re.findall(r"^\| w4a16_g64_asym \| (?:b?float16) \| 64x128 \|", text, re.M)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: quantkit tune runs")
def test_tuning_measures_every_candidate() -> None:
    pytest.importorskip("triton")
    from speed.frame import random_linear

    from quantkit import QuantLinear
    from quantkit.kernels import triton_tune

    with pretended_gpu():
        layer = QuantLinear.from_linear(random_linear(64, 256, torch.float16), "w4a16_g128_asym", backend="triton")
        product = triton_tune.products(layer.spec)[0]
        measure = triton_tune.measurer(product, layer._packed())
        tile, splits = triton_tune.candidates(product, 8)[0]
        seconds = measure(tile, splits)
        assert seconds is not None
        assert seconds > 0
