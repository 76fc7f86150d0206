"""Linear layers of bfloat16 on a processor that cannot multiply it: oneDNN's numbers, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import save_tiny
from layers import normal
from safetensors.torch import load_file
from torch.nn.functional import linear

from quantkit import precision
from quantkit.precision import PRODUCTS_IN_FLOAT32, forward_products, has_bfloat16_products
from quantkit.report import Event, Note
from quantkit.run import quantize

BF16 = torch.bfloat16


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("without_instructions")
def test_sums_are_in_float32_and_rounded_once(bias: bool) -> None:
    x, weight, added = normal(33, 96).to(BF16), normal(40, 96, seed=1).to(BF16), normal(1, 40, seed=2)[0].to(BF16)
    given = added if bias else None
    exact = x.double() @ weight.double().T + (added.double() if bias else 0)
    with torch.no_grad(), forward_products():
        found = linear(x, weight, given)
        wide = linear(x.float(), weight.float())
        by_name = linear(input=x, weight=weight, bias=given)
    assert (found.dtype, wide.dtype) == (BF16, torch.float32)
    assert torch.equal(by_name, found)
    assert float((found != exact.to(BF16)).float().mean()) < 0.01  # sums next to the middle of two numbers
    outside = linear(x, weight, given)
    assert float((outside != found).float().mean()) < (0.02 if has_bfloat16_products() else 1)


@pytest.mark.usefixtures("without_instructions")
def test_gradients_are_torchs_own() -> None:
    weight = normal(8, 16).to(BF16).requires_grad_()
    with forward_products():
        assert linear(normal(2, 16).to(BF16), weight).grad_fn is not None


@pytest.mark.skipif(not has_bfloat16_products(), reason="this CPU has no products of bfloat16 to compare with")
def test_a_run_is_told_and_gives_nearly_the_same_codes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """GPTQ on bfloat16: sums in another order move a code here and there."""
    model = save_tiny("llama", tmp_path / "model", dtype=BF16)
    recipe = {"scheme": "w4a16_g32", "method": "gptq"}
    tokens = torch.randint(100, (8, 64), generator=torch.Generator().manual_seed(0))
    runs: list[list[Event]] = [[], []]
    for index, events in enumerate(runs):
        if index:
            request.getfixturevalue("without_instructions")
        quantize(model, tmp_path / str(index), recipe=recipe, tokens=list(tokens), observer=events.append, device="cpu")
    assert [sum(event == Note(PRODUCTS_IN_FLOAT32) for event in events) for events in runs] == [0, 1]
    first, second = (_tensors(tmp_path / str(i)) for i in (0, 1))
    words = [name for name in first if name.endswith("weight_packed")]
    assert words
    changed = sum(int((_nibbles(first[name]) != _nibbles(second[name])).sum()) for name in words)
    assert changed < 0.02 * sum(8 * first[name].numel() for name in words)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return (words[..., None] >> torch.arange(0, 32, 4)) & 15
