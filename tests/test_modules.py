"""quantize_module(): a vision transformer and other torch models, in place, by RTN and by GPTQ with data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import normal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantkit
from quantkit.linear import QuantLinear

WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        found: Tensor = self.out(attended)
        return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        found: Tensor = x + self.mlp(self.norms[1](x))
        return found


class Vit(nn.Module):
    """Patches of a picture, two encoder blocks, a head over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        found: Tensor = self.head(self.blocks(x).mean(1))
        return found


def vit() -> Vit:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Vit()


def pictures(count: int = 64, seed: int = 0) -> Tensor:
    """Smooth ones: neighbouring patches are alike, and so are the channels that they excite."""
    coarse = normal(count, 3, 4, 4, seed=seed)
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


def output_error(model: Vit, exact: Vit) -> float:
    x = pictures(64, seed=5)
    with torch.no_grad():
        return float((model.eval()(x) - exact.eval()(x)).square().mean())


def digests(model: nn.Module) -> dict[str, str]:
    return {n: m.quantized().digest() for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def dense_state(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def test_gptq_on_a_vision_transformer_beats_rtn() -> None:
    """On pictures that it was not calibrated on; the mode and the hooks are as they were."""
    gptq, rtn = vit().train(), vit()
    gptq.blocks[1].eval()
    loader = DataLoader(TensorDataset(pictures()), batch_size=16)
    records = quantkit.quantize_module(gptq, "w3a16_g16", data=loader, call=lambda module, batch: module(batch[0]))
    assert [r.name for r in records[:3]] == ["blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.v"]
    assert records[-1].name == "head"
    assert len(records) == 13
    assert {r.method for r in records} == {"gptq"}
    assert all(r.num_tokens == 64 * (1 if r.name == "head" else 16) for r in records)
    assert gptq.training
    assert gptq.blocks[0].training
    assert not gptq.blocks[1].training
    assert not any(m._forward_hooks for m in gptq.modules())
    assert {r.method for r in quantkit.quantize_module(rtn, "w3a16_g16")} == {"rtn"}
    assert output_error(gptq, vit()) < 0.6 * output_error(rtn, vit())


def test_rtn_is_replace_linears() -> None:
    found, expected = vit(), vit()
    quantkit.quantize_module(found, "w4a16_g32_asym")
    quantkit.replace_linears(expected, "w4a16_g32_asym")
    assert digests(found) == digests(expected)


def test_later_layers_see_what_quantized_ones_give() -> None:
    """The second of two layers, solved by hand from the inputs that the quantized first one gives."""
    from quantkit.stats import LayerStats, Stat

    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    second = model.get_submodule("2").get_parameter("weight").detach().clone()
    data = [normal(40, 32, seed=s) for s in range(3)]
    quantkit.quantize_module(model, "w2a16_g16", data=data)
    stats = LayerStats(32, frozenset({Stat.HESSIAN}), torch.device("cpu"))
    with torch.no_grad():
        for x in data:
            stats.update(model[:2](x))
    expected = quantkit.GPTQ().solve(second, quantkit.parse_scheme("w2a16_g16"), stats, torch.float32).weight
    found: Any = model[2]
    assert torch.equal(found.quantized().codes, expected.codes)


def test_static_activations_and_batches_of_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(32, 32)

        def forward(self, picture: Tensor) -> Tensor:
            found: Tensor = self.lin(picture)
            return found

    model = Named()
    x = normal(8, 32)
    quantkit.quantize_module(model, "w8a8_static", solver=quantkit.RTN(), data=[{"picture": x}])
    layer: Any = model.lin
    assert layer.quantized().act_scale == pytest.approx(float(x.abs().max()) / 127.5, rel=0.02)


def test_a_layer_with_two_names_and_skipped_ones() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 16)})

    def both(module: Any, x: Tensor) -> Tensor:
        found: Tensor = module["b"](module["a"](x))
        return found

    (record,) = quantkit.quantize_module(model, "w4a16_g16", data=[normal(4, 16)], call=both, skip=["c"])
    assert record.num_tokens == 8
    assert model["a"] is model["b"]
    assert isinstance(model["a"], QuantLinear)
    assert type(model["c"]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solver": quantkit.GPTQ()}, "gptq needs calibration data"),
        ({"scheme": "w8a8_static"}, "w8a8_static_channel_sym needs calibration data"),
        ({"data": iter([pictures()])}, "an iterator, which ends after one walk"),
        ({"data": []}, "data holds no batch"),
        ({"data": [pictures()], "solver": quantkit.GPTQ(drift_correction=1.0)}, "drift correction"),
        (
            {"data": [pictures()], "call": lambda m, _: m.blocks[0](normal(1, 4, WIDTH))},
            r"7 layers never ran .*blocks\.1",
        ),
        ({"data": [pictures()], "scheme": "w4a16_g48"}, "13 of 13 layers cannot have w4a16_g48"),
        ({"data": [pictures() * float("nan")]}, r"blocks\.0\.attention\.q"),
        ({"data": [pictures()], "skip": ["heads"]}, "did you mean head"),
    ],
)
def test_what_cannot_be_done_leaves_the_model_as_it_was(options: dict[str, Any], text: str) -> None:
    model = vit()
    before = dense_state(model)
    with pytest.raises(quantkit.QuantkitError, match=text):
        quantkit.quantize_module(model, **{"scheme": "w4a16_g16", **options})
    assert dense_state(model) == before
    assert not any(m._forward_hooks for m in model.modules())


def test_a_failure_in_the_middle_puts_the_dense_layers_back() -> None:
    model = vit()
    before = dense_state(model)
    calls = []

    def run(module: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        found: Tensor = module(x if len(calls) < 4 else x * float("inf"))
        return found

    with pytest.raises(quantkit.HessianError, match=r"blocks\.0\.mlp\.0"):
        quantkit.quantize_module(model, "w4a16_g16", data=[pictures()], call=run)
    assert dense_state(model) == before
