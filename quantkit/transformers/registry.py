"""Which quantized checkpoints ``from_pretrained`` hands to quantkit: transformers' registry of quantization methods.

A config.json names its method ("compressed-tensors", "gptq", ...), and transformers knows one config class and one
quantizer a method. quantkit registers a method of its own, "quantkit", with both. For the methods that it reads, a
chooser stands in the place of the config class: it gives a :class:`QuantkitConfig`, which leads to quantkit's
quantizer, where quantkit runs the checkpoint, and else whatever the class before it gives.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.import_utils import is_compressed_tensors_available, is_gptqmodel_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.errors import CheckpointError
from quantkit.formats import FORMATS, format_of
from quantkit.transformers.quantizer import METHOD, QuantkitQuantizer

_OWN_PACKAGES = {
    "compressed-tensors": is_compressed_tensors_available,
    "gptq": is_gptqmodel_available,
    "awq": is_gptqmodel_available,
}


class QuantkitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint that quantkit runs.

    Attributes:
        quant_method: what transformers chooses the quantizer by.
        on_disk: the object in config.json, as it was; save_pretrained writes it again.
    """

    def __init__(self, on_disk: dict[str, Any]) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs is an enum of their own methods
        self.on_disk = on_disk

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Called by transformers with the object in config.json."""
        config = cls(deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return deepcopy(self.on_disk)


class _Chooser(QuantkitConfig):
    """Stands for a method in transformers' registry; never an instance, only a way to one."""

    before: ClassVar[type[QuantizationConfigMixin]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """quantkit's config where quantkit runs the checkpoint, else that of the class before."""
        try:
            format_of(config_dict).read_config(config_dict, ())
        except CheckpointError as reason:
            try:
                return cls.before.from_dict(config_dict, return_unused_kwargs, **kwargs)
            except ImportError as missing:
                raise ImportError(f"{missing} (quantkit does not run this checkpoint either: {reason})") from reason
        return QuantkitConfig.from_dict(config_dict, return_unused_kwargs, **kwargs)


def claim(*, only_unread: bool) -> tuple[str, ...]:
    """Put a chooser before each method that quantkit reads.

    Args:
        only_unread: leave methods alone whose own package is installed.

    Returns:
        The methods that have a chooser now.
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QuantkitQuantizer)
        register_quantization_config(METHOD)(QuantkitConfig)
    for method, before in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if method == METHOD or not _reads(method) or issubclass(before, _Chooser):
            continue
        installed = _OWN_PACKAGES.get(method)
        if only_unread and installed is not None and installed():
            continue
        # A name that is taken is refused by the decorator: its entry is taken out, and comes back behind the chooser.
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method)
        register_quantization_config(method)(type(f"Quantkit{before.__name__}", (_Chooser,), {"before": before}))
    return _claimed()


def give_back() -> None:
    """Put the classes behind the choosers into their old places."""
    for method in _claimed():
        chooser: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method)
        register_quantization_config(method)(chooser.before)


def _claimed() -> tuple[str, ...]:
    return tuple(name for name, cls in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if issubclass(cls, _Chooser))


def _reads(method: str) -> bool:
    return any(candidate.reads({"quant_method": method}) for candidate in FORMATS)
