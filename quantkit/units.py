"""The units of a measurement: layers that must share one scheme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.arch import input_group
from quantkit.errors import RecipeError, message
from quantkit.layer_plan import LayerPlan, encoded_bytes
from quantkit.plan import Plan
from quantkit.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers of one block that share one scheme.

    Attributes:
        name: the layer's name, or the common part and the rest of each.
        layers: in the model's order.
    """

    name: str
    layers: tuple[LayerPlan, ...]

    @property
    def match(self) -> str:
        """What a recipe's rule says to mean this unit."""
        names = [layer.info.name for layer in self.layers]
        if len(names) == 1 or self.is_experts:
            return self.name
        stem = names[0].rpartition(".")[0]
        leaves = "|".join(re.escape(name.rpartition(".")[2]) for name in names)
        return f"re:{re.escape(stem)}\\.({leaves})"

    @property
    def is_experts(self) -> bool:
        """Whether it is a block's experts."""
        return self.layers[0].info.expert is not None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(layer.numel for layer in self.layers)

    def nbytes(self, plan: Plan, scheme: QuantScheme) -> int:
        """Bytes on disk with this scheme: codes, scales, zero points and shapes, by the code that writes them."""
        sized = (LayerPlan(layer.info, scheme, layer.solver) for layer in self.layers)
        return sum(encoded_bytes(plan.format, layer, plan.dtype) for layer in sized)


def find_units(plan: Plan) -> tuple[Unit, ...]:
    """The units of the layers inside of the blocks, in the model's order, but for those whose scheme a rule states.

    All experts of a block are one unit, for engines run them as one.

    Raises:
        RecipeError: no layer at all.
    """
    members: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        rule = next((rule for rule in plan.recipe.rules if rule.matches(layer.info.name)), None)
        if layer.info.block is None or (rule is not None and rule.scheme is not None):
            continue
        slot = layer.info.expert
        members.setdefault(input_group(layer.info.name) if slot is None else slot.module, []).append(layer)
    if not members:
        raise RecipeError(message("rules", "no layer is left to choose a scheme for", "remove a rule with a scheme"))
    return tuple(Unit(_unit_name(layers), tuple(layers)) for layers in members.values())


def _unit_name(layers: Sequence[LayerPlan]) -> str:
    slot = layers[0].info.expert
    if slot is not None:
        return f"{slot.module}.*"
    names = [layer.info.name for layer in layers]
    stem = names[0].rpartition(".")[0]
    return f"{stem}." + "+".join(name.rpartition(".")[2] for name in names)
