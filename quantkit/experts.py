"""Mixture-of-experts: transformers holds a block's experts as stacked matrices; quantkit sees each as three layers.

A module of experts has ``gate_up_proj`` [experts, 2·intermediate, hidden], the gate's rows first, and ``down_proj``
[experts, hidden, intermediate]. It is called with the tokens, and for each token with the experts that the router chose
and their weights, and returns

    y_t = Σ_e r_te · down_e(gating(gate_e(x_t), up_e(x_t)))      over the chosen experts e.

Checkpoints hold ``gate_proj``, ``up_proj`` and ``down_proj`` of each expert as tensors of their own, and loaders ask
for quantized ones by these names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.errors import CheckpointError, message

GATE_UP, DOWN = "gate_up_proj", "down_proj"
LEAVES = ("gate_proj", "up_proj", "down_proj")
_NEW = ("has_post_expert_norm",)  # transformers before 5.23 does not say it, and no experts there have one
_CALL = ("hidden_states", "top_k_index", "top_k_weights")
_Gating = Callable[[Tensor], Tensor]
_SOURCE = re.compile(r".*\*\.(\w+)\.weight")  # transformers' pattern for one matrix of every expert
_ON_DISK = re.compile(r"\.(\d+)\.(\w+)\.weight$")


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """Where one layer of one expert lies in a module of stacked experts.

    Attributes:
        module: name of the experts module, such as ``model.layers.0.mlp.experts``.
        index: which expert.
        leaf: ``gate_proj``, ``up_proj`` or ``down_proj``.
        start: its first row in ``parameter[index]``.
        out_features: its rows.
        in_features: its columns.
    """

    module: str
    index: int
    leaf: str
    start: int
    out_features: int
    in_features: int

    @property
    def name(self) -> str:
        """The layer's name: ``model.layers.0.mlp.experts.3.gate_proj``."""
        return f"{self.module}.{self.index}.{self.leaf}"

    @property
    def parameter(self) -> str:
        """The stacked parameter that it is a part of."""
        return DOWN if self.leaf == DOWN else GATE_UP

    @property
    def rows(self) -> slice:
        """Its rows in ``parameter[index]``."""
        return slice(self.start, self.start + self.out_features)


@dataclass(frozen=True, slots=True)
class ExpertsInfo:
    """A module of stacked experts that quantkit quantizes.

    Attributes:
        name: module name.
        num_experts: number of experts.
        hidden_size: columns of gate and up, rows of down.
        intermediate_size: rows of gate and up, columns of down.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int

    def slots(self) -> Iterator[ExpertSlot]:
        """Every expert's layers, expert by expert."""
        hidden, inner = self.hidden_size, self.intermediate_size
        for index in range(self.num_experts):
            yield ExpertSlot(self.name, index, "gate_proj", 0, inner, hidden)
            yield ExpertSlot(self.name, index, "up_proj", inner, inner, hidden)
            yield ExpertSlot(self.name, index, "down_proj", 0, hidden, inner)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of several experts, of whatever layout."""
    stacked = any(p is not None and p.ndim >= 2 for p in module._parameters.values())
    return stacked and type(module).__name__.endswith("Experts")


def why_not_experts(module: nn.Module) -> str | None:
    """Why the layers of a module of experts cannot be quantized one by one; None when they can.

    The layout is what transformers' ``use_experts_implementation`` says of the class.
    """
    layout: dict[str, Any] = {
        "is_concatenated": (True, "gate and up are interleaved"),
        "is_transposed": (False, "its matrices are transposed"),
        "has_gate": (True, "it has no gate"),
        "has_bias": (False, "it has biases"),
        "has_post_expert_norm": (False, "it normalizes each expert's output"),
    }
    for attribute, (wanted, reason) in layout.items():
        absent = wanted if attribute in _NEW else None
        if getattr(module, attribute, absent) is not wanted:
            return str(reason) if hasattr(module, attribute) else "it is not called as other experts are"
    if set(module._parameters) != {GATE_UP, DOWN}:
        return f"it holds {', '.join(module._parameters)}"
    if tuple(inspect.signature(type(module).forward).parameters)[1:] != _CALL:
        return "it is not called as other experts are"
    gate_up, down = module._parameters[GATE_UP], module._parameters[DOWN]
    if gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3:
        return "its weights are not stacked matrices"
    experts, rows, hidden = gate_up.shape
    if tuple(down.shape) != (experts, hidden, rows // 2) or rows % 2:
        return f"its weights are {list(gate_up.shape)} and {list(down.shape)}"
    return None


def experts_info(name: str, module: nn.Module) -> ExpertsInfo:
    """The sizes of a module that :func:`why_not_experts` has nothing against."""
    gate_up = module._parameters[GATE_UP]
    assert gate_up is not None, "checked by why_not_experts"
    experts, rows, hidden = gate_up.shape
    return ExpertsInfo(name, int(experts), int(hidden), int(rows) // 2)


def disk_leaves(info: ExpertsInfo, converters: Iterable[Any]) -> dict[str, str] | None:
    """What stands for ``gate_proj``, ``up_proj`` and ``down_proj`` in the names of one expert's tensors on disk.

    Args:
        info: the experts.
        converters: transformers' WeightConverters of the model, which say how it stacks tensors on loading.

    Returns:
        Such as ``{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}``; None when transformers stacks nothing, or
        in another way than expert upon expert, gate upon up.
    """
    steps = {GATE_UP: [("MergeModulelist", 0), ("Concatenate", 1)], DOWN: [("MergeModulelist", 0)]}
    found: dict[str, str] = {}
    for parameter, leaves in ((GATE_UP, LEAVES[:2]), (DOWN, LEAVES[2:])):
        target = f".{info.name}.{parameter}"
        rule = next((c for c in converters if any(target.endswith(_dotted(t)) for t in c.target_patterns)), None)
        if rule is None or [(type(op).__name__, op.dim) for op in rule.operations] != steps[parameter]:
            return None
        sources = [_SOURCE.fullmatch(pattern) for pattern in rule.source_patterns]
        if len(sources) != len(leaves) or None in sources:
            return None
        found.update({leaf: source[1] for leaf, source in zip(leaves, sources, strict=True) if source is not None})
    return found


def slot_on_disk(info: ExpertsInfo, leaves: Mapping[str, str], tensor: str) -> tuple[int, str] | None:
    """Which expert, and which of its layers, a tensor ``….3.w1.weight`` on disk is; None when it is none of them."""
    of = {on_disk: leaf for leaf, on_disk in leaves.items()}
    found = _ON_DISK.search(tensor)
    if found is None or found[2] not in of:
        return None
    index = int(found[1])
    if index >= info.num_experts:
        raise CheckpointError(
            message(tensor, f"is of expert {index}", f"{info.name} has {info.num_experts}; check config.json")
        )
    return index, of[found[2]]


def _dotted(pattern: str) -> str:
    return pattern if pattern.startswith(".") else f".{pattern}"


def find_routers(model: nn.Module, experts: ExpertsInfo) -> list[str]:
    """What decides where tokens go: the modules beside the experts with one output, or one for each expert.

    The first kind scales shared experts (``shared_expert_gate``), the second is the router, which in most families is
    not a linear layer but a module of its own.
    """
    owner, _, _ = experts.name.rpartition(".")
    routers = []
    for name, module in model.get_submodule(owner).named_children():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and weight.shape[0] in (1, experts.num_experts):
            routers.append(f"{owner}.{name}" if owner else name)
    return routers


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The tokens [tokens, hidden] and the chosen experts int [tokens, k] of a call of a module of experts."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return bound["hidden_states"], bound["top_k_index"]


def gating_of(module: nn.Module) -> _Gating:
    """The module's own activation: [..., 2·intermediate], gate and up side by side, to [..., intermediate]."""
    return cast(_Gating, module._apply_gate)


class SplitExperts(nn.Module):
    """Stands in the place of stacked experts: the same call, each expert's three layers as modules of their own.

    Expert ``e``'s are ``e.gate_proj``, ``e.up_proj`` and ``e.down_proj``: linear layers without bias on the meta device
    until they are replaced or given weights.

    Args:
        stacked: the module to replace; its parameters are taken from it.
        info: its sizes.
        dtype: of the layers.
    """

    def __init__(self, stacked: nn.Module, info: ExpertsInfo, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = info.num_experts
        stacked._parameters.clear()
        self.gating = stacked
        for slot in info.slots():
            linear = nn.Linear(slot.in_features, slot.out_features, bias=False, device="meta", dtype=dtype)
            if str(slot.index) not in self._modules:
                self.add_module(str(slot.index), nn.Module())
            self.get_submodule(str(slot.index)).add_module(slot.leaf, linear)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send tokens through their experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], what each expert's output is multiplied by.

        Returns:
            [tokens, hidden], summed over each token's experts in float32.
        """
        total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:  # transformers' mark for an expert that another process holds
                continue
            token, place = torch.where(top_k_index == index)
            y = self._layer(index, DOWN)(self.inner(index, hidden_states[token]))
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).float())
        return total.to(hidden_states.dtype)

    def inner(self, index: int, x: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the down of expert ``index`` reads, [tokens, intermediate].

        Args:
            index: of the expert.
            x: [tokens, hidden].
            weights: in place of its gate's and its up's own.
        """
        if weights is None:
            both = [self._layer(index, leaf)(x) for leaf in LEAVES[:2]]
        else:
            both = [functional.linear(x, weight) for weight in weights]
        return gating_of(self.gating)(torch.cat(both, dim=-1))

    def gate_up(self, index: int) -> tuple[Tensor, Tensor]:
        """The weights [intermediate, hidden] of an expert's gate and up, as they are now."""
        gate, up = (cast(Tensor, self._layer(index, leaf).weight) for leaf in LEAVES[:2])
        return gate, up

    def _layer(self, index: int, leaf: str) -> nn.Module:
        return self.get_submodule(f"{index}.{leaf}")
