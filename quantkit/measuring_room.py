"""The memory and the disk that measuring the sensitivity of a model's units takes, checked before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from quantkit.errors import OutputError, message
from quantkit.plan import Plan
from quantkit.units import Unit

Metric = Literal["hessian", "kl"]
METRICS: tuple[Metric, ...] = ("hessian", "kl")

_FLOAT32 = 4
_LOGIT_COPIES = 4  # float32 [length, vocabulary]: logits, distribution, its logarithm, and the gradient
_MIB = 2**20


def check_room(
    plan: Plan, units: Sequence[Unit], num_schemes: int, metric: Metric, shape: tuple[int, int], directory: Path
) -> None:
    """Memory and disk for a measurement.

    Args:
        plan: the model.
        units: of the plan.
        num_schemes: how many are compared.
        metric: see :mod:`quantkit.sensitivity`.
        shape: (samples, tokens in each).
        directory: where hidden states go that do not fit the recipe's activation_memory.

    Raises:
        OutputError: not enough of either.
    """
    num_tokens, length = shape[0] * shape[1], shape[1]
    states = num_tokens * int(plan.skeleton.model.config.hidden_size) * plan.dtype.itemsize
    on_disk = states * _num_stores(plan, units, num_schemes, metric)
    held = min(on_disk, plan.recipe.activation_memory)
    vocabulary = int(plan.skeleton.model.config.vocab_size)
    errors = _FLOAT32 * max((unit.numel for unit in units if unit.is_experts), default=0)  # of all experts at once
    needed = plan.peak_memory(num_tokens, length) + held + errors + _LOGIT_COPIES * _FLOAT32 * length * vocabulary
    for what, wanted, free, fix in (
        ("memory", needed, psutil.virtual_memory().available, "use fewer or shorter samples"),
        (str(directory), on_disk - held, psutil.disk_usage(str(directory)).free, "free space or use fewer samples"),
    ):
        if wanted > free:
            raise OutputError(
                message(what, f"measuring needs about {wanted / _MIB:.0f} MiB and has {free / _MIB:.0f} MiB", fix)
            )


def _num_stores(plan: Plan, units: Sequence[Unit], num_schemes: int, metric: Metric) -> int:
    blocks = len(plan.skeleton.blocks)
    if metric == "hessian":
        return blocks + 1
    return 2 + num_schemes * max(sum(u.layers[0].info.block == index for u in units) for index in range(blocks))
