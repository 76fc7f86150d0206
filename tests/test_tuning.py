"""Tuning on blocks small enough to know the answer: straight-through values and gradients, optima, what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import normal
from torch import Tensor, nn

import quantkit
from quantkit.activations import Activations
from quantkit.errors import CheckpointError, RecipeError
from quantkit.grid import dequantize, quantize, quantize_groups
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.solvers import AutoRound
from quantkit.tuned_weights import ClippedRounding, ScaledCodes, TunedVector, TunedWeight
from quantkit.tuning import BlockRun, BlockTuner, BlockTuning, Schedule, round_block, shuffled, split, tune_block

SCHEMES = [
    QuantScheme(2, 8),
    QuantScheme(3, 16, symmetric=False),
    QuantScheme(4, None),
    QuantScheme(4, 8, symmetric=False),
    QuantScheme(8, None, symmetric=False),
]
SHIPPED = [torch.bfloat16, torch.float16, torch.float32]


class Block(nn.Module):
    """Two layers and a norm, with a residual connection."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 4 + (1.0 if parameter is self.norm.weight else 0.0)
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


def store(states: Sequence[Tensor], path: Path) -> Activations:
    found = Activations([tuple(s.shape) for s in states], states[0].dtype, 2**30, path)
    for index, state in enumerate(states):
        found[index] = state
    return found


def block_run(block: nn.Module, states: Sequence[Tensor], path: Path, index: int = 0) -> BlockRun:
    """The block on these inputs; what it gives now is the target."""

    def call(hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(block, dict(parameters), (hidden,))
        return output

    targets = store([block(s) for s in states], path)
    return BlockRun("block", call, frozenset(), torch.float32, store(states, path), targets, torch.device("cpu"), index)


def samples(width: int, count: int = 12, length: int = 20) -> list[Tensor]:
    """Inputs whose channels depend on each other, or rounding to nearest would be the best that there is."""
    mix = normal(width, width, seed=99) / width**0.5 + 0.7
    return [normal(1, length, width, seed=100 + i) @ mix for i in range(count)]


def moved(weight: TunedWeight, seed: int = 3) -> None:
    """Every parameter somewhere else."""
    with torch.no_grad():
        for k, (parameter, low, high) in enumerate(weight.signed):
            parameter.add_(normal(*parameter.shape, seed=seed + k) / 4).clamp_(low, high)
        for parameter in weight.smooth:
            parameter.add_(normal(*parameter.shape, seed=seed) / 20)


def quantize_with(w: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> QuantizedTensor:
    columns = w.shape[1] // scale.shape[1]
    wide, zeros = (values.repeat_interleave(columns, 1) for values in (scale.float(), zero_point.float()))
    return QuantizedTensor(quantize(w, wide, zeros, scheme).to(torch.uint8), scale, zero_point, scheme)


def equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a.digest() == b.digest()


@pytest.mark.parametrize("dtype", SHIPPED, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_starts_at_nearest(scheme: QuantScheme, dtype: torch.dtype) -> None:
    w = normal(6, 32)
    w[0] = 0
    start = ClippedRounding("a", w, scheme, dtype, clip=True)
    assert equal(start.quantized(), quantize_groups(w, scheme, dtype))


@pytest.mark.parametrize("dtype", SHIPPED, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_trained_is_what_ships(scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Wherever the parameters are, the weight in the graph is the decoded weight bit for bit."""
    w = normal(6, 32)
    q = quantize_groups(w + normal(6, 32, seed=5) / 20, scheme, dtype)
    candidates: list[TunedWeight] = [
        ClippedRounding("a", w, scheme, dtype, clip=True),
        ScaledCodes("a", q, scales=True),
        ScaledCodes("a", q, scales=True, original=w),
    ]
    for candidate in candidates:
        before = candidate.quantized()
        moved(candidate)
        assert torch.equal(candidate.weight().detach(), dequantize(candidate.quantized(), torch.float32))
        assert not equal(candidate.quantized(), before)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tuning_starts_at_the_solver(scheme: QuantScheme, original: bool) -> None:
    """Also where the solver moved the weight to another cell than its nearest."""
    w = normal(6, 32)
    q = quantize_groups(w + normal(6, 32, seed=5) / 4, scheme, torch.bfloat16)
    start = ScaledCodes("a", q, scales=True, original=w if original else None)
    assert equal(start.quantized(), q)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("dtype", SHIPPED, ids=str)
def test_negative_scales(dtype: torch.dtype, original: bool) -> None:
    """A symmetric search tries both signs: tuning starts at what it found, and moves each scale's size."""
    w = normal(6, 32)
    q = quantize_groups(w, QuantScheme(4, 8), dtype)
    signs = torch.where(torch.arange(q.scale.numel()).view(q.scale.shape) % 2 == 0, 1, -1)
    q = quantize_with(w, q.scale * signs, q.zero_point, q.scheme)
    assert bool((q.scale < 0).any())
    tuned = ScaledCodes("a", q, scales=True, original=w if original else None)
    assert equal(tuned.quantized(), q)
    moved(tuned)
    found = tuned.quantized()
    assert torch.equal(found.scale < 0, q.scale < 0)
    assert not torch.equal(found.scale, q.scale)
    assert torch.equal(tuned.weight().detach(), dequantize(found, torch.float32))


def test_tuning_gains_after_a_search(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """GPTQ's default search chooses negative scales too, which tuning once lost: its start is the solver's error."""
    recipe = {"scheme": "w4a16_g32", "method": "gptq", "tuning": {"name": "block", "epochs": 1}}
    tokens = [torch.randint(300, (40,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    report = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=tokens).report
    assert all(block["error_after"] <= block["error_before"] < 0.3 for block in report["tuned"])
    assert all(layer["sqnr_db"] > 12 for layer in report["layers"])


def test_reordered_groups() -> None:
    """With g_idx, each column has the scale of its own group."""
    scheme = QuantScheme(4, 8)
    q = quantize_groups(normal(4, 32), scheme, torch.float32)
    g_idx = torch.arange(32, dtype=torch.int32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))] // 8
    q = QuantizedTensor(q.codes, q.scale, q.zero_point, scheme, g_idx)
    tuned = ScaledCodes("a", q, scales=True, original=normal(4, 32))
    assert torch.equal(tuned.weight().detach(), dequantize(q, torch.float32))
    moved(tuned)
    assert torch.equal(tuned.weight().detach(), dequantize(tuned.quantized(), torch.float32))


def test_gradient_of_the_scales_is_the_derivative() -> None:
    """Codes are constant there: nothing is estimated."""
    q = quantize_groups(normal(3, 16), QuantScheme(4, 8, symmetric=False), torch.float32)
    tuned, probe = ScaledCodes("a", q, scales=True), normal(3, 16, seed=8)
    (tuned.weight() * probe).sum().backward()
    expected = (dequantize(q) * probe).reshape(3, 2, 8).sum(-1)
    torch.testing.assert_close(tuned.smooth[0].grad, expected)


def test_gradient_of_the_offsets_is_straight_through() -> None:
    """dŵ/dV is the scale, and zero for what is clamped."""
    tuned = ClippedRounding("a", torch.tensor([[0.4, -0.3, 1.0, 2.0]]), QuantScheme(3, None), torch.float32, clip=False)
    offset, scale = tuned.signed[0][0], float(tuned.quantized().scale)
    tuned.weight().sum().backward()
    assert offset.grad is not None
    assert offset.grad.flatten().tolist() == [scale] * 4
    with torch.no_grad():
        offset.fill_(0.3)  # 2 / scale + 0.3 = 3.8 rounds to 4, and the grid ends at 3
    tuned.weight().sum().backward()
    assert offset.grad.flatten().tolist() == [2 * scale, 2 * scale, 2 * scale, scale]  # on top of the first


@pytest.mark.parametrize("independent", [True, False])
@torch.no_grad()
def test_rounding_against_exhaustive_search(independent: bool, tmp_path: Path) -> None:
    """2 bits, 6 columns: all 64 ways to round each row's weights up or down. With independent columns rounding to
    nearest is the best, and stays; with dependent ones the way to the best is at least half gone."""
    weight, scheme = normal(24, 6), QuantScheme(2, None)
    block = nn.Sequential(nn.Linear(6, 24, bias=False))
    block[0].weight.data = weight
    states = [torch.eye(6)[None] * (1 + k) for k in range(8)] if independent else samples(6, 16)
    run = block_run(block, states, tmp_path)
    tuned = round_block(AutoRound(iterations=300, batch=8, clip=False), run, {"0": (weight, scheme)}).weights["0"]
    x = torch.cat(states, 1)[0]
    nearest = quantize_groups(weight, scheme, torch.float32)

    def losses(codes: Tensor) -> Tensor:
        return ((codes - 2.0) * nearest.scale - weight).matmul(x.T).square().sum(-1)

    down = torch.floor(weight / nearest.scale) + 2
    choices = [(down + torch.tensor(bits)).clamp(0, 3) for bits in itertools.product((0.0, 1.0), repeat=6)]
    best = torch.stack([losses(codes) for codes in choices]).amin(0)
    start, found = losses(nearest.codes.float()), losses(tuned.codes.float())
    assert torch.equal(tuned.scale, nearest.scale)
    assert bool((found >= best * (1 - 1e-5)).all())
    if independent:
        torch.testing.assert_close(found, best)
    else:
        assert float(start.sum()) > 2 * float(best.sum())
        assert float(found.sum() - best.sum()) < 0.55 * float(start.sum() - best.sum())


@torch.no_grad()
def test_scales_against_least_squares(tmp_path: Path) -> None:
    """One scale a row and fixed codes: the best scale has a closed form, and tuning comes close to it."""
    block = nn.Linear(8, 10, bias=False)
    block.weight.data = normal(10, 8)
    states = samples(8, 16)
    run = block_run(nn.Sequential(block), states, tmp_path)
    q = quantize_groups(block.weight.data, QuantScheme(3, None), torch.float32)
    options = BlockTuning(epochs=60, batch=4, learning_rate=0.01)
    tuned = tune_block(options, run, {"0": q}, {}, {}).weights["0"]
    assert torch.equal(tuned.codes, q.codes)
    x = torch.cat(states, 1)[0]
    y, z = x @ block.weight.data.T, x @ (q.codes.float() - 4).T
    closed = ((y * z).sum(0) / (z * z).sum(0))[:, None]

    def loss(scale: Tensor) -> float:
        return float((z * scale.T - y).square().sum())

    assert loss(closed) <= loss(tuned.scale)
    assert loss(tuned.scale) - loss(closed) < 0.05 * (loss(q.scale) - loss(closed))


@pytest.fixture
def tuned_block(tmp_path: Path) -> tuple[Block, BlockRun, dict[str, QuantizedTensor], dict[str, Tensor]]:
    block = Block()
    run = block_run(block, samples(16), tmp_path)
    originals = {name: block.get_parameter(f"{name}.weight").data.clone() for name in ("up", "down")}
    starts = {name: quantize_groups(w, QuantScheme(3, 8), torch.float32) for name, w in originals.items()}
    return block, run, starts, originals


Setup = tuple[Block, BlockRun, dict[str, QuantizedTensor], dict[str, Tensor]]


def test_every_parameter_moves_and_the_error_falls(tuned_block: Setup) -> None:
    block, run, starts, originals = tuned_block
    weights = [ScaledCodes(name, q, scales=True, original=originals[name]) for name, q in starts.items()]
    weights_too: list[TunedWeight] = [*weights]
    names = [n for n, p in block.named_parameters() if p.ndim == 1]
    vectors = [TunedVector(name, block.get_parameter(name)) for name in names]
    tuned = BlockTuner(run, weights_too, vectors).run(Schedule(40, 3, 0.01, 0.005, 0.1, 0))
    assert tuned.error_after < 0.8 * tuned.error_before
    assert tuned.kept_step > 0
    for weight in weights:
        for parameter, low, high in weight.signed:
            assert bool((parameter != 0).any(-1).all())
            parameter.requires_grad_(False)
            assert low <= float(parameter.min())
            assert float(parameter.max()) <= high
    smooth = [p for weight in weights for p in weight.smooth] + [p for vector in vectors for p in vector.smooth]
    assert all(bool((p != 0).all()) for p in smooth)
    assert set(tuned.vectors) == {"norm.weight", "norm.bias", "up.bias", "down.bias"}


def test_clip_factors_move(tuned_block: Setup) -> None:
    _, run, _, originals = tuned_block
    weight = ClippedRounding("up", originals["up"], QuantScheme(3, 8, symmetric=False), torch.float32, clip=True)
    BlockTuner(run, [weight], ()).run(Schedule(10, 3, 0.02, 0.0, 0.1, 0))
    assert len(weight.signed) == 3
    for parameter, low, high in weight.signed[1:]:
        parameter.requires_grad_(False)
        assert low <= float(parameter.min()) < float(parameter.max()) <= high


def test_kept_error_is_that_of_the_kept_state(tuned_block: Setup) -> None:
    """What is returned, measured again by itself on the held-out samples, has the error that is reported."""
    block, run, starts, originals = tuned_block
    options = BlockTuning(epochs=4, codes=True, batch=3, held_out=0.25)
    tuned = tune_block(options, run, starts, originals, {"norm.weight": block.norm.weight})
    for name, q in tuned.weights.items():
        block.get_submodule(name)._parameters["weight"] = nn.Parameter(dequantize(q), requires_grad=False)
    block.norm.weight.data.copy_(tuned.vectors["norm.weight"])
    errors = []
    for held_out in itertools.combinations(range(12), 3):  # which three is the seed's business
        squares = sum(float((block(run.inputs[i]) - run.targets[i]).square().sum()) for i in held_out)
        errors.append((squares / sum(float(run.targets[i].square().sum()) for i in held_out)) ** 0.5)
    assert min(abs(error - tuned.error_after) for error in errors) < 1e-6
    assert tuned.error_after < tuned.error_before


def test_a_worse_state_is_never_kept(tuned_block: Setup) -> None:
    """With a rate that only does harm the start comes back, bit for bit."""
    block, run, starts, originals = tuned_block
    vectors = {"norm.weight": block.norm.weight.data}
    tuned = tune_block(BlockTuning(learning_rate=1.0, batch=12), run, starts, originals, vectors)
    assert tuned.kept_step == 0
    assert tuned.error_after == tuned.error_before
    assert all(equal(tuned.weights[name], q) for name, q in starts.items())
    assert torch.equal(tuned.vectors["norm.weight"], vectors["norm.weight"])


def test_same_seed_same_bytes(tuned_block: Setup) -> None:
    _, run, _, originals = tuned_block
    layers = {name: (w, QuantScheme(3, 8)) for name, w in originals.items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = round_block(AutoRound(iterations=8, batch=2), run, layers)
    torch.manual_seed(2)
    again = round_block(AutoRound(iterations=8, batch=2), run, layers)
    other = round_block(AutoRound(iterations=8, batch=2, seed=1), run, layers)
    assert all(equal(first.weights[name], again.weights[name]) for name in layers)
    assert not all(equal(first.weights[name], other.weights[name]) for name in layers)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_sample_is_enough(tmp_path: Path) -> None:
    block = Block()
    run = block_run(block, samples(16, 1), tmp_path)
    tuned = round_block(AutoRound(iterations=16, batch=4), run, {"up": (block.up.weight.data, QuantScheme(3, 8))})
    assert tuned.error_after < tuned.error_before


def test_not_finite(tuned_block: Setup) -> None:
    _, run, starts, originals = tuned_block
    run.inputs[3][0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"block: .* is not finite"):
        tune_block(BlockTuning(epochs=1, batch=12), run, starts, originals, {})


def test_a_layer_that_no_token_reaches_stays(tuned_block: Setup) -> None:
    """Such as an expert that the batch was not sent to: no gradient, no change."""
    block, run, starts, originals = tuned_block
    block.idle = nn.Linear(8, 4)
    idle = quantize_groups(normal(4, 8), QuantScheme(4, 8), torch.float32)
    tuned = tune_block(BlockTuning(epochs=2), run, {**starts, "idle": idle}, originals, {"idle.bias": torch.ones(4)})
    assert equal(tuned.weights["idle"], idle)
    assert torch.equal(tuned.vectors["idle.bias"], torch.ones(4))


def test_split_and_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, share, expected in ((1, 0.5, 1), (2, 0.5, 1), (3, 0.01, 1), (128, 0.0625, 8), (4, 0.5, 2)):
        held_out, training = split(count, share, generator)
        assert len(held_out) == expected
        assert sorted({*held_out, *training}) == list(range(count))
        assert count == 1 or not {*held_out} & {*training}
    order = shuffled([3, 5, 8], 8, generator)
    assert sorted(order[:3]) == sorted(order[3:6]) == [3, 5, 8]
    assert len(order) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch": 0},
        {"batch": True},
        {"learning_rate": 0.0},
        {"learning_rate": 1.5},
        {"learning_rate": "fast"},
        {"learning_rate": float("nan")},
        {"codes_learning_rate": -1.0},
        {"held_out": 0.0},
        {"held_out": 0.75},
        {"seed": -1},
        {"scales": 1},
        {"scales": False, "norms": False, "biases": False},
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="tuning: "):
        BlockTuning(**options)
