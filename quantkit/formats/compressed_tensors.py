"""compressed-tensors: what vLLM, SGLang and transformers load.

Weight-only layers (2 to 8 bits) are in its format pack-quantized, W8A8 layers in int-quantized. A checkpoint that holds
both says "mixed-precision" at the top of its config, and each config group names its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from quantkit.arch import fused_names
from quantkit.errors import CheckpointError, SchemeError, UnreadFormatError, message
from quantkit.formats.checks import FLOATS, check_scale, check_tensor
from quantkit.formats.packed_config import IN_BLOCK
from quantkit.packing import pack, packed_words, unpack
from quantkit.patterns import Patterns, Targets, first_match
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

_VERSION = "0.17.0"  # of the config's layout, as its readers know it
_WHERE = "config.json: quantization_config"
_INT8_BITS = 8
_PACKED, _INT8, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"


class _Weights(BaseModel):
    """One group's weight arguments; keys that do not change the decoded weight are let through."""

    model_config = ConfigDict(extra="ignore")
    num_bits: int
    type: Literal["int"] = "int"
    symmetric: bool = True
    strategy: Literal["group", "channel"]
    group_size: int | None = None
    actorder: str | bool | None = None
    dynamic: Literal[False] = False


class _Activations(BaseModel):
    """What is done to a group's inputs: one scale a token, found at run time, or one a tensor, from the file."""

    model_config = ConfigDict(extra="ignore")
    num_bits: Literal[8]
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["token", "tensor"]
    dynamic: bool = False


class _Group(BaseModel):
    model_config = ConfigDict(extra="ignore")
    targets: list[str]
    weights: _Weights
    input_activations: _Activations | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore")
    quant_method: Literal["compressed-tensors"]
    format: str = _PACKED
    ignore: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    config_groups: dict[str, _Group]


class CompressedTensors:
    """The tensors of a layer of N rows and K columns, in one of two layouts.

    pack-quantized, floating-point activations: ``weight_packed`` int32 [N, ⌈K·b/32⌉], ``weight_scale`` [N, groups],
    ``weight_shape`` int64 [2], and for asymmetric grids ``weight_zero_point`` int32 [⌈N·b/32⌉, groups].

    int-quantized, 8-bit activations: ``weight`` int8 [N, K] (codes minus 128), ``weight_scale`` [N, 1], for asymmetric
    grids ``weight_zero_point`` int8 [N, 1] (minus 128), and for static activations ``input_scale`` [1].
    """

    name: ClassVar[str] = "compressed-tensors"
    holds_g_idx: ClassVar[bool] = False  # the format has weight_g_idx, but its current readers refuse it
    tensors: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )
    holds_embeddings: ClassVar[bool] = True
    config_names_layers: ClassVar[bool] = True

    def why_not(self, scheme: QuantScheme, shape: tuple[int, int] | None = None) -> str | None:  # noqa: ARG002
        """See :class:`quantkit.formats.base.CheckpointFormat`; every weight-only scheme, and W8A8 per channel."""
        if scheme.act_bits is None or (scheme.bits == _INT8_BITS and scheme.group_size is None):
            return None
        return f"8-bit activations go with 8-bit weights and one scale per channel in {_INT8}: write w8a8_channel"

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.CheckpointFormat`.

        Raises:
            SchemeError: reordered groups (g_idx), which the current readers of the format refuse.
        """
        if q.g_idx is not None:
            raise SchemeError(message(self.name, "reordered groups (g_idx) are not written", "use static groups"))
        reason = self.why_not(q.scheme)
        if reason is not None:
            raise SchemeError(message(self.name, f"{q.scheme} is not written", reason))
        return _encode_packed(q) if q.scheme.act_bits is None else _encode_int8(q)

    def decode(
        self, where: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """See :class:`quantkit.formats.base.CheckpointFormat`."""
        reason = scheme.why_not(shape[1])
        if reason is not None:
            raise CheckpointError(f"{where}: {reason}")
        return (_decode_packed if scheme.act_bits is None else _decode_int8)(where, tensors, scheme, shape)

    def write_config(
        self,
        schemes: Mapping[str, QuantScheme],
        skipped: tuple[str, ...],
        *,
        reordered: bool = False,  # noqa: ARG002 - encode refuses it
    ) -> dict[str, Any]:
        """See :class:`quantkit.formats.base.CheckpointFormat`.

        The commonest scheme targets the class Linear, the others their modules by name: readers take the first
        group that matches, and look at names before classes. The output head and embeddings are always named.
        """
        counts: dict[QuantScheme, int] = {}
        for scheme in schemes.values():
            counts[scheme] = counts.get(scheme, 0) + 1
        order = sorted(counts, key=lambda scheme: counts[scheme])
        groups = {}
        for index, scheme in enumerate(order):
            names = [n for n, s in schemes.items() if s == scheme]
            if scheme is order[-1]:
                # The engines' output head is of another class (and embeddings are): only its name reaches it.
                names = ["Linear", *(n for n in names if not IN_BLOCK.search(n))]
            groups[f"group_{index}"] = {
                "targets": names,
                "weights": _weight_arguments(scheme),
                "input_activations": None if scheme.act_bits is None else _activation_arguments(scheme),
                "output_activations": None,
                "format": _layout(scheme),
            }
        layouts = {_layout(scheme) for scheme in counts}
        return {
            "quant_method": self.name,
            "version": _VERSION,
            "format": layouts.pop() if len(layouts) == 1 else _MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(skipped),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "config_groups": groups,
        }

    def config_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:  # noqa: ARG002
        """See :class:`quantkit.formats.base.CheckpointFormat`; none."""
        return {}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See :class:`quantkit.formats.base.CheckpointFormat`."""
        return config.get("quant_method") == self.name

    def read_config(
        self, config: Mapping[str, Any], linears: tuple[str, ...], embeddings: tuple[str, ...] = ()
    ) -> dict[str, QuantScheme]:
        """See :class:`quantkit.formats.base.CheckpointFormat`."""
        _check_layouts(config)
        try:
            parsed = _Config.model_validate(dict(config))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (_WHERE, *first["loc"])))
            raise CheckpointError(
                message(
                    where,
                    str(first["msg"]),
                    f"quantkit reads weight-only integer groups of format {_PACKED} and W8A8 groups of {_INT8}",
                )
            ) from error
        for key in ("transform_config", "sparsity_config", "kv_cache_scheme"):
            if getattr(parsed, key):
                fix = "quantkit runs quantized weights alone"
                raise UnreadFormatError(message(f"{_WHERE}.{key}", "is not run", fix))
        groups = [(group, _scheme(name, group, parsed.format)) for name, group in parsed.config_groups.items()]
        patterns = Patterns(_WHERE)
        ignored = Targets(tuple(parsed.ignore or ()), patterns)
        ranked = [(Targets(tuple(group.targets), patterns), scheme) for group, scheme in groups]
        found: dict[str, QuantScheme] = {}
        for kind, modules in (("Linear", linears), ("Embedding", embeddings)):
            for module in () if ignored.has_name(kind) else modules:
                names = (module, *fused_names(module))  # configs made for vLLM may name what it fuses
                if any(name in ignored for name in names):
                    continue
                scheme = first_match(ranked, names, kind)
                if scheme is not None:
                    found[module] = scheme
        return found


def _check_layouts(config: Mapping[str, Any]) -> None:
    """Refuse the layouts of the same package that quantkit does not read by name, before their details."""
    groups = config.get("config_groups")
    stated = [("", config.get("format"))]
    if isinstance(groups, dict):
        stated += [
            (f".config_groups.{name}", one.get("format")) for name, one in groups.items() if isinstance(one, dict)
        ]
    for where, layout in stated:
        if isinstance(layout, str) and layout not in (_PACKED, _INT8, _MIXED):
            fix = f"quantkit reads {_PACKED} (weights of 2 to 8 bits) and {_INT8} (W8A8)"
            raise UnreadFormatError(message(f"{_WHERE}{where}.format", f"{layout!r} is not read", fix))


def _encode_packed(q: QuantizedTensor) -> dict[str, Tensor]:
    bits = q.scheme.bits
    tensors = {
        "weight_packed": pack(q.codes, bits),
        "weight_scale": q.scale.contiguous(),
        "weight_shape": torch.tensor([q.out_features, q.in_features], dtype=torch.int64, device=q.codes.device),
    }
    if not q.scheme.symmetric:
        tensors["weight_zero_point"] = pack(q.zero_point.T, bits).T.contiguous()
    return tensors


def _decode_packed(
    where: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> QuantizedTensor:
    rows, columns = shape
    if "weight_g_idx" in tensors:
        raise CheckpointError(message(f"{where}.weight_g_idx", "reordered groups", "quantkit reads contiguous groups"))
    groups = scheme.num_groups(columns)
    expected: dict[str, tuple[list[int], tuple[torch.dtype, ...]]] = {
        "weight_packed": ([rows, packed_words(columns, scheme.bits)], (torch.int32,)),
        "weight_scale": ([rows, groups], FLOATS),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = ([packed_words(rows, scheme.bits), groups], (torch.int32,))
    for name, (size, dtypes) in expected.items():
        check_tensor(f"{where}.{name}", tensors.get(name), size, dtypes)
    stored = tensors.get("weight_shape")
    if stored is not None and stored.flatten().tolist() != [rows, columns]:
        raise CheckpointError(
            message(
                f"{where}.weight_shape",
                f"says {stored.flatten().tolist()}",
                f"the model's layer is {[rows, columns]}",
            )
        )
    scale = tensors["weight_scale"]
    check_scale(f"{where}.weight_scale", scale)
    if scheme.symmetric:
        zero_point = torch.full((rows, groups), scheme.mid, dtype=torch.uint8, device=scale.device)
    else:
        zero_point = unpack(tensors["weight_zero_point"].T.contiguous(), scheme.bits, rows).T.contiguous()
    return QuantizedTensor(unpack(tensors["weight_packed"], scheme.bits, columns), scale, zero_point, scheme)


def _encode_int8(q: QuantizedTensor) -> dict[str, Tensor]:
    # Bytes wrap around: the same bits, read as signed, are the code minus 128.
    tensors = {"weight": (q.codes - q.scheme.mid).view(torch.int8), "weight_scale": q.scale.contiguous()}
    if not q.scheme.symmetric:
        tensors["weight_zero_point"] = (q.zero_point - q.scheme.mid).view(torch.int8)
    if q.act_scale is not None:
        shipped = torch.tensor([q.act_scale], dtype=q.scale.dtype, device=q.scale.device)
        # A scale read from another file may have more digits than this weight's scales.
        exact = shipped.is_meta or float(shipped) == q.act_scale
        tensors["input_scale"] = (
            shipped if exact else torch.tensor([q.act_scale], dtype=torch.float32, device=q.scale.device)
        )
    return tensors


def _decode_int8(
    where: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> QuantizedTensor:
    rows, columns = shape
    check_tensor(f"{where}.weight", tensors.get("weight"), [rows, columns], (torch.int8,))
    check_tensor(f"{where}.weight_scale", tensors.get("weight_scale"), [rows, 1], FLOATS)
    scale = tensors["weight_scale"]
    check_scale(f"{where}.weight_scale", scale)
    if scheme.symmetric:
        _check_no_zero_point(where, "weight_zero_point", tensors)
        zero_point = torch.full((rows, 1), scheme.mid, dtype=torch.uint8, device=scale.device)
    else:
        check_tensor(f"{where}.weight_zero_point", tensors.get("weight_zero_point"), [rows, 1], (torch.int8,))
        zero_point = tensors["weight_zero_point"].contiguous().view(torch.uint8) + scheme.mid
    act_scale = None
    if scheme.act_static:
        check_tensor(f"{where}.input_scale", tensors.get("input_scale"), [1], FLOATS)
        _check_no_zero_point(where, "input_zero_point", tensors)
        act_scale = float(tensors["input_scale"])
        if not 0 < act_scale < float("inf"):
            raise CheckpointError(message(f"{where}.input_scale", f"is {act_scale}", "write the checkpoint again"))
    codes = tensors["weight"].contiguous().view(torch.uint8) + scheme.mid
    return QuantizedTensor(codes, scale, zero_point, scheme, act_scale=act_scale)


def _check_no_zero_point(where: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Symmetric groups need no zero points; some writers store them all the same, as zeros."""
    if name in tensors and bool((tensors[name] != 0).any()):
        raise CheckpointError(
            message(f"{where}.{name}", "is not zero", "config.json says symmetric; write the checkpoint again")
        )


def _weight_arguments(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
        "scale_dtype": None,
        "zp_dtype": None if scheme.symmetric else "torch.int8",
    }


def _activation_arguments(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.act_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor" if scheme.act_static else "token",
        "group_size": None,
        "dynamic": not scheme.act_static,
        "actorder": None,
        "observer": "minmax" if scheme.act_static else None,
        "observer_kwargs": {},
        "block_structure": None,
        "scale_dtype": None,
        "zp_dtype": None,
    }


def _layout(scheme: QuantScheme) -> str:
    return _PACKED if scheme.act_bits is None else _INT8


def _scheme(name: str, group: _Group, default_format: str) -> QuantScheme:
    where = f"{_WHERE}.config_groups.{name}"
    if group.output_activations is not None:
        raise CheckpointError(message(where, "quantizes outputs", "quantkit quantizes weights and inputs"))
    inputs, layout = group.input_activations, group.format or default_format
    if inputs is None and layout != _PACKED:
        raise CheckpointError(
            message(where, f"format {layout!r} of a weight-only group", f"quantkit reads {_PACKED} there")
        )
    if inputs is not None and layout != _INT8:
        raise CheckpointError(
            message(where, f"format {layout!r} with quantized activations", f"quantkit reads {_INT8} there")
        )
    if inputs is not None and (inputs.strategy == "token") != inputs.dynamic:
        what = f"activations with strategy {inputs.strategy!r} and dynamic {inputs.dynamic}"
        raise CheckpointError(message(where, what, "quantkit runs dynamic 'token' and static 'tensor'"))
    actorder = group.weights.actorder
    if str(actorder or "weight").lower() not in ("weight", "static"):
        raise CheckpointError(
            message(where, f"actorder {actorder!r} (reordered groups)", "quantkit reads contiguous groups")
        )
    size = group.weights.group_size if group.weights.strategy == "group" else None
    if group.weights.strategy == "group" and size is None:
        raise CheckpointError(message(where, "strategy 'group' without group_size", "state the group size"))
    try:
        scheme = QuantScheme(
            group.weights.num_bits,
            size,
            symmetric=group.weights.symmetric,
            act_bits=None if inputs is None else inputs.num_bits,
            act_static=inputs is not None and not inputs.dynamic,
        )
    except SchemeError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if layout == _INT8 and (scheme.bits != _INT8_BITS or size is not None):
        raise CheckpointError(
            message(where, f"{scheme} in {_INT8}", "quantkit reads 8-bit weights with one scale per channel there")
        )
    return scheme
