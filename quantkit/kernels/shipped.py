"""The variants of the Triton kernels that are shipped, named, for inspection ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels.planes import COLUMNS, ROWS, num_atoms, num_planes, num_slots, num_units
from quantkit.kernels.tiles import SMS, Tile, choose_splits, choose_tile, kernel_group, trips_of

_SIZE = 4096
_TOKENS = (8, 16, 32)
_DTYPES = ("float16", "bfloat16")
_GROUPS = {2: (128, 64), 3: (128, 64), 4: (128, 64, 32, None), 8: (None, 128)}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it runs for a weight of 4096 x 4096.

    Attributes:
        bits: of the codes.
        max_m: the most rows of x that it is chosen for in one program: 8, 16 or 32.
        dtype: of x: float16 or bfloat16.
        symmetric: whether there are no zero points.
        group_size: columns that share a scale, or None for one scale per channel.
        cc: compute capability, 80 is 8.0.
        safe: codes of float16 as 1024 + code, the form for GPUs that lose subnormals.
        in_features: columns; a number that 128 does not divide has a shorter trip.
    """

    bits: int
    max_m: int
    dtype: str
    symmetric: bool
    group_size: int | None
    cc: int
    safe: bool = False
    in_features: int = _SIZE

    @property
    def kernel(self) -> str:
        """Such as w4a16."""
        return f"w{self.bits}a16"

    @property
    def name(self) -> str:
        """Unique among the shipped ones, and a file name."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        grid = "sym" if self.symmetric else "asym"
        ends = ("_safe" if self.safe else "") + ("" if self.in_features == _SIZE else f"_k{self.in_features}")
        return f"{self.kernel}_{group}_{grid}_{self.dtype}_m{self.max_m}{ends}_sm{self.cc}"

    @property
    def tile(self) -> Tile:
        """What the launch would choose."""
        return choose_tile(self.max_m, self.in_features, self.bits, kernel_group(self.group_size))

    @property
    def splits(self) -> int:
        """What the launch would choose on the GPU of :data:`quantkit.kernels.tiles.SMS`."""
        wanted = choose_splits(self.tile, self.max_m, _SIZE, self.in_features, self.bits, SMS[self.cc])
        trips, per_split = trips_of(self.tile, self.in_features, wanted)
        return -(-trips // per_split)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: token blocks, row blocks, splits of K."""
        blocks = -(-num_units(_SIZE, self.bits) * ROWS // self.tile.rows)
        return (1, blocks, self.splits)

    @property
    def weights_per_trip(self) -> int:
        """Weights that one program handles in one trip of its main loop."""
        return self.tile.rows * num_planes(self.bits) * self.tile.columns

    @property
    def bytes_per_weight(self) -> float:
        """Of the packed form, filled up: words, scales and zero points."""
        units, columns = num_units(_SIZE, self.bits), num_atoms(self.in_features) * COLUMNS
        group = kernel_group(self.group_size)
        groups = columns // group if group else 1
        words = units * ROWS * columns * 2
        scale = units * ROWS * num_slots(self.bits) * groups * 2
        zeros = 0 if self.symmetric else units * ROWS * -(-groups // 2) * 4
        return (words + scale + zeros) / (_SIZE * self.in_features)

    @property
    def floor_bytes_per_weight(self) -> float:
        """Codes, scales of 16 bits and zero points at their widths; the codes' own bits, whatever is stored."""
        columns = self.group_size or self.in_features
        return (self.bits + (16 + (0 if self.symmetric else self.bits)) / columns) / 8


def shipped(compute_capabilities: tuple[int, ...] = tuple(SMS)) -> tuple[Variant, ...]:
    """Every variant for a weight of 4096 x 4096, the fast form."""
    return tuple(
        Variant(bits, max_m, dtype, symmetric, group_size, cc)
        for cc in compute_capabilities
        for bits, groups in _GROUPS.items()
        for group_size in groups
        for symmetric in (True, False)
        for dtype in _DTYPES
        for max_m in _TOKENS
        if choose_tile(max_m, _SIZE, bits, kernel_group(group_size)).tokens == max_m
    )
