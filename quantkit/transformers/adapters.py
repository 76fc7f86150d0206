"""LoRA adapters of PEFT over quantkit's layers."""

from __future__ import annotations

from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from quantkit.errors import InputError, message
from quantkit.linear import QuantLinear
from quantkit.transformers.packed import PackedLinear

_MERGE = "the weight under the adapter is quantized and stays as it is"
_KEEP = "save the adapter beside the checkpoint, or merge it into the dense model and quantize again"


class LoraQuantLinear(nn.Module, LoraLayer):  # type: ignore[misc]
    """``base(x) + scaling · B A dropout(x)`` with a quantized base; LoRA, arXiv:2106.09685.

    Args:
        base_layer: a QuantLinear.
        adapter_name: of PEFT.
        config: of PEFT.
        r: rank.
        lora_alpha: scaling times r.
        options: other arguments of PEFT that only its own layers use.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **options: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **options)
        if config.use_dora:
            raise InputError(message("LoraConfig", "use_dora changes the base weight", "use plain LoRA"))
        layer: Any = self
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """PEFT's own warns that it does not know the layer."""
        return int(cast(int, module.in_features)), int(cast(int, module.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Base and active adapters; the adapters compute in their own dtype."""
        layer: Any = self  # PEFT's attributes, of which nn.Module knows no types
        y: Tensor = layer.base_layer(x)
        if layer.disable_adapters:
            return y
        for name in layer.active_adapters:
            if name in layer.lora_A:
                down, up = layer.lora_A[name], layer.lora_B[name]
                inner = layer.lora_dropout[name](x.to(down.weight.dtype))
                y = y + (up(down(inner)) * layer.scaling[name]).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Refused: see the module."""
        raise InputError(message("merge", _MERGE, _KEEP))

    def unmerge(self) -> None:
        """Nothing was merged."""


def adapt(config: LoraConfig) -> LoraConfig:
    """See :func:`quantkit.transformers.lora`."""
    config._register_custom_module({QuantLinear: LoraQuantLinear, PackedLinear: LoraQuantLinear})
    return config
