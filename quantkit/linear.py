"""QuantLinear, the single quantized nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quantkit.errors import InputError, KernelError, SchemeError, message
from quantkit.grid import dequantize, quantize_groups
from quantkit.kernels import KernelBackend, LinearSpec, ReferenceBackend, choose_backend
from quantkit.kernels.base import add_bias, row_blocks
from quantkit.qtensor import QuantizedTensor, join_rows
from quantkit.scheme import QuantScheme, parse_scheme

_PORTABLE = ReferenceBackend()  # its packed form is the same on every machine: the form in a state_dict


class QuantLinear(nn.Module):
    """``y = x @ Wᵀ + bias`` with a quantized weight; for inference, differentiable with respect to x only.

    The packed weight lies in buffers that belong to a kernel backend. ``.to(device)`` and ``.to(dtype)`` (or
    ``.half()``, ``.bfloat16()``, ...) choose the backend anew and pack the same codes and scales for it: dtype is that
    of the activations and of the bias, and never rounds a scale. A state_dict holds the portable packed form
    (``weight_packed``, ``scale``, ``zero_point``, ``g_idx``, ``act_scale``, ``bias``), whatever the backend, and so
    does a pickle or deep copy. Where the scheme quantizes activations, x is rounded to its grid first, and the gradient
    for x passes straight through that rounding.

    Attributes:
        spec: sizes, scheme, dtype of the activations, type of the device.
        bias: ``spec.dtype`` [out], or None. A buffer: the module has no parameters.

    Args:
        q: the weight; the layer runs where it lies.
        bias: [out], or None.
        dtype: of the activations, in and out.
        backend: a kernel backend by name; None is the first that can run the layer, wherever it goes.

    Raises:
        KernelError: no backend, or not that one, can run the layer.
    """

    spec: LinearSpec
    bias: Tensor | None

    def __init__(
        self,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if bias is not None and list(bias.shape) != [q.out_features]:
            what = f"bias is {list(bias.shape)}"
            raise InputError(message("QuantLinear", what, f"give one of [{q.out_features}], or None"))
        self._wanted = backend
        self._names: tuple[str, ...] = ()
        self._pack(q, dtype)
        self.register_buffer("bias", None if bias is None else bias.detach().to(q.codes.device, dtype))

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> QuantLinear:
        """The layer of a quantized weight on ``device`` (None: where ``q`` lies); otherwise see the class."""
        return cls(q if device is None else _moved(q, torch.device(device)), bias, dtype=dtype, backend=backend)

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: QuantScheme | str, *, backend: str | None = None) -> QuantLinear:
        """Round a dense layer to the nearest codes (RTN); its dtype stays that of activations and scales.

        Args:
            linear: an nn.Linear, or a Conv1D of transformers, whose weight is [in, out]. Not modified.
            scheme: a scheme or its name, such as ``w4a16_g128`` or ``w8a8``; static activations need calibration.
            backend: see the class.

        Raises:
            InputError: another kind of module.
            SchemeError: the group size does not divide the columns, or the weight is not finite.
            KernelError: no backend can run the layer.
        """
        wanted = dynamic_scheme(scheme)
        weight = dense_weight(linear)
        wanted.num_groups(weight.shape[1])
        choose_backend(spec_of(weight, wanted), backend)
        layer = cls(_rounded(weight, wanted), cast("Tensor | None", linear.bias), dtype=weight.dtype, backend=backend)
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.spec.out_features

    @property
    def scheme(self) -> QuantScheme:
        """Bits, group size, symmetry."""
        return self.spec.scheme

    @property
    def backend(self) -> str:
        """Name of the kernel backend that runs the layer."""
        return self._backend.name

    @property
    def device(self) -> torch.device:
        """Where the packed weight lies."""
        return cast(Tensor, self._buffers[self._names[0]]).device

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads ``Linear.weight`` itself. Every read dequantizes all of it."""
        return self.dequantize()

    def quantized(self) -> QuantizedTensor:
        """The weight: exact codes, scales and zero points, unpacked from the backend's form."""
        return self._backend.unpack(self._packed(), self.spec)

    def dequantize(self) -> Tensor:
        """The dense weight ``spec.dtype`` [out, in]."""
        return dequantize(self.quantized(), self.spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: ``spec.dtype`` [..., in], on the layer's device.

        Returns:
            ``spec.dtype`` [..., out].

        Raises:
            KernelError: another dtype, size or device.
        """
        self._check(x)
        differentiable = x.requires_grad and torch.is_grad_enabled()
        return add_bias(_product(x, self), self.bias) if differentiable else self._multiply(x, self.bias)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        dtype = str(self.spec.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, dtype={dtype}, backend={self.backend}"
        )

    def _check(self, x: Tensor) -> None:
        if x.dtype != self.spec.dtype:
            fix = f"call .to({self.spec.dtype}) on x, or .to({x.dtype}) on the layer"
            raise KernelError(message("QuantLinear", f"x is {x.dtype}, the layer {self.spec.dtype}", fix))
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            what = f"x is {list(x.shape)}"
            raise KernelError(message("QuantLinear", what, f"the layer takes [..., {self.in_features}]"))
        if x.device != self.device:
            what = f"x is on {x.device}, the layer on {self.device}"
            raise KernelError(message("QuantLinear", what, "move one of them with .to(device)"))

    def _packed(self) -> dict[str, Tensor]:
        return {name: cast(Tensor, self._buffers[name]) for name in self._names}

    def _pack(self, q: QuantizedTensor, dtype: torch.dtype) -> None:
        """Choose a backend and put its packed tensors in the place of those of the last one."""
        spec = LinearSpec.of(q, dtype)
        backend: KernelBackend = choose_backend(spec, self._wanted)
        packed = backend.prepack(q, spec)
        for name in self._names:
            delattr(self, name)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)
        self.spec, self._backend, self._names = spec, backend, tuple(packed)

    def _multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._backend.matmul(x, self._packed(), self.spec, bias)

    def _multiply_transposed(self, grad: Tensor) -> Tensor:
        """``grad @ W``, [..., out] -> [..., in]; dense by blocks of rows, summed in at least float32."""
        q = self.quantized()
        flat = grad.reshape(-1, self.out_features)
        dtype = torch.promote_types(self.spec.dtype, torch.float32)
        total = torch.zeros(flat.shape[0], self.in_features, dtype=dtype, device=grad.device)
        for start, stop in row_blocks(self.out_features, self.in_features):
            total += flat[:, start:stop] @ dequantize(q.rows(start, stop), self.spec.dtype)
        return total.to(self.spec.dtype).view(*grad.shape[:-1], self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:  # noqa: ARG002
        """What nn.Module calls for .to(), .half(), .cuda(), ...: packed tensors are packed anew, never cast."""
        probe = fn(torch.empty(0, dtype=self.spec.dtype, device=self.device))
        if (probe.dtype, probe.device) != (self.spec.dtype, self.device):
            self._pack(_moved(self.quantized(), probe.device), probe.dtype)
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and deep copies: the portable packed form, because a backend's may have no storage to copy."""
        state = dict(self.__dict__)
        state["_buffers"] = {"bias": self.bias}
        state["_non_persistent_buffers_set"] = set()
        state["_portable"] = _PORTABLE.prepack(self.quantized(), self.spec)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state.pop("_portable")
        super().__setstate__({**state, "_names": ()})  # type: ignore[no-untyped-call]
        self._pack(_PORTABLE.unpack(packed, self.spec), self.spec.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in _PORTABLE.prepack(self.quantized(), self.spec).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {prefix + name: name for name in _PORTABLE.names(self.spec)}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing = [key for key in names if key not in state_dict]
        missing_keys.extend(missing)
        if missing:
            return
        try:
            packed = {name: state_dict[key].to(self.device) for key, name in names.items()}
            self._pack(_PORTABLE.unpack(packed, self.spec), self.spec.dtype)
        except (ValueError, KernelError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


class _Product(torch.autograd.Function):
    """The product of :class:`QuantLinear`, with its gradient for x: torch's packed operators have none."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return layer._multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer._multiply_transposed(grad), None  # type: ignore[attr-defined]


def _product(x: Tensor, layer: QuantLinear) -> Tensor:
    return cast(Tensor, _Product.apply(x, layer))  # type: ignore[no-untyped-call]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told by its name and shape: transformers is not imported for it."""
    weight = getattr(module, "weight", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, Tensor) or weight.ndim != 2:
        return False
    return bool(weight.shape[1] == getattr(module, "nf", None))


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer."""
    if isinstance(linear, nn.Linear):
        return linear.weight.detach()
    if is_conv1d(linear):
        return cast(Tensor, linear.weight).detach().T
    what = f"{type(linear).__name__} is not a linear layer"
    raise InputError(message("QuantLinear", what, "give an nn.Linear or transformers' Conv1D"))


def spec_of(weight: Tensor, scheme: QuantScheme) -> LinearSpec:
    """What a backend has to run for a dense weight [out, in] in this scheme."""
    return LinearSpec(weight.shape[1], weight.shape[0], scheme, weight.dtype, weight.device.type)


def _rounded(weight: Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """A few rows at a time, so that no float32 copy of all is made."""
    # float64 scales do not ship, and numbers below float32 are not computed with.
    scale_dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    wide = torch.promote_types(weight.dtype, torch.float32)
    blocks = [slice(*block) for block in row_blocks(*weight.shape)] or [slice(0)]
    return join_rows([quantize_groups(weight[rows].to(wide), scheme, scale_dtype) for rows in blocks])


def dynamic_scheme(scheme: QuantScheme | str) -> QuantScheme:
    """The scheme, which must need no calibration data."""
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    if wanted.act_static:
        what = "static activations need calibration data, and there is none here"
        raise SchemeError(message(str(wanted), what, "use dynamic activations (w8a8), or quantkit.quantize"))
    return wanted


def _moved(q: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    g_idx = None if q.g_idx is None else q.g_idx.to(device)
    return replace(
        q, codes=q.codes.to(device), scale=q.scale.to(device), zero_point=q.zero_point.to(device), g_idx=g_idx
    )
