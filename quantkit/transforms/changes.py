"""Which tensors transforms change, besides the weights that are quantized: what else is written must be as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quantkit.structure import Source, Structure
from quantkit.transforms.awq import AWQ
from quantkit.transforms.rotation import Rotation
from quantkit.transforms.smoothquant import SmoothQuant


def changed_in_block(structure: Structure, transforms: Iterable[SmoothQuant | AWQ | Rotation]) -> frozenset[str]:
    """Names of the tensors of a block that may change, within the block."""
    return frozenset(name for one in transforms for name in _changed(structure, one))


def changed_outside(structure: Structure, transforms: Iterable[SmoothQuant | AWQ | Rotation]) -> frozenset[str]:
    """Names of the parameters outside of the blocks that change, but for the head's."""
    stream = structure.residual
    if stream is None or not any(isinstance(one, Rotation) and one.residual for one in transforms):
        return frozenset()
    return frozenset(_both((*stream.embeddings, stream.final_norm)))


def _changed(structure: Structure, transform: SmoothQuant | AWQ | Rotation) -> Iterator[str]:
    if isinstance(transform, Rotation):
        values = (Source.VALUES, Source.VALUES_BY_HEAD) if transform.heads else ()
        groups = [group for group in structure.groups if group.kind in values]
        stream = structure.residual if transform.residual else None
        if stream is not None:
            yield from _both([*(norm for norm, _ in stream.norms), *stream.writers])
            yield from _both(reader for _, readers in stream.norms for reader in readers)
    else:
        groups = [group for group in structure.groups if transform.takes(group)]
    for group in groups:
        yield from _both([group.source])
        yield from (f"{reader}.weight" for reader in group.readers)


def _both(modules: Iterable[str]) -> Iterator[str]:
    for module in modules:
        yield f"{module}.weight"
        yield f"{module}.bias"
