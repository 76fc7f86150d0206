"""quantkit: post-training quantization of causal language models.

    import quantkit

    quantkit.quantize("builtin", "out")              # the twin of the command `quantkit quantize`
    model = quantkit.load("out")                     # a transformers model with QuantLinear layers
    quantkit.replace_linears(module, "w8a16")        # any torch module, in place

Importing this package imports neither torch nor transformers; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from quantkit.transformers import register_when_imported

if TYPE_CHECKING:
    from quantkit.calibration import CalibrationSpec
    from quantkit.converting import Conversion, convert
    from quantkit.embedding import QuantEmbedding
    from quantkit.errors import (
        CalibrationError,
        CheckpointError,
        HessianError,
        InputError,
        InterruptedRunError,
        KernelError,
        OutputError,
        QuantkitError,
        RecipeError,
        SchemeError,
        UnreadFormatError,
    )
    from quantkit.evaluation import EvalSpec, Evaluation, evaluate
    from quantkit.joining import Joining, join_linears
    from quantkit.linear import QuantLinear
    from quantkit.loader import load
    from quantkit.mixed import MixedPlan, plan_mixed
    from quantkit.modules import quantize_module
    from quantkit.qtensor import QuantizedTensor
    from quantkit.recipe import Recipe, Rule
    from quantkit.replacing import replace_linears
    from quantkit.run import Result, quantize
    from quantkit.scheme import QuantScheme, parse_scheme
    from quantkit.solvers import GPTQ, RTN, AutoRound
    from quantkit.transforms import AWQ, Rotation, SmoothQuant
    from quantkit.tuning import BlockTuning

_HOMES = {
    "calibration": ("CalibrationSpec",),
    "converting": ("Conversion", "convert"),
    "embedding": ("QuantEmbedding",),
    "errors": (
        "CalibrationError",
        "CheckpointError",
        "HessianError",
        "InputError",
        "InterruptedRunError",
        "KernelError",
        "OutputError",
        "QuantkitError",
        "RecipeError",
        "SchemeError",
        "UnreadFormatError",
    ),
    "evaluation": ("EvalSpec", "Evaluation", "evaluate"),
    "joining": ("Joining", "join_linears"),
    "linear": ("QuantLinear",),
    "loader": ("load",),
    "mixed": ("MixedPlan", "plan_mixed"),
    "modules": ("quantize_module",),
    "qtensor": ("QuantizedTensor",),
    "recipe": ("Recipe", "Rule"),
    "replacing": ("replace_linears",),
    "run": ("Result", "quantize"),
    "scheme": ("QuantScheme", "parse_scheme"),
    "solvers": ("GPTQ", "RTN", "AutoRound"),
    "transforms": ("AWQ", "Rotation", "SmoothQuant"),
    "tuning": ("BlockTuning",),
}
_PACKAGES = ("transformers",)
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "AutoRound",
    "BlockTuning",
    "CalibrationError",
    "CalibrationSpec",
    "CheckpointError",
    "Conversion",
    "EvalSpec",
    "Evaluation",
    "HessianError",
    "InputError",
    "InterruptedRunError",
    "Joining",
    "KernelError",
    "MixedPlan",
    "OutputError",
    "QuantEmbedding",
    "QuantLinear",
    "QuantScheme",
    "QuantizedTensor",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "Result",
    "Rotation",
    "Rule",
    "SchemeError",
    "SmoothQuant",
    "UnreadFormatError",
    "convert",
    "evaluate",
    "join_linears",
    "load",
    "parse_scheme",
    "plan_mixed",
    "quantize",
    "quantize_module",
    "replace_linears",
]


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"quantkit.{name}")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(import_module(f"quantkit.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_imported()
