"""Configs of GPTQ and AWQ checkpoints, as AutoGPTQ, GPTQModel, AutoAWQ and AutoRound write them.

They say how layers are packed; which layers are, the tensors tell: a model whose config says nothing of its routers has
them unquantized all the same. So a scheme is given for every layer of the decoder blocks that no rule leaves out, and
for those outside (the head) where the config says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import CheckpointError, SchemeError, UnreadFormatError, message
from quantkit.formats.dynamic import Rules
from quantkit.scheme import QuantScheme

IN_BLOCK = re.compile(r"\.\d+\.")
"""The module names of decoder blocks hold their index."""

_WHERE = "config.json: quantization_config"
_AUTOROUND = ("auto-round", "auto_round", "intel/auto-round", "autoround")
_LAYOUTS = {  # AutoRound's packing_format -> format; its own has the zero points as they are and no g_idx
    "auto": "gptq",
    "auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_round:auto_awq": "awq",
}
_UNQUANTIZED_BITS = 16


class _Changes(BaseModel):
    """One rule; keys that do not change the decoded weight are let through."""

    model_config = ConfigDict(extra="ignore")
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    data_type: str = "int"
    act_bits: int | None = None


class _Packed(BaseModel):
    """What the programs' configs have in common, under the names of any of them."""

    model_config = ConfigDict(extra="ignore")
    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(validation_alias=AliasChoices("group_size", "q_group_size"))
    sym: bool | None = None
    zero_point: bool | None = None
    data_type: str = "int"
    act_bits: int | None = None
    pack_dtype: str = "int32"
    lm_head: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    extra_config: dict[str, dict[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = None


def layout_of(config: Mapping[str, Any]) -> str | None:
    """``gptq``, ``gptq_v2`` or ``awq``; None for a config of another family.

    Raises:
        CheckpointError: GPTQ or AWQ in a layout that quantkit does not read, which is named.
    """
    method = str(config.get("quant_method") or "").lower()
    if method in _AUTOROUND:
        return _known("packing_format", config.get("packing_format", "auto"), _LAYOUTS)
    if method == "awq" or (not method and "w_bit" in config):
        version = config.get("version", config.get("format"))
        return _known("version", version or "gemm", {"gemm": "awq"})
    if method == "gptq" or (not method and "bits" in config and "group_size" in config):
        if config.get("is_marlin_format"):
            raise _unread("is_marlin_format", True, ("false",))
        stated = config.get("checkpoint_format", config.get("format"))
        return _known("checkpoint_format", stated or "gptq", {"gptq": "gptq", "gptq_v2": "gptq_v2"})
    return None


def read_packed_config(config: Mapping[str, Any], linears: tuple[str, ...]) -> dict[str, QuantScheme]:
    """The scheme of each layer that is quantized if its codes are there; see the module.

    Args:
        config: of a layout that :func:`layout_of` knows.
        linears: the linear modules' names.

    Raises:
        CheckpointError: malformed, or something that quantkit does not run.
    """
    parsed = _validated(_Packed, config, _WHERE)
    _check_weights(_WHERE, parsed.data_type, parsed.act_bits)
    if parsed.pack_dtype.lower() != "int32":
        raise _unread("pack_dtype", parsed.pack_dtype, ("int32",))
    symmetric = parsed.sym
    if symmetric is None:  # AWQ's word for asymmetric is zero_point, and where nothing is said it is
        symmetric = layout_of(config) != "awq" or parsed.zero_point is False
    rules = Rules(f"{_WHERE}.dynamic", {**(parsed.dynamic or {}), **_as_dynamic(parsed.extra_config or {})})
    head_rules = {rule for rule in parsed.extra_config or {} if not IN_BLOCK.search(rule)}
    kept = parsed.modules_to_not_convert or ()
    found: dict[str, QuantScheme] = {}
    for linear in linears:
        changes = rules.of(linear)
        outside = not IN_BLOCK.search(linear) and not parsed.lm_head and linear not in head_rules
        if changes is None or outside or any(_is_within(linear, module) for module in kept):
            continue
        found[linear] = _scheme(linear, parsed, symmetric, changes)
    return found


def _scheme(linear: str, parsed: _Packed, symmetric: bool, changes: Mapping[str, Any]) -> QuantScheme:
    where = f"{_WHERE}, {linear}"
    own = _validated(_Changes, changes, where)
    _check_weights(where, own.data_type, own.act_bits)
    size = parsed.group_size if own.group_size is None else own.group_size
    try:
        return QuantScheme(
            parsed.bits if own.bits is None else own.bits,
            None if size == -1 else size,
            symmetric=symmetric if own.sym is None else own.sym,
        )
    except SchemeError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _as_dynamic(extra: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """AutoRound's ``extra_config`` as rules: whole names or their ends first, then expressions that fit anywhere."""
    names: dict[str, Mapping[str, Any]] = {}
    expressions: dict[str, Mapping[str, Any]] = {}
    for key, changes in extra.items():
        bits = changes.get("bits")
        sign = "-:" if isinstance(bits, int) and bits >= _UNQUANTIZED_BITS else "+:"
        if re.fullmatch(r"[\w.-]+", key):
            names[f"{sign}^{re.escape(key)}$"] = changes
            if not IN_BLOCK.search(key):  # "lm_head" for "model.language_model.lm_head"
                expressions[rf"{sign}.*\.{re.escape(key)}$"] = changes
        else:
            expressions[f"{sign}.*(?:{key})"] = changes
    return {**names, **expressions}


def _is_within(linear: str, module: str) -> bool:
    """Whether a layer is a module that is left out, or in it: by its whole name, or by whole parts of it."""
    return f".{module}." in f".{linear}."


def _validated(model: type[Any], value: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (where, *first["loc"])))
        raise CheckpointError(
            message(place, str(first["msg"]), "quantkit reads integer weights packed as GPTQ or AWQ")
        ) from error


def _check_weights(where: str, data_type: str, act_bits: int | None) -> None:
    if data_type not in ("int", "int_sym", "int_asym"):
        raise UnreadFormatError(message(f"{where}.data_type", f"{data_type!r} is not read", "quantkit reads 'int'"))
    if act_bits is not None and act_bits < _UNQUANTIZED_BITS:
        what = f"{act_bits}-bit activations are not read in this format"
        raise UnreadFormatError(message(f"{where}.act_bits", what, "quantkit reads them in compressed-tensors"))


def _known(key: str, value: object, layouts: Mapping[str, str]) -> str:
    found = layouts.get(str(value).lower())
    if found is None:
        raise _unread(key, value, tuple(layouts))
    return found


def _unread(key: str, value: object, read: tuple[str, ...]) -> UnreadFormatError:
    return UnreadFormatError(message(f"{_WHERE}.{key}", f"{value!r} is not read", f"quantkit reads {', '.join(read)}"))
