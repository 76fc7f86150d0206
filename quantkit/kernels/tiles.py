"""Which tile of the Triton kernels a product gets: from sizes and the machine alone, by what machine code showed.

Chosen with `python -m quantkit.kernels.inspect`: two warps (on compute capability 9.0 four would select warp-group
products, which cost more at few rows of x); 32 or 64 rows of words (of W8 always 64, whose scales would else be copied
two bytes at a time); 128 columns a trip, so that a row of words is two full cache lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from quantkit.kernels.planes import COLUMNS, ROWS, num_atoms, num_planes, num_units

MOST_TOKENS = 64
"""From one row of x more on, tiles of the weight are made dense and multiplied by the library's product.

By the machine code a block of 32 rows takes 1.01 (A100) or 1.10 (H100) times the reading of the weight (W4, groups of
128), and a dense tile that stays in the L2 cache, twice as fast as the memory, 4.9 times: blocks win up to 128 rows by
that estimate. At 64 they win by half; a GPU may move it.
"""

_WIDE_TRIP = 128
_GROUPS = (128, 64, 32)  # columns that a tile may share a scale over, the widest first
_MOST_SPLITS = 32
_IN_FLIGHT = 40 << 10  # bytes on their way to one SM that hide the memory's latency, with room for barriers

SMS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148}
"""SMs of A100, RTX 3090, RTX 4090, H100 SXM and B200: for compiling without a GPU."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One choice for :func:`quantkit.kernels.triton_matvec.matvec_kernel`.

    Attributes:
        rows: rows of words of a program, a multiple of 16.
        tokens: rows of x of a program: 8, 16 or 32.
        tile_k: columns of one product, all of one group.
        tiles: products of a trip of the main loop.
        repeat: tiles of a group; 1 for one scale per channel.
        stages: trips whose copies are on their way or in use.
        warps: warps of a program.
    """

    rows: int
    tokens: int
    tile_k: int
    tiles: int
    repeat: int
    stages: int
    warps: int

    @property
    def columns(self) -> int:
        """Columns of a trip."""
        return self.tile_k * self.tiles

    @property
    def most_registers(self) -> int | None:
        """Of a thread, told to the assembler; None leaves it to its own aim, for which it spills a few of many."""
        return 255 if self.rows == 64 or self.tokens == 8 else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of words of a trip."""
        return self.rows * self.columns * 2


def kernel_group(columns_per_group: int | None) -> int:
    """Columns that share a scale in the packed form: the group size, or a divisor of it over which scales repeat.

    0 is one scale per channel, and also the answer for a size that no tile divides; :func:`why_not_group` tells.
    """
    if columns_per_group is None:
        return 0
    if columns_per_group % _WIDE_TRIP == 0:
        return columns_per_group
    return next((size for size in _GROUPS if columns_per_group % size == 0), 0)


def why_not_group(group_size: int | None) -> str | None:
    """Why groups of this size have no tile; None when they have."""
    if group_size is None or kernel_group(group_size):
        return None
    return f"groups of {group_size} columns; it takes multiples of {_GROUPS[-1]}"


@lru_cache(maxsize=4096)  # asked at every product
def choose_tile(tokens: int, in_features: int, bits: int, group: int) -> Tile:
    """The tile for a product.

    Args:
        tokens: rows of x, at most MOST_TOKENS.
        in_features: columns of the weight.
        bits: of the codes.
        group: see :func:`kernel_group`.
    """
    wide = num_atoms(in_features) % 2 == 0
    trip = _WIDE_TRIP if wide else COLUMNS
    # With codes of 2 bits, 8 planes of sums for 32 rows of x would not stay in registers.
    most = 16 if num_planes(bits) == 8 else 32
    block = min(most, 8 if tokens <= 8 else 16 if tokens <= 16 else 32)
    tile_k = min(trip, group or trip)
    if block == 32:
        # Twice the accumulators: products of 64 columns keep all in registers, of 128 they do not.
        trip = COLUMNS
        tile_k = min(tile_k, COLUMNS)
    # 64 rows of words also spread what small groups cost over more weights, where sums of 8 rows of x leave room.
    small_groups = num_planes(bits) == 4 and 0 < group < _WIDE_TRIP and block == 8
    rows = 64 if small_groups or (num_planes(bits) == 2 and block < 32) else 32
    stages = {(32, _WIDE_TRIP): 4, (64, _WIDE_TRIP): 3}.get((rows, trip), 6)
    return Tile(rows, block, tile_k, trip // tile_k, max(group, tile_k) // tile_k, stages, 2)


@lru_cache(maxsize=4096)
def choose_splits(tile: Tile, tokens: int, out_features: int, in_features: int, bits: int, sms: int) -> int:
    """Parts that K is split into: the least bytes that one SM must take, with enough of them on their way.

    Args:
        tile: see :func:`choose_tile`.
        tokens, out_features, in_features, bits: the product.
        sms: SMs of the device.
    """
    units = num_units(out_features, bits)
    blocks = -(-units * ROWS // tile.rows) * -(-tokens // tile.tokens)
    trips = -(-num_atoms(in_features) * COLUMNS // tile.columns)
    best, least = 1, float("inf")
    for wanted in range(1, min(trips, _MOST_SPLITS) + 1):
        per_split = -(-trips // wanted)
        splits = -(-trips // per_split)
        if splits != wanted:
            continue
        waves = -(-blocks * splits // sms)
        cost = float(waves * per_split * tile.weight_bytes)
        if splits > 1:  # float32 parts are written and read once by way of the L2 cache, about twice as fast as memory
            cost += 2 * splits * blocks * tile.rows * num_planes(bits) * min(tokens, tile.tokens) * 4 / 2 / sms
        in_flight = min(waves, 4) * min(tile.stages - 1, per_split) * tile.weight_bytes
        cost *= max(1.0, (_IN_FLIGHT / in_flight) ** 0.5)
        if cost < least:
            best, least = splits, cost
    return best


def num_counters(units: int) -> int:
    """Counters that any product with a weight of so many units may need: one for each block of rows and tokens.

    A program has at least 32 rows of words, two units, and at least 16 rows of x where there are more than 16.
    """
    return -(-units // 2) * (MOST_TOKENS // 16)


def trips_of(tile: Tile, in_features: int, splits: int) -> tuple[int, int]:
    """Trips of the whole of K, and of one split."""
    trips = -(-num_atoms(in_features) * COLUMNS // tile.columns)
    return trips, -(-trips // splits)
