"""What can be discovered of a model from its modules and their names alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

# Layers that read the same input. Serving engines fuse them into one matrix (vLLM's packed_modules_mapping), so that
# they must share one scheme there; quantkit solves them as one.
FUSED_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)

# What vLLM calls the matrix that it fuses of several, and transformers in families that have it fused.
_FUSED_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj"}

_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class BlockList:
    """The decoder blocks of a model: ``path.0``, ``path.1``, …"""

    path: str
    blocks: tuple[nn.Module, ...]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is ``x Wᵀ + b``: nn.Linear, or transformers' Conv1D, which holds W transposed."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module holds its weight as [in, out] (transformers' Conv1D, of GPT-2)."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def find_linears(module: nn.Module) -> dict[str, nn.Module]:
    """All linear modules below ``module``, by name."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def find_blocks(model: nn.Module) -> BlockList | None:
    """The decoder blocks: the one outermost list of modules that hold Linears.

    Args:
        model: a causal language model, on any device.

    Returns:
        None when there is no such list or more than one.
    """
    found = [
        BlockList(name, tuple(module.children()))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and not _INDEX.search(f".{name}.")
        and find_linears(module)
    ]
    return found[0] if len(found) == 1 else None


def input_group(name: str) -> str:
    """A layer's name for all layers that are known to read its input: ``….q_proj`` for ``….k_proj``."""
    stem, _, leaf = name.rpartition(".")
    return next((f"{stem}.{group[0]}" for group in FUSED_GROUPS if leaf in group), name)


def fused_names(name: str) -> tuple[str, ...]:
    """The name of the matrix that engines fuse a layer into: ``….qkv_proj`` for ``….k_proj``; none for most layers."""
    stem, _, leaf = name.rpartition(".")
    return tuple(f"{stem}.{_FUSED_NAMES[group[0]]}" for group in FUSED_GROUPS if leaf in group)


def unequal_fused(schemes: dict[str, object]) -> list[str]:
    """Groups of layers that engines fuse but whose schemes differ, as text; ``None`` stands for not quantized."""
    problems = []
    for group in FUSED_GROUPS:
        for name in schemes:
            stem, _, leaf = name.rpartition(".")
            members = [f"{stem}.{other}" for other in group]
            if leaf == group[0] and len({str(schemes[m]) for m in members if m in schemes}) > 1:
                problems.append(", ".join(f"{m}: {schemes.get(m) or 'not quantized'}" for m in members if m in schemes))
    return problems


def collapsed_name(name: str) -> str:
    """A module name with its indices replaced by ``*``: ``model.layers.*.mlp.up_proj``."""
    return _INDEX.sub(".*", name)
