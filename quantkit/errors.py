"""Every error that quantkit raises on purpose.

    QuantkitError
    ├── InputError            what the user gave cannot be used as it is
    │   ├── SchemeError       a quantization scheme that is not possible, or not possible here
    │   ├── RecipeError       a recipe file or flag
    │   ├── CheckpointError   a model directory, its config or its tensors
    │   │   └── UnreadFormatError  a quantization that quantkit does not read (FP8, NVFP4, bitsandbytes, ...)
    │   ├── CalibrationError  calibration or evaluation text
    │   └── OutputError       the output directory
    ├── HessianError          a Hessian that is not positive definite
    ├── KernelError           no backend can run a layer here
    └── InterruptedRunError   the machine stopped the run (disk, memory); finished blocks are kept

The command line prints ``str(error)`` on one line and exits with code 2. So each message says where, what was
given, what is allowed and what to do: ``message(where, what, fix)`` puts the three together.
"""

from __future__ import annotations


class QuantkitError(Exception):
    """The root of the tree: catch it to catch everything that quantkit raises on purpose."""


class InputError(QuantkitError, ValueError):
    """What the user gave cannot be used as it is; nothing was written."""


class SchemeError(InputError):
    """A quantization scheme that is not possible, or not possible for this layer, method or format."""


class RecipeError(InputError):
    """A recipe file or a flag that overrides it."""


class CheckpointError(InputError):
    """A model directory: its config, its safetensors files or the tensors in them."""


class UnreadFormatError(CheckpointError):
    """A checkpoint that may be as it should be, in a quantization that quantkit does not read."""


class CalibrationError(InputError):
    """Calibration or evaluation text that is missing, malformed or too short."""


class OutputError(InputError):
    """The output directory cannot be written as asked."""


class HessianError(QuantkitError, ArithmeticError):
    """A layer's Hessian is not positive definite, even after damping."""


class KernelError(QuantkitError, RuntimeError):
    """No kernel backend can run a layer here; the message holds every backend's refusal."""


class InterruptedRunError(QuantkitError, RuntimeError):
    """The machine stopped the run (disk full, out of memory); finished blocks are kept for ``--resume``."""


def message(where: str, what: str, fix: str) -> str:
    """One line for the user: ``where: what; fix``; characters that would move the cursor are written out."""
    line = " ".join(f"{where}: {what}; {fix}".split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def first_line(error: BaseException) -> str:
    """What another program's exception says, in one line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
