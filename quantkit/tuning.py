"""Tuning by gradients of what a solver leaves open, against a whole decoder block's output.

A solver looks at one matrix. Here a block is run with quantized weights, its output is compared with the
full-precision one's, and the gradient of the error moves what costs nothing at run time. Rounding and clamping are
passed straight through (the gradient of round(x) is taken for 1). What may move is a :class:`TunedWeight` for each
layer, one of

- :class:`ClippedRounding`: codes from the original weight with a learned offset V in [-0.5, 0.5] for each weight and
  learned clip factors α, β for each group (SignRound, arXiv:2309.05516, equations 3 to 5);
- :class:`ScaledCodes`: a solver's codes, with a learned factor on each scale (the scale step of EfficientQAT's
  Block-AP, arXiv:2407.11062, section 3.2), and where asked with offsets V that go on from the solver's rounding;

and :class:`TunedVector` for gains and biases (norm tweaking, arXiv:2309.02784). Offsets and clip factors follow the
sign of their gradient, scales and vectors follow Adam; both at a rate that falls linearly to zero.

Some samples are held out. The block's error on them is measured at the start and several times on the way, always
with the weights as they will be read from the file, and the state with the smallest one is kept: the start, when
nothing was better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.activations import Activations
from quantkit.errors import CheckpointError, RecipeError, message
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.solvers import AutoRound
from quantkit.solvers.options import check_flag, check_fraction, check_integer
from quantkit.tuned_weights import ClippedRounding, ScaledCodes, TunedVector, TunedWeight

Call = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(hidden [1, length, hidden], parameters of the block by name that stand in for its own) -> the block's output."""

_CHECKS = 8  # measurements of the held-out error after the start
_BETAS = (0.9, 0.99)  # Adam's decay rates; runs have tens to hundreds of steps, too few for 0.999
_EPSILON = 1e-12  # Adam's, far below every gradient: the loss is relative
_WORK_COPIES = 10  # of the largest layer, in float32: the graph of its rounding


@dataclass(frozen=True)
class BlockTuning:
    """Recipe key ``tuning``: what is learned after the solvers, block by block.

    Attributes:
        epochs: passes over the calibration samples that are not held out.
        batch: samples an update.
        learning_rate: of scales and vectors, relative to their size; Adam, falling linearly to 0.
        scales: tune the scales of all quantized layers of the block.
        norms: tune gains and biases of the block's norms.
        biases: tune the biases of its linear layers, where it has some.
        codes: let the codes move on from the solver's rounding by the sign of their gradient.
        codes_learning_rate: of the codes, in steps of the grid, falling linearly to 0.
        held_out: share of the calibration samples that decides which state is kept.
        seed: of the held-out samples and of the order of the others.
    """

    name: Literal["block"] = "block"
    epochs: int = 2
    batch: int = 4
    learning_rate: float = 6e-3
    scales: bool = True
    norms: bool = True
    biases: bool = True
    codes: bool = False
    codes_learning_rate: float = 5e-3
    held_out: float = 0.0625
    seed: int = 0
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        check_integer("tuning", "epochs", self.epochs, 1, "2")
        check_integer("tuning", "batch", self.batch, 1, "4")
        check_integer("tuning", "seed", self.seed, 0, "0")
        check_fraction("tuning", "learning_rate", self.learning_rate, 1.0, "0.006")
        check_fraction("tuning", "codes_learning_rate", self.codes_learning_rate, 1.0, "0.005")
        check_fraction("tuning", "held_out", self.held_out, 0.5, "0.0625")
        for name in ("scales", "norms", "biases", "codes"):
            check_flag("tuning", name, getattr(self, name))
        if not (self.scales or self.norms or self.biases or self.codes):
            raise RecipeError(message("tuning", "nothing may move", "set scales, norms, biases or codes to true"))


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, on what and how fast.

    Attributes:
        steps: updates.
        batch: samples an update.
        sign_rate: of the sign steps, at the first one.
        adam_rate: of Adam, at the first step.
        held_out: share of the samples that is held out.
        seed: decides which, and the order of the others.
    """

    steps: int
    batch: int
    sign_rate: float
    adam_rate: float
    held_out: float
    seed: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """The kept state.

    Attributes:
        weights: layer -> quantized weight.
        vectors: parameter -> values.
        error_before: √(Σ‖y - ŷ‖² / Σ‖y‖²) of the block's output on the held-out samples at the start.
        error_after: of the kept state; never larger.
        steps: updates that were made.
        kept_step: the update after which it was measured; 0: the start.
        unreached: layers that had no gradient: experts that nothing was sent to, layers whose input is zero.
    """

    weights: dict[str, QuantizedTensor]
    vectors: dict[str, Tensor]
    error_before: float
    error_after: float
    steps: int
    kept_step: int
    unreached: frozenset[str]


@dataclass(frozen=True, slots=True)
class BlockRun:
    """A block that is to be tuned.

    Attributes:
        where: its name, for errors.
        call: runs it.
        transposed: names of the layers whose weight lies as [in, out].
        dtype: of the forward pass, and of the scales on disk.
        inputs: hidden states in front of the block.
        targets: what its output should be.
        device: where it runs.
        index: its place in the model; the seeds of two blocks differ by it.
    """

    where: str
    call: Call
    transposed: frozenset[str]
    dtype: torch.dtype
    inputs: Activations
    targets: Activations
    device: torch.device
    index: int


def round_block(options: AutoRound, run: BlockRun, layers: Mapping[str, tuple[Tensor, QuantScheme]]) -> Tuned:
    """Learn the rounding of these layers.

    Args:
        options: how.
        run: the block; all its other layers are as they will be.
        layers: name within the block -> original weight [out, in], any floating-point dtype, and the grid.
    """
    weights = [
        ClippedRounding(name, weight.to(run.device, torch.float32), scheme, run.dtype, clip=options.clip)
        for name, (weight, scheme) in layers.items()
    ]
    seed = _seed(options.seed, run.index, len(run.inputs))
    schedule = Schedule(options.iterations, options.batch, options.rate, 0.0, options.held_out, seed)
    return BlockTuner(run, weights, ()).run(schedule)


def tune_block(
    options: BlockTuning,
    run: BlockRun,
    starts: Mapping[str, QuantizedTensor],
    originals: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
) -> Tuned:
    """Tune what the solvers left open.

    Args:
        options: what may move, and how.
        run: the block.
        starts: layer -> its solved weight.
        originals: layer -> the weight [out, in] before it was solved; read only where the codes move.
        vectors: gains and biases that may move, with the dtype that ships.
    """
    weights = [
        ScaledCodes(
            name,
            start,
            scales=options.scales,
            original=originals[name].to(run.device, torch.float32) if options.codes else None,
        )
        for name, start in starts.items()
        if options.scales or options.codes
    ]
    moving = [TunedVector(name, vector.to(run.device)) for name, vector in vectors.items()]
    schedule = Schedule(
        num_steps(options, len(run.inputs)),
        options.batch,
        options.codes_learning_rate,
        options.learning_rate,
        options.held_out,
        _seed(options.seed, run.index, len(run.inputs)),
    )
    return BlockTuner(run, weights, moving).run(schedule)


def num_steps(options: AutoRound | BlockTuning, count: int) -> int:
    """Updates of a block with ``count`` calibration samples."""
    if isinstance(options, AutoRound):
        return options.iterations
    training = max(count - held_out_count(count, options.held_out), 1)
    return math.ceil(options.epochs * training / options.batch)


def tuning_bytes(rounded: Sequence[int], scaled: Sequence[int], *, codes: bool, dtype: torch.dtype) -> int:
    """Bytes that tuning a block holds, besides the block itself and one sample's activations.

    Of each layer the weight before it was solved, its codes as solved, as kept and as they are compared, the real
    weight and its gradient; of one whose codes move the original and the offsets in float32; and the work space of
    one layer's rounding.

    Args:
        rounded: number of weights of each layer whose method is autoround.
        scaled: of each layer that is tuned after its solver; may hold the same layers.
        codes: whether their codes move.
        dtype: of the forward pass.
    """
    layers = max(rounded, scaled, key=sum)
    moving = max(sum(rounded), sum(scaled) if codes else 0)
    return (3 + 3 * dtype.itemsize) * sum(layers) + 8 * moving + _WORK_COPIES * 4 * max(layers, default=0)


def _seed(seed: int, index: int, count: int) -> int:
    return (seed * 1_000_003 + index * 1009 + count) % 2**63


class BlockTuner:
    """The loop over batches.

    Args:
        run: the block.
        weights: the layers that move; their parameters are changed.
        vectors: the gains and biases that move.
    """

    def __init__(self, run: BlockRun, weights: Sequence[TunedWeight], vectors: Sequence[TunedVector]) -> None:
        self.block, self.weights, self.vectors = run, weights, vectors
        self.where, self.dtype, self.device = run.where, run.dtype, run.device
        self._unreached = {weight.name for weight in weights}

    def run(self, schedule: Schedule) -> Tuned:
        """Tune, and return the best state that was measured."""
        generator = torch.Generator().manual_seed(schedule.seed)
        held_out, training = split(len(self.block.inputs), schedule.held_out, generator)
        order = shuffled(training, schedule.steps * schedule.batch, generator)
        smooth = [p for weight in self.weights for p in weight.smooth]
        smooth += [p for vector in self.vectors for p in vector.smooth]
        adam = torch.optim.Adam(smooth, schedule.adam_rate, _BETAS, _EPSILON) if smooth else None
        checks = {math.ceil(schedule.steps * (k + 1) / _CHECKS) for k in range(_CHECKS)}
        before = self.error(held_out)
        best, kept, state = before, 0, self._state()
        for step in range(schedule.steps):
            left = 1 - step / schedule.steps
            self._gradients(order[step * schedule.batch : (step + 1) * schedule.batch], left * schedule.sign_rate)
            if adam is not None:
                adam.param_groups[0]["lr"] = left * schedule.adam_rate
                adam.step()
                adam.zero_grad()
            if step + 1 in checks:
                error = self.error(held_out)
                if error < best:
                    best, kept, state = error, step + 1, self._state()
        return Tuned(*state, before, best, schedule.steps, kept, frozenset(self._unreached))

    @torch.no_grad()
    def error(self, samples: Sequence[int]) -> float:
        """√(Σ‖y - ŷ‖² / Σ‖y‖²) over these samples."""
        parameters = self._parameters()
        squares = signal = 0.0
        for sample in samples:
            target = self.block.targets[sample].to(self.device).float()
            output = self.block.call(self.block.inputs[sample].to(self.device), parameters).float()
            squares += float((output - target).square().sum(dtype=torch.float64))
            signal += float(target.square().sum(dtype=torch.float64))
        self._check(squares, "its output")
        return math.sqrt(squares / signal) if signal > 0 else 0.0

    def _gradients(self, samples: Sequence[int], sign_rate: float) -> None:
        """Gradients of one batch: the sign steps are taken at once, those of smooth parameters are left in ``grad``.

        Only the real weights stand in the graph of the block. Their gradients go on to codes and scales one layer
        after the other, so that the work space of the rounding is one layer's.
        """
        leaves = {name: value.detach().requires_grad_() for name, value in self._parameters().items()}
        for sample in samples:
            target = self.block.targets[sample].to(self.device).float()
            with torch.enable_grad():
                output = self.block.call(self.block.inputs[sample].to(self.device), leaves).float()
                # Relative, not a mean over elements: its gradients stay within what 16-bit types can hold.
                loss = (output - target).square().sum() / target.square().mean()
            loss.backward()
        for weight in self.weights:
            gradient = leaves.pop(f"{weight.name}.weight").grad
            if gradient is None:  # an expert that no token of this batch was sent to
                continue
            size = float(gradient.float().abs().sum())
            self._check(size, f"the gradient of {weight.name}")
            if size > 0:
                self._unreached.discard(weight.name)
            with torch.enable_grad():
                value = self._as_parameter(weight)
            torch.autograd.backward(value, gradient)
            for parameter, low, high in weight.signed:
                assert parameter.grad is not None
                with torch.no_grad():
                    parameter.sub_(parameter.grad.sign_(), alpha=sign_rate).clamp_(low, high)
                parameter.grad = None
        for vector in self.vectors:
            gradient = leaves[vector.name].grad
            if gradient is not None:
                with torch.enable_grad():
                    value = vector.value().to(self.dtype)
                torch.autograd.backward(value, gradient)

    @torch.no_grad()
    def _parameters(self) -> dict[str, Tensor]:
        found = {f"{weight.name}.weight": self._as_parameter(weight) for weight in self.weights}
        return {**found, **{vector.name: vector.value().to(self.dtype) for vector in self.vectors}}

    def _as_parameter(self, weight: TunedWeight) -> Tensor:
        value = weight.weight().to(self.dtype)
        return value.T if weight.name in self.block.transposed else value

    def _state(self) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        with torch.no_grad():
            vectors = {vector.name: vector.value().clone() for vector in self.vectors}
        return {weight.name: weight.quantized() for weight in self.weights}, vectors

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise CheckpointError(
                message(self.where, f"{what} is not finite", "use --dtype float32, or tune without this block")
            )


def split(count: int, share: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Held-out and training samples: ``share`` of them, at least one, is held out; a single sample is both."""
    if count == 1:
        return [0], [0]
    order = torch.randperm(count, generator=generator).tolist()
    held = held_out_count(count, share)
    return sorted(order[:held]), sorted(order[held:])


def held_out_count(count: int, share: float) -> int:
    """How many of ``count`` samples are held out."""
    return min(max(round(count * share), 1), max(count - 1, 1))


def shuffled(samples: Sequence[int], length: int, generator: torch.Generator) -> list[int]:
    """``length`` samples: all of them in random order, and again in another, until there are enough."""
    order: list[int] = []
    while len(order) < length:
        order += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
    return order[:length]
