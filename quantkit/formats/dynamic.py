"""Exceptions by module name, as GPTQModel's ``dynamic`` states them: ``+:`` and a pattern changes the scheme of the
layers whose names it fits from the beginning, ``-:`` leaves them out, and the first rule that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from quantkit.arch import FUSED_GROUPS, fused_names
from quantkit.patterns import Patterns
from quantkit.scheme import QuantScheme

_LITERAL = re.compile(r"\^?((?:[\w-]|\\[.-])+)\$")  # a whole name, which needs no matcher


class Rules:
    """The rules of one config.

    Args:
        where: the file and key, for error messages.
        dynamic: pattern -> changed keys, in order; without ``+:`` or ``-:`` a pattern is as with ``+:``.
    """

    def __init__(self, where: str, dynamic: Mapping[str, Mapping[str, Any]]) -> None:
        self._matcher = Patterns(where)
        self._names: dict[str, int] = {}
        self._patterns: list[tuple[int, str]] = []
        self._found: list[Mapping[str, Any] | None] = []
        for index, (rule, changes) in enumerate(dynamic.items()):
            pattern = rule[2:] if rule.startswith(("+:", "-:")) else rule
            literal = _LITERAL.fullmatch(pattern)
            if literal is not None:
                self._names.setdefault(literal[1].replace("\\", ""), index)
            else:
                self._patterns.append((index, pattern))
            self._found.append(None if rule.startswith("-:") else changes)

    def of(self, name: str) -> Mapping[str, Any] | None:
        """The keys that the rules change for a layer, none where no rule fits; None: it is left out.

        A layer that engines fuse is looked for under the fused name too, for rules that were written for them.
        """
        fits = [index for index in (self._first(one) for one in (name, *fused_names(name))) if index is not None]
        return self._found[min(fits)] if fits else {}

    def _first(self, name: str) -> int | None:
        by_name = self._names.get(name)
        for index, pattern in self._patterns:
            if by_name is not None and by_name < index:
                break
            if self._matcher.match(pattern, name):
                return index
        return by_name


def layer_rules(
    schemes: Mapping[str, QuantScheme],
    base: QuantScheme,
    skipped: tuple[str, ...],
    changes: Callable[[QuantScheme], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The ``dynamic`` of a config: the layers left out, then those with another scheme than ``base``, by full names.

    Args:
        schemes: of the quantized layers by their names, or by ``re:`` patterns, which come last.
        base: what needs no rule.
        skipped: what is left out.
        changes: the keys of a rule for a scheme.
    """
    rules: dict[str, dict[str, Any]] = {f"-:{_whole(name)}": {} for name in (*skipped, *_fused(skipped))}
    other = {name: scheme for name, scheme in schemes.items() if scheme != base}
    named = {name: scheme for name, scheme in other.items() if not name.startswith("re:")}
    for scheme in dict.fromkeys(named.values()):
        names = tuple(name for name, one in named.items() if one == scheme)
        rules.update({f"+:{_whole(name)}": changes(scheme) for name in (*names, *_fused(names))})
    rules.update({f"+:{name[3:]}": changes(scheme) for name, scheme in other.items() if name.startswith("re:")})
    return rules


def _whole(name: str) -> str:
    return f"^{re.escape(name)}$"


def _fused(names: tuple[str, ...]) -> list[str]:
    """What engines call the matrices that they fuse of these layers, where all of a group's are among them."""
    there = set(names)
    found: list[str] = []
    for name in names:
        stem, _, leaf = name.rpartition(".")
        group = next((group for group in FUSED_GROUPS if leaf == group[0]), ())
        if group and all(f"{stem}.{member}" in there for member in group):
            found += fused_names(name)
    return found
