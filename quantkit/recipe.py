"""Recipes: what to quantize, how, and with which calibration data. Strict YAML in, complete YAML out."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError, to_json

from quantkit.calibration import CalibrationSpec
from quantkit.errors import RecipeError, message
from quantkit.scheme import QuantScheme, parse_scheme
from quantkit.solvers import GPTQ, RTN, AutoRound, Solver
from quantkit.transforms import AWQ, TRANSFORMS, Rotation, SmoothQuant, check_order
from quantkit.tuning import BlockTuning

_MAX_BYTES = 2**20
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)i?B?", re.IGNORECASE)


def _scheme(value: object) -> object:
    return parse_scheme(value) if isinstance(value, str) else value


def _method(value: object) -> object:
    """A bare name is that method with its defaults; an unknown one is left for the validator to refuse."""
    if isinstance(value, dict) and "name" not in value:
        raise ValueError("the method has no name; add name: gptq, name: rtn or name: autoround")
    if not isinstance(value, str):
        return value
    return next((solver() for solver in _METHODS.values() if solver.name == value), {"name": value})


def _transform(value: object) -> object:
    """A bare name is that transform with its defaults; an unknown one is left for the validator to refuse."""
    if isinstance(value, dict) and "name" not in value:
        raise ValueError(f"the transform has no name; add name: {' or '.join(one.name for one in TRANSFORMS)}")
    if not isinstance(value, str):
        return value
    return next((one() for one in TRANSFORMS if one.name == value), {"name": value})


def parse_size(value: object) -> object:
    """Bytes of a size such as ``2GiB``, ``512M`` (powers of 1024) or a plain number; other types pass through."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"{value!r} is not a size; write a number of bytes or something like 2GiB")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


_METHODS: dict[str, type[RTN | GPTQ | AutoRound]] = {"rtn": RTN, "gptq": GPTQ, "autoround": AutoRound}
SchemeField = Annotated[QuantScheme, BeforeValidator(_scheme)]
TransformField = Annotated[
    Annotated[SmoothQuant | AWQ | Rotation, Field(discriminator="name")], BeforeValidator(_transform)
]
MethodField = Annotated[Annotated[RTN | GPTQ | AutoRound, Field(discriminator="name")], BeforeValidator(_method)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Rule(_Strict):
    """What to do with the linear layers that ``match`` names; the first rule that matches a layer decides.

    A rule that matches no linear layer means the embeddings that it matches.

    Attributes:
        match: a module name, a glob (``*.down_proj``) or a regular expression over the whole name (``re:.*k_proj``).
        skip: leave these layers as they are.
        scheme: their scheme; None is the recipe's.
        method: their method; None is the recipe's.
    """

    match: str = Field(min_length=1)
    skip: bool = False
    scheme: SchemeField | None = None
    method: MethodField | None = None

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(
                    f"{value!r} is not a regular expression ({error}); write one that Python's re reads"
                ) from error
        return value

    @model_validator(mode="after")
    def _decides(self) -> Rule:
        if self.skip and (self.scheme is not None or self.method is not None):
            raise ValueError("skip: true leaves no room for a scheme or method; remove one of them")
        if not self.skip and self.scheme is None and self.method is None:
            raise ValueError("the rule does nothing; add skip: true, a scheme or a method")
        return self

    def matches(self, name: str) -> bool:
        """Whether this rule means the module ``name``."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.match)


class Recipe(_Strict):
    """Everything that decides the bytes of the output, besides the model itself.

    Attributes:
        scheme: bits, group size and symmetry of the weights.
        method: the solver and its options.
        transforms: changes of the dense model before the method that leave its function as it is, in this order:
            rotation, smoothquant, awq.
        tuning: what is learned after the solvers, block by block; None: nothing.
        rules: exceptions by module name; the first match wins. Layers outside of the decoder blocks (lm_head)
            and embeddings are quantized only when a rule asks.
        calibration: the tokens that the method measures with; not read by rtn.
        format: the on-disk format.
        true_sequential: measure the layers that read one input (q/k/v, then o, then gate/up, then down) when those
            before them in the block are quantized already: a pass for each, in place of one for the block.
        dtype: of the forward passes and of the scales on disk; ``auto`` is the model's own.
        expert_tokens_per_column: an expert's layer that saw fewer calibration tokens than this for each of its input
            columns (or none) is rounded to nearest, where the method measures, and the report says so. With fewer
            tokens than columns a Hessian is singular, and GPTQ fits their noise.
        activation_memory: bytes of activations between blocks that may lie in memory; more go to a file.
        min_share: the run is refused when less than this share (0 to 1) of all parameters would be quantized.

    Raises:
        pydantic.ValidationError: wrong values, when built directly; :func:`make_recipe` raises RecipeError.
    """

    scheme: SchemeField = QuantScheme(4, 128)
    method: MethodField = GPTQ()
    transforms: tuple[TransformField, ...] = ()
    tuning: BlockTuning | None = None
    rules: tuple[Rule, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    true_sequential: bool = False
    format: Literal["compressed-tensors", "gptq", "gptq_v2", "awq"] = "compressed-tensors"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    expert_tokens_per_column: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    activation_memory: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] = 2 * 2**30
    min_share: float = Field(default=0.0, ge=0, le=1)

    @field_validator("transforms")
    @classmethod
    def _composes(cls, value: tuple[SmoothQuant | AWQ | Rotation, ...]) -> tuple[SmoothQuant | AWQ | Rotation, ...]:
        check_order(value)
        return value

    def choice(self, name: str, in_block: bool) -> tuple[QuantScheme, Solver] | None:
        """Scheme and solver of the linear layer ``name``; None leaves it as it is."""
        rule = next((r for r in self.rules if r.matches(name)), None)
        if rule is None:
            return (self.scheme, self.method) if in_block else None
        return None if rule.skip else (rule.scheme or self.scheme, rule.method or self.method)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return TypeAdapter(Recipe).dump_python(self, mode="json")  # type: ignore[no-any-return]

    def to_yaml(self, heading: str = "") -> str:
        """The complete recipe as YAML; loading it gives an equal recipe."""
        comment = "".join(f"# {line}\n" for line in heading.splitlines())
        return comment + yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_recipe(path: Path) -> dict[str, Any]:
    """Read and check a recipe file; what it does not state is not in the result.

    Raises:
        RecipeError: not readable, not YAML, or not a recipe; with the line.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(
                message(str(path), f"has {path.stat().st_size} bytes", f"a recipe has at most {_MAX_BYTES}")
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(message(str(path), f"cannot be read ({error})", "give a recipe file in YAML")) from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> dict[str, Any]:
    """Check a recipe's YAML text; see :func:`load_recipe`."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise RecipeError(message(where, "has a YAML alias (*name)", "write the value out"))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(node, where)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(message(where, f"is not YAML ({error})", "see recipes/ for complete examples")) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(message(where, "is not a mapping of keys to values", "see recipes/ for complete examples"))
    make_recipe(value, where, node)
    return value


def make_recipe(value: Mapping[str, Any], where: str = "recipe", node: yaml.Node | None = None) -> Recipe:
    """A recipe from plain values.

    Args:
        value: the keys that differ from the defaults.
        where: what the values came from, for messages.
        node: the YAML nodes that the values came from, for line numbers.

    Raises:
        RecipeError: the first thing that is wrong, with the nearest allowed key where one is unknown.
    """
    try:
        # As JSON, because strict validation takes a mapping for a dataclass and a list for a tuple only there.
        return Recipe.model_validate_json(to_json(dict(value)))
    except ValidationError as error:
        raise RecipeError(_explain(error, where, node)) from error
    except PydanticSerializationError as error:
        raise RecipeError(
            message(where, f"holds a value that is not plain ({error})", "use numbers, strings, lists and mappings")
        ) from error


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` on top; mappings are merged key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _explain(error: ValidationError, where: str, node: yaml.Node | None) -> str:
    found = error.errors()
    # A misspelled key that is needed is both unknown and missing: the first tells more.
    first = next((e for e in found if e["type"] in _UNKNOWN), found[0])
    loc, method = _place(first["loc"])
    line = _line(node, loc)
    place = f"{where}, line {line}" if line is not None else where
    key = ".".join(str(part) for part in loc)
    if first["type"] in _UNKNOWN:
        allowed = _siblings(loc, method)
        near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
        return message(place, f"unknown key {key!r}", hint)
    what = str(first["msg"]).removeprefix("Value error, ").removeprefix(f"{key}: ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    if first["type"] == "value_error":  # our own words, which say what to do
        return f"{place}: {key}: {what}{shown}"
    return message(place, f"{key}: {what}{shown}", "see recipes/ for complete examples")


def _place(loc: Sequence[int | str]) -> tuple[tuple[int | str, ...], str | None]:
    """A place in the recipe, without the union tag that pydantic puts behind ``method`` or the number of one of the
    ``transforms``, and that tag.
    """
    for index, part in enumerate(loc[:-1]):
        tag = index + (1 if part == "method" else 2)
        if part in ("method", "transforms") and tag < len(loc):
            return (*loc[:tag], *loc[tag + 1 :]), str(loc[tag])
    return tuple(loc), None


def _siblings(loc: Sequence[object], method: str | None) -> list[str]:
    """The keys that are allowed where the unknown key ``loc[-1]`` stands; ``method`` is the method or transform that it
    belongs to.
    """
    if len(loc) == 1:
        return list(Recipe.model_fields)
    owners: dict[str, list[str]] = {
        "rules": list(Rule.model_fields),
        "calibration": [f.name for f in fields(CalibrationSpec)],
        "scheme": [f.name for f in fields(QuantScheme)],
        "method": [f.name for f in fields(_METHODS.get(method or "", RTN))],
        "transforms": [f.name for one in TRANSFORMS if one.name == method for f in fields(one)],
        "tuning": [f.name for f in fields(BlockTuning)],
    }
    return next((owners[str(part)] for part in reversed(loc[:-1]) if str(part) in owners), [])


def _line(node: yaml.Node | None, loc: Sequence[object]) -> int | None:
    if node is None:
        return None
    line = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _refuse_duplicates(node: yaml.Node | None, where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(
                    message(
                        f"{where}, line {key.start_mark.line + 1}", "a key is a list or a mapping", "use plain words"
                    )
                )
            if key.value in seen:
                raise RecipeError(
                    message(f"{where}, line {key.start_mark.line + 1}", f"key {key.value!r} stands twice", "keep one")
                )
            seen.add(key.value)
            _refuse_duplicates(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, where)
