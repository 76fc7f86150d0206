"""join_linears(): layers that read the same input as one product, whose rows each of them takes.

A product with one token costs its call beside its bytes: of the seven linear layers in a block of llama, q, k and v
become one product, gate and up another. The modules keep their places and names, so that a model's own code runs as it
is: the first of them that is called multiplies for all, and the others, given the same tensor, take their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.arch import FUSED_GROUPS
from quantkit.errors import InputError, message
from quantkit.linear import QuantLinear
from quantkit.qtensor import QuantizedTensor, join_rows

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Joining:
    """What :func:`join_linears` did.

    Attributes:
        joined: the names of the layers of each product.
        apart: groups that stayed as they were, as ``names: reason``.
    """

    joined: tuple[tuple[str, ...], ...]
    apart: tuple[str, ...]


def join_linears(model: nn.Module) -> Joining:
    """Join q/k/v and gate/up projections (:data:`quantkit.arch.FUSED_GROUPS`) wherever they are QuantLinear, in place.

    For inference: a state_dict has the layers one by one, as before, and cannot be loaded again. Decoding gives the
    same numbers to the last bit, since rows do not depend on each other; with many tokens, where a backend multiplies
    by dense blocks of rows, these are other blocks.

    Args:
        model: any module that holds such layers under these names.
    """
    joined, apart = [], []
    for parent_name, parent in list(model.named_modules()):
        for group in FUSED_GROUPS:
            members = {leaf: parent._modules[leaf] for leaf in group if parent._modules.get(leaf) is not None}
            names = tuple(f"{parent_name}.{leaf}".lstrip(".") for leaf in members)
            layers = [module for module in members.values() if type(module) is QuantLinear]
            if len(members) < 2 or not layers:
                continue
            reason = _why_apart(layers) if len(layers) == len(members) else "not all are QuantLinear"
            if reason is not None:
                apart.append(f"{', '.join(names)}: {reason}")
                continue
            for leaf, part in zip(members, _parts(layers), strict=True):
                parent.set_submodule(leaf, part)
            joined.append(names)
    return Joining(tuple(joined), tuple(apart))


def separated(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` as it was before :func:`join_linears`: joined layers one by one, made as they come."""
    products = {module.shared.product for module in model.modules() if isinstance(module, JoinedLinear)}
    for name, module in list(model.named_modules(remove_duplicate=remove_duplicate)):
        if module not in products:
            yield name, module.separate() if isinstance(module, JoinedLinear) else module


def _why_apart(layers: list[QuantLinear]) -> str | None:
    """Why these cannot be one layer; None when they can."""
    first = layers[0]
    if len({layer.scheme for layer in layers}) > 1:
        return f"schemes differ ({', '.join(str(layer.scheme) for layer in layers)})"
    if len({(layer.in_features, layer.spec.dtype, layer.device, layer._wanted) for layer in layers}) > 1:
        return "sizes, dtypes, devices or backends differ"
    if len({layer.bias is None for layer in layers}) > 1:
        return "some have a bias"
    if any(getattr(layer, hooks) for layer in layers for hooks in _HOOKS):
        return "some have hooks"
    if first.scheme.act_static or first.spec.has_g_idx:
        weights = [layer.quantized() for layer in layers]
        if len({q.act_scale for q in weights}) > 1:
            return "scales of the activations differ"
        if not all(_same_order(weights[0], q) for q in weights):
            return "orders of the columns (g_idx) differ"
    return None


def _same_order(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    if one.g_idx is None or other.g_idx is None:
        return one.g_idx is other.g_idx
    return torch.equal(one.g_idx, other.g_idx)


def _parts(layers: list[QuantLinear]) -> Iterator[JoinedLinear]:
    first = layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    q = join_rows([layer.quantized() for layer in layers])
    bias = torch.cat(biases) if biases else None
    product = QuantLinear(q, bias, dtype=first.spec.dtype, backend=first._wanted).train(first.training)
    shared = _Shared(product, [layer.out_features for layer in layers])
    for index in range(len(layers)):
        yield JoinedLinear(shared, index).train(first.training)


class _Shared:
    """The product of several layers, kept until each has taken its rows.

    That it is the same tensor decides, so whatever calls the layers, and in whatever order, each gives its own product
    of its own input. No module, so that only one of the layers owns ``product``.
    """

    def __init__(self, product: QuantLinear, sizes: list[int]) -> None:
        self.product, self.sizes = product, sizes
        # The input, what each layer takes of its product, and how many have not yet. In one attribute: what traced code
        # sets, torch.compile sets in Python after each call.
        self._kept: tuple[Tensor, tuple[Tensor, ...], int] | None = None

    def rows(self, index: int) -> slice:
        """Of a layer in the product."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def part(self, x: Tensor, index: int) -> Tensor:
        """``x`` times the rows of one layer."""
        kept = self._kept
        if kept is not None and kept[0] is x:
            _, parts, waiting = kept
        else:
            parts, waiting = self.product(x).split(self.sizes, -1), len(self.sizes)
        self._kept = (x, parts, waiting - 1) if waiting > 1 else None
        return parts[index]


class JoinedLinear(nn.Module):
    """One of several layers that read the same input, see :func:`join_linears`.

    Attributes:
        shared: the product of all.
        product: its QuantLinear, a submodule of the first layer only.
    """

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self.shared, self._index = shared, index
        if index == 0:
            self.product = shared.product

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shared.product.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shared.sizes[self._index]

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads ``Linear.weight`` itself. Every read dequantizes all of it."""
        return self.separate().weight

    def separate(self) -> QuantLinear:
        """A new layer of its own with the same codes, scales and bias."""
        product, rows = self.shared.product, self.shared.rows(self._index)
        bias = None if product.bias is None else product.bias[rows].clone()
        q = product.quantized().rows(rows.start, rows.stop)
        return QuantLinear(q, bias, dtype=product.spec.dtype, backend=product._wanted)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; see :class:`quantkit.QuantLinear`."""
        return self.shared.part(x, self._index)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of the layer by itself."""
        return self.separate().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],  # noqa: ARG002
        prefix: str,
        *rest: Any,  # noqa: ARG002
    ) -> None:
        what = "the layer is joined with others that read its input"
        raise InputError(message(prefix.rstrip("."), what, "load the tensors first, then call join_linears"))

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, part {self._index + 1} of "
            f"{len(self.shared.sizes)}"
        )
