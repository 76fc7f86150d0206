"""Regular expressions from strangers' configs (``re:`` targets, rules by module name), matched in bounded time.

A pattern of twenty characters can keep a backtracking matcher busy for years. So they are matched by the package
``regex``, which can be stopped, and what one config may spend on all of its patterns and names is bounded. The syntax
is the part of Python's ``re`` that both packages read alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import regex

from quantkit.errors import CheckpointError, message

_MAX_CHARACTERS = 1000
_MAX_PATTERNS = 10_000
_MAX_REPEATS = 4096  # the product of all counts {m,n}: nested ones multiply when they are compiled
_MAX_GROUPS = 100  # also those inside each other: how many Python's parser bears depends on what else runs
_SECONDS = 5.0
_GROUP = re.compile(r"\(\?(?!:|=|!|<=|<!|i\)|P<)")
_COUNT = re.compile(r"\{(?:(\d{1,9})?(?:,(\d{1,9})?)?\})?")  # a lone brace is a count of none
T = TypeVar("T")
_ELSEWHERE = ("[[", "--", "&&", "~~", "||")  # nested sets and their operators


class Patterns:
    """The regular expressions of one file, each compiled once.

    Args:
        where: the file and key, for error messages.
        seconds: CPU time that compiling and matching may take in all.
    """

    def __init__(self, where: str, seconds: float = _SECONDS) -> None:
        self._where = where
        self._left = self._seconds = seconds
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, name: str) -> bool:
        """``re.match``: whether the pattern fits the beginning of a name.

        Raises:
            CheckpointError: not a regular expression, one beyond the syntax that is read, or too slow to match.
        """
        start = time.thread_time()
        try:
            found = self._regex(pattern).match(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            self._left = 0.0
        else:
            self._left -= time.thread_time() - start
        if self._left <= 0:
            what = f"matching its regular expressions takes more than {self._seconds:g} s, the last {_short(pattern)}"
            raise CheckpointError(
                message(self._where, what, "write them without nested repetition, or name the modules")
            )
        return found

    def _regex(self, pattern: str) -> Any:
        found = self._compiled.get(pattern)
        if found is None:
            reason = _why_not(pattern)
            if reason is None and len(self._compiled) >= _MAX_PATTERNS:
                reason = f"is one of more than {_MAX_PATTERNS} regular expressions"
            if reason is not None:
                raise CheckpointError(message(self._where, f"{_short(pattern)} {reason}", "repair config.json"))
            found = self._compiled[pattern] = regex.compile(pattern)
        return found


class Targets:
    """Names and ``re:`` patterns, as compressed-tensors and others list modules.

    Args:
        targets: each a name, or ``re:`` and a regular expression that fits the beginning of a name.
        patterns: what matches them.
    """

    def __init__(self, targets: tuple[str, ...], patterns: Patterns) -> None:
        self._expressions = tuple(t[3:] for t in targets if t.startswith("re:"))
        self._names = frozenset(t for t in targets if not t.startswith("re:"))
        self._patterns = patterns

    def __contains__(self, name: object) -> bool:
        """Whether it is listed by name or by a pattern."""
        return self.has_name(str(name)) or self.has_pattern(str(name))

    def has_name(self, name: str) -> bool:
        """Whether it is listed by name."""
        return name in self._names

    def has_pattern(self, name: str) -> bool:
        """Whether a pattern fits its beginning."""
        return any(self._patterns.match(expression, name) for expression in self._expressions)


def first_match(ranked: Sequence[tuple[Targets, T]], names: Sequence[str], kind: str) -> T | None:
    """What the first targets of a module stand for, as compressed-tensors ranks them: names, patterns, its class.

    Args:
        ranked: targets, and what they stand for.
        names: of the module; any of them may be listed.
        kind: its class.
    """
    by_name = (value for targets, value in ranked if any(map(targets.has_name, names)))
    by_pattern = (value for targets, value in ranked if any(map(targets.has_pattern, names)))
    by_class = (value for targets, value in ranked if targets.has_name(kind))
    return next((value for found in (by_name, by_pattern, by_class) for value in found), None)


def _why_not(pattern: str) -> str | None:
    """Why a pattern is not read; None when ``re`` and ``regex`` read it alike and compile it in no time."""
    if len(pattern) > _MAX_CHARACTERS:
        return f"has {len(pattern)} characters; at most {_MAX_CHARACTERS} are read"
    if pattern.count("(") > _MAX_GROUPS:
        return f"has {pattern.count('(')} opening brackets; at most {_MAX_GROUPS} are read"
    counts = [0 if found[0] == "{" else int(found[2] or found[1] or 1) for found in _COUNT.finditer(pattern)]
    if 0 in counts or prod(counts) > _MAX_REPEATS:
        return f"repeats by {{}} in other ways than a count, or more than {_MAX_REPEATS} times"
    if _GROUP.search(pattern) or any(mark in pattern for mark in _ELSEWHERE):
        return "has a group or set of a kind that is not read"
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    return None


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
