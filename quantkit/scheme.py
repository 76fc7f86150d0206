"""What a quantized layer looks like: bits, groups, symmetry, activations. No tensors, no model-dependent defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quantkit.errors import SchemeError, message

MIN_BITS, MAX_BITS = 2, 8
_ACT_BITS = 8
_NAME = re.compile(
    r"w(?P<bits>\d{1,3})a(?P<act>\d{1,3})(?:_(?P<static>static))?"
    r"(?:_(?:g(?P<group>\d{1,9})|(?P<channel>channel)))?(?:_(?P<sym>sym|asym))?"
)


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Integer quantization of a weight ``[out_features, in_features]`` and, where asked, of what it is multiplied by.

    Quantized activations are symmetric. Their scale is one per token, found anew from each token (dynamic), or one
    per tensor, found by calibration (static).

    Attributes:
        bits: width of one code, 2 to 8.
        group_size: input columns that share a scale; None is one scale per output channel.
        symmetric: True fixes the zero point at ``2**(bits-1)``.
        act_bits: width of the activations: 8, or None, which keeps them in floating point ("a16").
        act_static: True is the static activation scale; only with ``act_bits``.

    Raises:
        SchemeError: a value outside of these ranges.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    act_bits: int | None = None
    act_static: bool = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(
                message("scheme", f"bits={self.bits!r} is not a width", f"choose {MIN_BITS} to {MAX_BITS}")
            )
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1
        ):
            raise SchemeError(
                message(
                    "scheme",
                    f"group_size={self.group_size!r} is not a number of columns",
                    "choose a positive integer, or null for one scale per output channel",
                )
            )
        if not isinstance(self.symmetric, bool):
            raise SchemeError(
                message("scheme", f"symmetric={self.symmetric!r} is not a truth value", "choose true or false")
            )
        if self.act_bits is not None and (isinstance(self.act_bits, bool) or self.act_bits != _ACT_BITS):
            raise SchemeError(
                message(
                    "scheme",
                    f"act_bits={self.act_bits!r} is not supported",
                    f"choose {_ACT_BITS} (a8), or null, which keeps activations in floating point (a16)",
                )
            )
        if not isinstance(self.act_static, bool):
            raise SchemeError(
                message("scheme", f"act_static={self.act_static!r} is not a truth value", "choose true or false")
            )
        if self.act_static and self.act_bits is None:
            raise SchemeError(
                message("scheme", "act_static=True without quantized activations", f"set act_bits: {_ACT_BITS} too")
            )

    @property
    def levels(self) -> int:
        """Number of codes: ``2**bits``."""
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The zero point of a symmetric grid: ``2**(bits-1)``."""
        return 1 << (self.bits - 1)

    @property
    def weight_only(self) -> QuantScheme:
        """The same grid for the weight, with activations in floating point: what a solver is asked for."""
        return self if self.act_bits is None else replace(self, act_bits=None, act_static=False)

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share a scale in a layer with ``in_features`` columns."""
        return in_features if self.group_size is None else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Scales per output row.

        Raises:
            SchemeError: the group size does not divide ``in_features``.
        """
        reason = self.why_not(in_features)
        if reason is not None:
            raise SchemeError(reason)
        return in_features // self.columns_per_group(in_features)

    def why_not(self, in_features: int) -> str | None:
        """Why a layer with ``in_features`` columns cannot have this scheme; None when it can."""
        if self.group_size is None or in_features % self.group_size == 0:
            return None
        return (
            f"in_features={in_features} is not a multiple of group_size={self.group_size}; "
            f"choose a divisor ({', '.join(map(str, legal_group_sizes(in_features)))}) or group_size=null"
        )

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight: codes, scales and, when asymmetric, packed zero points."""
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead / self.columns_per_group(in_features)

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        activations = "a16" if self.act_bits is None else f"a{self.act_bits}{'_static' if self.act_static else ''}"
        return f"w{self.bits}{activations}_{group}_{'sym' if self.symmetric else 'asym'}"


def legal_group_sizes(in_features: int, smallest: int = 16, largest: int = 256) -> tuple[int, ...]:
    """Divisors of ``in_features`` that are usual as group sizes: the multiples of 8, or all where there are none."""
    divisors = [d for d in range(smallest, min(largest, in_features) + 1) if in_features % d == 0]
    return tuple(d for d in divisors if d % 8 == 0) or tuple(divisors) or (in_features,)


def parse_scheme(name: str) -> QuantScheme:
    """The scheme that a name such as ``w4a16``, ``w4a16_g64``, ``w3a16_g128_asym`` or ``w8a8_static`` means.

    Without a group, widths below 8 have groups of 128 and 8 bits one scale per channel, as is usual for these
    names; without ``sym`` or ``asym`` the grid is symmetric; without ``static`` 8-bit activations are dynamic.

    Raises:
        SchemeError: not such a name.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None:
        raise SchemeError(
            message(
                "scheme",
                f"{name!r} is not a scheme",
                "write w<bits>a16 or w<bits>a8[_static], then [_g<size>|_channel][_sym|_asym], such as w4a16_g128",
            )
        )
    bits, act = int(found["bits"]), int(found["act"])
    group = None if found["channel"] or (found["group"] is None and bits >= MAX_BITS) else int(found["group"] or 128)
    return QuantScheme(
        bits,
        group,
        symmetric=found["sym"] != "asym",
        act_bits=None if act == 16 else act,
        act_static=found["static"] is not None,
    )
