"""What is wrong with a checkpoint: one finding says where, what and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from quantkit.errors import QuantkitError, message

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        code: what kind of thing, in one or two words; a rule's id where a program refuses.
        severity: ``error``: it does not load, or not as what it was; ``warning``: it does, and holds too much;
            ``note``: nothing is wrong with it, and a program asks for something to be known.
        where: a file, a module or a tensor.
        what: what was found there.
        fix: what to do.
        source: where it is known from, for what programs do.
    """

    code: str
    severity: Severity
    where: str
    what: str
    fix: str
    source: str = ""

    def __str__(self) -> str:
        return message(self.where, self.what, self.fix)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)

    @property
    def rank(self) -> tuple[int, str, str]:
        """Errors first, then by kind and place."""
        return (get_args(Severity).index(self.severity), self.code, self.where)


def of_error(code: str, error: QuantkitError) -> Finding:
    """An error of a reader as a finding; its message is ``where: what; fix``."""
    where, _, rest = str(error).partition(": ")
    what, _, fix = rest.rpartition("; ")
    return Finding(code, "error", where, what or rest, fix if what else "repair or re-download it")
