"""Trying a scale out: what a submodule gives when its linears (and their inputs) are scaled, rounded, scaled back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.arch import is_transposed
from quantkit.errors import CalibrationError, message
from quantkit.grid import activation_scale, dequantize, fake_quantize_activations, quantize_groups
from quantkit.scheme import QuantScheme
from quantkit.structure import ScaleGroup
from quantkit.transforms.base import BlockContext, Call


class Trial:
    """One group's outputs on some calibration samples, compared with those for other weights.

    Args:
        group: whose readers are quantized.
        context: the block.
        parent: the submodule whose outputs are compared; it holds the readers or is the only one.
        num_tokens: see :meth:`BlockContext.calls`.

    Raises:
        CalibrationError: outputs that are not finite before anything was changed.
    """

    def __init__(self, group: ScaleGroup, context: BlockContext, parent: str, num_tokens: int) -> None:
        self._module, self._dtype = context.module(parent), context.dtype
        self._calls: Sequence[Call] = context.calls(parent, num_tokens)
        self._readers = {reader: context.module(reader) for reader in group.readers}
        self._weights = {reader: context.tensors.weight(reader) for reader in group.readers}
        found = {reader: context.scheme(reader) for reader in group.readers}
        self._schemes = {reader: scheme for reader, scheme in found.items() if scheme is not None}
        static = any(scheme.act_static for scheme in self._schemes.values())
        self._abs_max = context.stats(group.readers[0]).abs_max if static else None
        self._outputs = [call.run(self._module) for call in self._calls]
        self._energy = sum(float(y.float().square().sum(dtype=torch.float64)) for y in self._outputs)
        if not self._energy < float("inf"):
            raise CalibrationError(
                message(
                    parent, "gives outputs that are not finite", "check the model in this dtype, or use --dtype float32"
                )
            )

    def loss(self, columns: Tensor | None) -> float:
        """Σ (y - ŷ)² / Σ y², ŷ with readers ``round(W diag(columns)) diag(1/columns)`` on their schemes' grids, and
        their inputs ``round(x diag(1/columns)) diag(columns)`` where activations are quantized too.

        Round-to-nearest stands for whichever solver follows. Readers that stay dense are left as they are.

        Args:
            columns: float [in]; None is ones.

        Raises:
            SchemeError: a scale of a quantized weight or of activations that does not fit its dtype.
        """
        trial = {reader: self._rounded(reader, columns) for reader in self._schemes}
        with _weights(self._readers, trial), self._rounded_inputs(columns):
            error = sum(
                float((call.run(self._module).float() - y.float()).square().sum(dtype=torch.float64))
                for call, y in zip(self._calls, self._outputs, strict=True)
            )
        return error / self._energy if self._energy > 0 else error

    def _rounded(self, reader: str, columns: Tensor | None) -> Tensor:
        scheme, weight = self._schemes[reader].weight_only, self._weights[reader].float()
        device = _weight(self._readers[reader]).device
        scaled = weight if columns is None else weight * columns.to(weight)
        rounded = dequantize(quantize_groups(scaled.to(device), scheme, self._dtype), torch.float32)
        return rounded if columns is None else rounded / columns.to(rounded)

    @contextmanager
    def _rounded_inputs(self, columns: Tensor | None) -> Iterator[None]:
        """The readers' inputs are rounded inside, where their schemes say so."""
        handles = [
            self._readers[reader].register_forward_pre_hook(_rounds(columns, self._static(scheme, columns)))
            for reader, scheme in self._schemes.items()
            if scheme.act_bits is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _static(self, scheme: QuantScheme, columns: Tensor | None) -> float | None:
        """The static scale of the scaled input; None: dynamic."""
        if not scheme.act_static:
            return None
        assert self._abs_max is not None, "gathered where a scheme is static"
        scaled = self._abs_max if columns is None else self._abs_max / columns.to(self._abs_max)
        return activation_scale(float(scaled.max()), self._dtype)


def _rounds(
    columns: Tensor | None, static_scale: float | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a linear's input as it would be rounded divided by ``columns``."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wide = args[0].float() if columns is None else args[0].float() / columns.to(args[0].device, torch.float32)
        rounded = fake_quantize_activations(wide, static_scale)
        back = rounded if columns is None else rounded * columns.to(rounded)
        return (back.to(args[0].dtype), *args[1:])

    return hook


@contextmanager
def _weights(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The modules hold these weights [out, in] inside, and their own again afterwards."""
    own = {name: modules[name]._parameters["weight"] for name in weights}
    try:
        for name, weight in weights.items():
            module = modules[name]
            placed = (weight.T if is_transposed(module) else weight).to(_weight(module).dtype)
            module._parameters["weight"] = nn.Parameter(placed, requires_grad=False)
        yield
    finally:
        for name, parameter in own.items():
            modules[name]._parameters["weight"] = parameter


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
