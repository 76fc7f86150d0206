"""plan_mixed(): a recipe that spends a given number of bits where the model needs them most.

Each unit's loss with each scheme is measured (:mod:`quantkit.sensitivity`), the best choice for the budget is computed
exactly (:mod:`quantkit.allocate`), and the choice is written as a complete recipe with the figures beside each rule.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from quantkit.allocate import Allocation, Option, allocate, smallest
from quantkit.checkpoint import Checkpoint, write_bytes
from quantkit.errors import OutputError, RecipeError, SchemeError, message
from quantkit.heap import map_large_blocks
from quantkit.measuring_room import METRICS, Metric, check_room
from quantkit.planning import make_plan
from quantkit.precision import products_note
from quantkit.recipe import Recipe, Rule, make_recipe, merged
from quantkit.report import Note, Observer, ignore
from quantkit.run import calibrate, check_length, recipe_values, with_length
from quantkit.scheme import QuantScheme, parse_scheme
from quantkit.sensitivity import Sensitivity
from quantkit.solvers import AutoRound
from quantkit.source import resolve_device, resolve_model
from quantkit.units import Unit, find_units

DEFAULT_SCHEMES = ("w3a16_g64_asym", "w4a16_g64_asym", "w8a16_g64_sym")
DEFAULT_SAMPLES = 32
DEFAULT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """A planned recipe and what it was chosen from.

    Attributes:
        recipe: the choice: a rule for each unit.
        units: what must share one scheme, in the model's order.
        schemes: what each unit could have.
        options: bytes and loss (nats of KL divergence a token) of each unit [units] with each scheme [schemes].
        allocation: the choice, its loss and the bound below it.
        metric: how the losses were measured.
        measured_on: the calibration tokens, in words.
        budget_bits: what was asked for.
    """

    recipe: Recipe
    units: tuple[Unit, ...]
    schemes: tuple[QuantScheme, ...]
    options: tuple[tuple[Option, ...], ...]
    allocation: Allocation
    metric: Metric
    measured_on: str
    budget_bits: float

    @property
    def numel(self) -> int:
        """Weights in all units."""
        return sum(unit.numel for unit in self.units)

    @property
    def bits(self) -> float:
        """Stored bits per quantized weight, scales and zero points counted."""
        return 8 * self.allocation.nbytes / self.numel

    @property
    def gap(self) -> float:
        """How far the choice's loss is above the Lagrangian bound, as a share of the loss; 0 without a loss."""
        loss = self.allocation.loss
        return (loss - self.allocation.bound) / loss if loss > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, as plain values."""
        return {
            "budget_bits": self.budget_bits,
            "bits": self.bits,
            "nbytes": self.allocation.nbytes,
            "loss": self.allocation.loss,
            "bound": self.allocation.bound,
            "metric": self.metric,
            "measured_on": self.measured_on,
            "units": [
                {
                    "name": unit.name,
                    "numel": unit.numel,
                    "scheme": str(self.schemes[chosen]),
                    "options": {
                        str(scheme): {"nbytes": option.nbytes, "loss": option.loss}
                        for scheme, option in zip(self.schemes, options, strict=True)
                    },
                }
                for unit, options, chosen in zip(self.units, self.options, self.allocation.chosen, strict=True)
            ],
        }

    def to_yaml(self, heading: str = "") -> str:
        """The recipe as YAML, with each unit's figures as a comment at its rule; loading it gives the recipe."""
        values = {**self.recipe.to_dict(), "scheme": str(self.recipe.scheme)}
        del values["rules"]
        lines = [f"# {line}" for line in (*heading.splitlines(), *self._summary())]
        lines += [yaml.safe_dump(values, sort_keys=False).rstrip(), "rules:"]
        kept = len(self.recipe.rules) - len(self.units)
        for number, rule in enumerate(self.recipe.rules):
            if number >= kept:
                lines.append(f"# {self._figures(number - kept)}")
            lines.append(yaml.safe_dump([_stated(rule)], sort_keys=False, width=1000).rstrip())
        return "\n".join(lines) + "\n"

    def _summary(self) -> list[str]:
        how = "second-order estimate" if self.metric == "hessian" else "measured one unit at a time"
        return [
            f"{self.bits:.4f} bits per quantized weight, scales and zero points counted; asked for: "
            f"{self.budget_bits:g}.",
            f"Loss: nats of KL divergence from the dense model, a token ({how}), on {self.measured_on}.",
            f"Sum of the losses: {self.allocation.loss:.4g}, the smallest for this size (bound: "
            f"{self.allocation.bound:.4g}). Below, each unit's loss and size with each scheme.",
        ]

    def _figures(self, index: int) -> str:
        options = zip(self.schemes, self.options[index], strict=True)
        figures = ", ".join(f"{scheme} {option.loss:.3g} ({option.nbytes / 1e6:.3f} MB)" for scheme, option in options)
        return f"{self.units[index].name}: {figures}"


def plan_mixed(
    model: str | Path,
    *,
    bits: float,
    schemes: Sequence[str | QuantScheme] = DEFAULT_SCHEMES,
    metric: str = "hessian",
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    num_samples: int = DEFAULT_SAMPLES,
    sequence_length: int | None = None,
    device: str = "auto",
    directory: Path | None = None,
    observer: Observer = ignore,
) -> MixedPlan:
    """Choose a scheme for each unit of a model so that the quantized weights have at most ``bits`` bits.

    Args:
        model: ``builtin``, a local directory, or a hub id.
        bits: stored bits per quantized weight, scales and zero points counted, as the report of a run counts them.
        schemes: what a unit may have, names such as ``w4a16_g64_asym``; two or more.
        metric: ``hessian`` or ``kl``; see :mod:`quantkit.sensitivity`.
        recipe: everything else: method, calibration source, layers to skip, layers whose scheme a
            rule states; these are not counted in ``bits``. The recipe's own scheme is not read.
        num_samples: calibration samples to measure with; the recipe's own number is for the run that follows.
        sequence_length: tokens of each; None means 512, or the model's limit if that is shorter.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        directory: for hidden states that do not fit the recipe's activation_memory; None is the system's.
        observer: told of every step.

    Raises:
        InputError: anything that cannot be used as it is, or a budget below the smallest choice.
        HessianError: a layer's Hessian is not positive definite.
    """
    wanted = _schemes(schemes)
    kind = _metric(metric)
    values = recipe_values(recipe)
    placed = resolve_device(device)
    checkpoint = Checkpoint(resolve_model(model))
    length = _length(sequence_length, checkpoint)
    measuring = merged(values, {"calibration": {"num_samples": num_samples, "sequence_length": length}})
    plan = make_plan(checkpoint, make_recipe({**measuring, "scheme": str(wanted[0])}))
    for scheme in wanted[1:]:
        make_plan(checkpoint, make_recipe({**measuring, "scheme": str(scheme)}))
    if plan.recipe.transforms:
        raise RecipeError(
            message(
                "transforms",
                "the effect of each layer is measured in the model as it is, which they change",
                "plan without them; they can be added to the planned recipe",
            )
        )
    units = find_units(plan)
    sizes = [[unit.nbytes(plan, scheme) for scheme in wanted] for unit in units]
    budget = _budget(bits, units, sizes, wanted)
    check_length(plan, length)
    map_large_blocks()
    with tempfile.TemporaryDirectory(prefix=".quantkit-plan-", dir=directory) as scratch:
        check_room(plan, units, len(wanted), kind, (num_samples, length), Path(scratch))
        data = calibrate(plan, observer)
        products = products_note(plan.dtype, placed)
        if products is not None:
            observer(Note(products))
        if any(isinstance(layer.solver, AutoRound) for unit in units for layer in unit.layers):
            observer(Note("autoround tunes whole blocks: the rounding to nearest that it starts from is measured"))
        if kind == "kl" and plan.dtype != torch.float32:
            observer(
                Note(
                    f"in {str(plan.dtype).removeprefix('torch.')} the rounding of the forward passes is in each "
                    "divergence: small ones are not told apart; --metric hessian tells them"
                )
            )
        run = Sensitivity(plan, units, wanted, data.samples, placed, Path(scratch), observer)
        losses = run.measure(kind, seed=plan.recipe.calibration.seed)
    options = tuple(
        tuple(Option(nbytes, loss) for nbytes, loss in zip(*row, strict=True))
        for row in zip(sizes, losses, strict=True)
    )
    found = allocate(options, budget)
    chosen = [wanted[index] for index in found.chosen]
    on = f"{len(data.samples)} x {length} tokens of {data.source}, seed {plan.recipe.calibration.seed}"
    final = make_recipe(with_length(_recipe_values(values, units, chosen), checkpoint))
    return MixedPlan(final, units, wanted, options, found, kind, on, bits)


def _stated(rule: Rule) -> dict[str, Any]:
    """What a rule says, as plain values, the scheme by its name."""
    values = {key: value for key, value in rule.model_dump(mode="json").items() if value not in (None, False)}
    return values if rule.scheme is None else {**values, "scheme": str(rule.scheme)}


def check_recipe_output(path: Path, *, overwrite: bool) -> None:
    """The recipe's file can be written, and nothing is lost that the user did not give up.

    Raises:
        OutputError: it can not, or would be.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a directory" if path.is_dir() else "is there already"
        raise OutputError(message(str(path), what, "choose another --output, or --overwrite to replace a file"))
    if not path.expanduser().absolute().parent.is_dir():
        raise OutputError(message(str(path), "its directory is not there", "make it, or choose another --output"))


def write_recipe(found: MixedPlan, path: Path, model: str) -> None:
    """Write a planned recipe, atomically, with its figures."""
    heading = (
        f"Mixed precision for {model}, planned by quantkit; to quantize:\n"
        f"quantkit quantize {model} --recipe {path.name} --output DIR"
    )
    write_bytes(path, found.to_yaml(heading).encode())


def _recipe_values(values: Mapping[str, Any], units: Sequence[Unit], chosen: Sequence[QuantScheme]) -> dict[str, Any]:
    """The base recipe with a rule for each unit behind its own, and the commonest scheme for all."""
    kept = make_recipe({key: value for key, value in values.items() if key == "rules"}).to_dict()["rules"]
    weights: dict[QuantScheme, int] = {}
    for unit, scheme in zip(units, chosen, strict=True):
        weights[scheme] = weights.get(scheme, 0) + unit.numel
    rules = [{"match": unit.match, "scheme": str(scheme)} for unit, scheme in zip(units, chosen, strict=True)]
    return {**values, "scheme": str(max(weights, key=lambda scheme: weights[scheme])), "rules": [*kept, *rules]}


def _schemes(names: Sequence[str | QuantScheme]) -> tuple[QuantScheme, ...]:
    given = [parse_scheme(name) if isinstance(name, str) else name for name in names]
    wanted = tuple(dict.fromkeys(given))
    for scheme in wanted:
        if scheme.act_bits is not None:
            raise SchemeError(
                message(
                    "--schemes", f"{scheme}: the effect of quantized activations is not measured", "allow a16 schemes"
                )
            )
    if len(wanted) < 2:
        what = "no schemes" if not wanted else f"{wanted[0]} alone"
        raise SchemeError(
            message(
                "--schemes",
                f"{what} leaves nothing to choose",
                f"give two or more, such as {','.join(DEFAULT_SCHEMES)}",
            )
        )
    return wanted


def _metric(name: str) -> Metric:
    for metric in METRICS:
        if metric == name:
            return metric
    raise RecipeError(message("--metric", f"{name!r} is not a measure", f"use {' or '.join(METRICS)}"))


def _length(asked: int | None, checkpoint: Checkpoint) -> int:
    if asked is not None:
        return asked
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    return min(DEFAULT_LENGTH, limit) if isinstance(limit, int) and limit > 1 else DEFAULT_LENGTH


def _budget(bits: float, units: Sequence[Unit], sizes: Sequence[Sequence[int]], schemes: Sequence[QuantScheme]) -> int:
    numel = sum(unit.numel for unit in units)
    least = smallest([[Option(nbytes, 0.0) for nbytes in row] for row in sizes])
    if not bits > 0 or bits == float("inf"):
        raise RecipeError(message("--bits", f"{bits} is not a number of bits", "choose something like 4.5"))
    if int(bits * numel / 8) < least:
        raise RecipeError(
            message(
                "--bits",
                f"{bits:g} bits per weight are fewer than the smallest choice of {', '.join(map(str, schemes))} needs",
                f"ask for at least {_rounded_up(8 * least / numel)}, or allow a smaller scheme",
            )
        )
    return int(bits * numel / 8)


def _rounded_up(bits: float) -> str:
    """A number of bits with 4 decimals that is not below ``bits``."""
    return f"{-(-bits * 1e4 // 1) / 1e4:.4f}"
