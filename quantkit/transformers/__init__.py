"""quantkit inside transformers: ``from_pretrained`` on quantkit's backends, and adapters of PEFT on top.

    import quantkit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out")     # where no other package reads the checkpoint
    quantkit.transformers.register()                        # from here on, in the place of one that does

This package imports transformers when it is used, never before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["lora", "register", "register_when_imported", "unregister"]

_REGISTRY = "transformers.quantizers.auto"  # transformers' module of quantizers


def register() -> tuple[str, ...]:
    """From here on, ``from_pretrained`` opens what quantkit reads with quantkit, whatever else is installed.

    A checkpoint that quantkit does not run (FP8, sparse, ...) goes to where it went before. Calling it twice is
    calling it once.

    Returns:
        The ``quant_method`` values that are looked at.
    """
    import_module(_REGISTRY)  # first: at the end of its import it is filled in, by what is imported next
    from quantkit.transformers.registry import claim

    return claim(only_unread=False)


def unregister() -> None:
    """Give every ``quant_method`` back to whom it belonged."""
    import_module(_REGISTRY)
    from quantkit.transformers.registry import give_back

    give_back()


def lora(config: LoraConfig) -> LoraConfig:
    """Let PEFT's LoRA adapt quantkit's layers; returns the config that it was given.

    ``get_peft_model(model, quantkit.transformers.lora(LoraConfig(...)))``. The adapter is trained on top of the
    quantized weight and is never merged into it. To open a saved one:
    ``PeftModel.from_pretrained(model, path, config=quantkit.transformers.lora(PeftConfig.from_pretrained(path)))``.
    """
    from quantkit.transformers.adapters import adapt

    return adapt(config)


def register_when_imported() -> None:
    """What ``import quantkit`` does: fill in where transformers has no package that reads a checkpoint.

    Nothing that works without quantkit changes: a method whose own package (compressed-tensors, gptqmodel) is installed
    stays with it. transformers is not imported for this; where it is not yet, its registry is filled in at the end of
    its own import, by a finder on ``sys.meta_path`` that takes itself away again.
    """
    if _REGISTRY in sys.modules:
        _fill_in()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _fill_in() -> None:
    from quantkit.transformers.registry import claim

    claim(only_unread=True)


class _RegistryFinder(MetaPathFinder):
    """Finds transformers' registry as the other finders do, with a loader that fills it in when it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder; every other module is left to the other finders."""
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegistryLoader(spec.loader, self)
        return spec


class _RegistryLoader(Loader):
    """Loads a module as its own loader does, then fills it in and takes the finder away."""

    def __init__(self, own: Loader, finder: _RegistryFinder) -> None:
        self._own, self._finder = own, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See importlib.abc.Loader."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See importlib.abc.Loader."""
        self._own.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _fill_in()
