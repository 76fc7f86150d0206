"""What every kernel backend is: quantized weight -> packed tensors -> products with activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.errors import KernelError, message
from quantkit.grid import dequantize
from quantkit.kernels.order import has_uneven_groups
from quantkit.precision import float32_is_faster, linear_in_float32
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

# Weights that are dense at one time. Process CPU time of a product with one row of x (W4, bf16, 4096 x 4096, one core):
# all at once 221 ms, by 2^22 weights 139, 2^21 57, 2^20 75, 2^18 155. Blocks that stay in the cache win.
BLOCK_WEIGHTS = 1 << 21


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """Everything a backend may ask before it takes a layer; no tensors, hashable.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
        scheme: bits, group size, symmetry, and whether activations are quantized before they are multiplied.
        dtype: floating-point dtype of the activations, in and out.
        device_type: "cpu", "cuda", ...
        has_g_idx: True when the columns of a group are not contiguous.
        uneven_groups: True when that gives some groups more columns than others.
    """

    in_features: int
    out_features: int
    scheme: QuantScheme
    dtype: torch.dtype
    device_type: str
    has_g_idx: bool = False
    uneven_groups: bool = False

    @classmethod
    def of(cls, q: QuantizedTensor, dtype: torch.dtype) -> LinearSpec:
        """The layer that ``q`` makes, where it is, for activations of ``dtype``."""
        device = q.codes.device.type
        return cls(q.in_features, q.out_features, q.scheme, dtype, device, q.g_idx is not None, has_uneven_groups(q))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        g_idx = (", uneven g_idx" if self.uneven_groups else ", g_idx") if self.has_g_idx else ""
        sizes = f"{self.in_features}, {self.out_features}"
        return f"Linear({sizes}, {self.scheme}, {dtype}, {self.device_type}{g_idx})"


class KernelBackend(Protocol):
    """One way to multiply by a quantized weight. It has no state: what it keeps is in the packed tensors."""

    name: ClassVar[str]

    def why_not(self, spec: LinearSpec) -> str | None:
        """Why this backend cannot run such a layer here, in words; None when it can."""
        ...

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """The tensors that the backend keeps: new ones, on ``q``'s device.

        Raises:
            KernelError: ``q`` is not the weight that ``spec`` describes, or its values break its scheme.
        """
        ...

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """``x @ Wᵀ + bias``, x rounded to its grid where the scheme quantizes activations
        (:func:`quantkit.grid.quantize_activations`). Not differentiable; :class:`quantkit.linear.QuantLinear` is.

        Args:
            x: ``spec.dtype`` [..., in], any strides.
            packed: what :meth:`prepack` returned.
            spec: the layer.
            bias: ``spec.dtype`` [out], or None. A kernel that adds it itself does so before it rounds.

        Returns:
            ``spec.dtype`` [..., out].
        """
        ...

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """The inverse of :meth:`prepack`: exact codes, scales and zero points."""
        ...


def check_weight(q: QuantizedTensor, spec: LinearSpec) -> None:
    """Refuse a weight that a packed form would not hold.

    Raises:
        KernelError: sizes, scheme, device or g_idx other than ``spec``'s; codes that do not fit its bits; zero
            points of a symmetric scheme that are not ``2**(bits-1)``.
    """
    given = LinearSpec.of(q, spec.dtype)
    if given != spec:
        raise KernelError(message("prepack", f"the weight makes {given}", f"give the weight of {spec}"))
    if q.codes.numel() and int(q.codes.max()) >= spec.scheme.levels:
        what = f"code {int(q.codes.max())} does not fit in {spec.scheme.bits} bits"
        raise KernelError(message(str(spec), what, "quantize the weight again or repair its checkpoint"))
    if spec.scheme.symmetric and not bool((q.zero_point == spec.scheme.mid).all()):
        what = f"the scheme is symmetric and the zero points are not all {spec.scheme.mid}"
        raise KernelError(message(str(spec), what, "describe the weight with symmetric=False"))


def zero_point_rows(packed: Mapping[str, Tensor], scale: Tensor, scheme: QuantScheme, start: int) -> Tensor:
    """Zero points of the rows of ``scale``: the stored ones, or the constant that a symmetric scheme does not store.

    Args:
        packed: holds ``zero_point`` uint8 [out, groups] where the scheme is asymmetric.
        scale: [rows, groups].
        scheme: symmetric or not.
        start: the first of these rows in the layer.
    """
    if scheme.symmetric:
        return middle_zero_point(scale, scheme)
    return packed["zero_point"][start : start + scale.shape[0]]


def middle_zero_point(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """The zero points that a symmetric scheme does not store: uint8, of the shape of ``scale`` and beside it."""
    return torch.full(scale.shape, scheme.mid, dtype=torch.uint8, device=scale.device)


def act_scale_tensor(q: QuantizedTensor) -> Tensor:
    """The static activation scale as the tensor that backends pack: float32 [1], on the weight's device."""
    return torch.tensor([q.act_scale], dtype=torch.float32, device=q.codes.device)


def act_scale_of(packed: Mapping[str, Tensor], scheme: QuantScheme) -> float | None:
    """The inverse of :func:`act_scale_tensor`; None for a scheme without static activations.

    Raises:
        ValueError: not one float32 number.
    """
    if not scheme.act_static:
        return None
    stored = packed["act_scale"]
    if list(stored.shape) != [1] or stored.dtype != torch.float32:
        raise ValueError(f"act_scale must be float32 [1], not {stored.dtype} {list(stored.shape)}")
    return float(stored)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y + bias``, for backends whose kernels do not add it."""
    return y if bias is None else y + bias


def row_blocks(
    out_features: int, in_features: int, multiple: int = 1, weights: int = BLOCK_WEIGHTS
) -> Iterator[tuple[int, int]]:
    """Ranges of output rows that cover a layer of this size.

    Args:
        out_features: rows of the layer.
        in_features: its columns.
        multiple: every start is a multiple of it.
        weights: of a range, about.
    """
    rows = max(1, weights // max(1, in_features * multiple)) * multiple
    for start in range(0, out_features, rows):
        yield start, min(start + rows, out_features)


def linear_by_rows(
    x: Tensor, rows: Callable[[int, int], QuantizedTensor], spec: LinearSpec, multiple: int = 1
) -> Tensor:
    """Dequantize and multiply block by block, so that no layer is ever dense as a whole.

    Args:
        x: ``spec.dtype`` [tokens, in].
        rows: gives the quantized weight of output rows ``start:stop``.
        spec: the layer.
        multiple: every start is a multiple of it.

    Returns:
        ``spec.dtype`` [tokens, out].
    """
    y = x.new_empty(x.shape[0], spec.out_features)
    product = linear_in_float32 if _is_faster_wide(x) else linear
    for start, stop in row_blocks(spec.out_features, spec.in_features, multiple):
        y[:, start:stop] = product(x, dequantize(rows(start, stop), spec.dtype))
    return y


def _is_faster_wide(x: Tensor) -> bool:
    """Whether bfloat16 rows are multiplied faster in float32, the weight's conversion included.

    Milliseconds of CPU time for a W4 layer of 2048 x 2048 with 256 rows, in bfloat16 and in float32, dequantizing
    included: 170/39 with AVX2, 117/65 with AVX-512, 75/58 with Intel's AVX512_BF16 without AMX; the same at 32 rows.
    """
    if torch.compiler.is_compiling():  # asking for the CPU's capabilities would break the graph
        return False
    return x.shape[0] >= 32 and float32_is_faster(x.dtype, x.device)
