"""Golden runs: the shipped model through whole recipes. A change of any step that matters moves a pinned figure."""

from __future__ import annotations

from typing import Any

import pytest

import quantkit
from quantkit.evaluation import ModelScore

CALIBRATION = {"source": "builtin", "num_samples": 16, "sequence_length": 256}
ROTATION = [{"name": "rotation", "residual": False}]
SMOOTHQUANT = [{"name": "smoothquant"}]
GPTQ_REFIT = {"name": "gptq", "sweeps": 2, "refit": True}

# name: (recipe, perplexity, KL divergence from the dense model in nats a token), on 16 windows of 256 tokens, scored in
# float32. Measured on one thread of an AMD Zen 5 with AVX-512.
DENSE = 35.4069
GOLDEN: dict[str, tuple[dict[str, Any], float, float]] = {
    "w4 rtn": ({"scheme": "w4a16_g64_sym", "method": "rtn"}, 36.0489, 0.024144),
    "w4 gptq": ({"scheme": "w4a16_g64_sym", "method": "gptq"}, 35.7361, 0.011525),
    "w4 asym gptq": ({"scheme": "w4a16_g64_asym", "method": "gptq"}, 35.5211, 0.011499),
    "w3 asym gptq": ({"scheme": "w3a16_g64_asym", "method": "gptq"}, 36.7404, 0.049215),
    "w2 refitted": ({"scheme": "w2a16_g32_asym", "method": GPTQ_REFIT}, 40.5228, 0.204298),
    "w4 awq": ({"scheme": "w4a16_g64_sym", "method": "rtn", "transforms": [{"name": "awq"}]}, 36.0620, 0.022212),
    "w8a8 smoothquant": (
        {"scheme": "w8a8", "method": "rtn", "transforms": SMOOTHQUANT},
        35.4442,
        0.000957,
    ),
    "w4 rotated gptq": ({"scheme": "w4a16_g64_sym", "method": "gptq", "transforms": ROTATION}, 35.9184, 0.011751),
}

# Rounding to nearest depends on no sum. Elsewhere a sum in another order moves a code now and then, and GPTQ everything
# after it: with ATEN_CPU_CAPABILITY=avx2, and with =default, ONEDNN_MAX_CPU_ISA=AVX2 and MKL_CBWR=COMPATIBLE together,
# divergences moved by up to 5.4 % and perplexities by up to 0.7 %. Twice that is allowed. A method that does nothing
# doubles the divergence. On an AMD Zen 3 the perplexities at 2 and 3 bits moved by 1.6 and 1.5 %, and nothing else by
# more than before.
KL_TOLERANCE, PERPLEXITY_TOLERANCE = 0.11, 0.015
PERPLEXITY_TOLERANCES = {"w2 refitted": 0.032, "w3 asym gptq": 0.031}
EXACT = {"w4 rtn"}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelScore]:
    """All models on the same windows, the dense one first."""
    directory = tmp_path_factory.mktemp("golden")
    for name, (recipe, _, _) in GOLDEN.items():
        quantkit.quantize("builtin", directory / name, recipe={**recipe, "calibration": CALIBRATION})
    spec = quantkit.EvalSpec("builtin", sequence_length=256, limit=16)
    paths = [str(directory / name) for name in GOLDEN]
    results = quantkit.evaluate(["builtin", *paths], spec, dtype="float32").results
    return dict(zip(["dense", *GOLDEN], results, strict=True))


def test_the_dense_model(scores: dict[str, ModelScore]) -> None:
    assert scores["dense"].perplexity == pytest.approx(DENSE, rel=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_run(name: str, scores: dict[str, ModelScore]) -> None:
    _, perplexity, kl = GOLDEN[name]
    found = scores[name]
    assert found.kl == pytest.approx(kl, rel=1e-3 if name in EXACT else KL_TOLERANCE)
    tolerance = 1e-4 if name in EXACT else PERPLEXITY_TOLERANCES.get(name, PERPLEXITY_TOLERANCE)
    assert found.perplexity == pytest.approx(perplexity, rel=tolerance)


def test_the_order_of_the_methods(scores: dict[str, ModelScore]) -> None:
    """Whatever a change of the figures is worth, this is what the methods are for."""
    assert scores["w4 gptq"].kl < 0.6 * scores["w4 rtn"].kl
    assert scores["w4 awq"].kl < 0.97 * scores["w4 rtn"].kl
    assert scores["w8a8 smoothquant"].kl < scores["w4 gptq"].kl < scores["w3 asym gptq"].kl < scores["w2 refitted"].kl
