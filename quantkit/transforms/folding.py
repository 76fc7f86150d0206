"""Folding, written once: scales and rotations go into the weights around them, and the function stays.

Vectors are rows: a linear is ``y = x Wᵀ + b`` with W [out, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, message
from quantkit.structure import Heads, Norm, ResidualStream, ScaleGroup, Source
from quantkit.transforms.base import BlockTensors
from quantkit.transforms.orthogonal import Orthogonal

_ROWS_AT_ONCE = 4096  # of an embedding, in float64


def channel_rows(group: ScaleGroup, num_rows: int, num_channels: int, heads: Heads) -> Tensor:
    """The source linear's output row that makes each channel.

    Args:
        group: its source is a linear.
        num_rows: of the source.
        num_channels: that the group has (:func:`reader_channels`).
        heads: of the attention.

    Returns:
        int64 [channels].
    """
    if group.kind is not Source.VALUES_BY_HEAD:
        return torch.arange(num_rows - num_channels, num_rows)
    of_head = num_rows // heads.query
    inside = torch.arange(of_head - heads.dim, of_head)
    return (torch.arange(heads.query)[:, None] * of_head + inside).reshape(-1)


def reader_channels(group: ScaleGroup, num_columns: int, heads: Heads) -> Tensor:
    """The channel that each input column of a reader reads: under grouped-query attention, several read one.

    Returns:
        int64 [in].
    """
    if group.kind is not Source.VALUES:
        return torch.arange(num_columns)
    values = torch.arange(heads.value * heads.dim).reshape(heads.value, 1, heads.dim)
    return values.expand(heads.value, heads.query // heads.value, heads.dim).reshape(-1)


def to_channels(per_column: Tensor, channels: Tensor, reduce: str) -> Tensor:
    """Columns that read the same channel in one value: their largest (``amax``) or their ``mean``.

    Args:
        per_column: float [in].
        channels: int64 [in], from :func:`reader_channels`.
        reduce: ``amax`` or ``mean``.

    Returns:
        float [channels].
    """
    size = int(channels.max()) + 1
    empty = torch.zeros(size, dtype=per_column.dtype, device=per_column.device)
    return empty.scatter_reduce(0, channels.to(per_column.device), per_column, reduce, include_self=False)


def fold_scale(tensors: BlockTensors, group: ScaleGroup, scale: Tensor, norm: Norm, heads: Heads) -> Tensor:
    """Divide a group's channels by ``scale`` where they are made, and multiply the columns of its readers.

    A norm's gain ships in the model's dtype, so it is rounded first and the readers are multiplied by what the rounded
    gain really divides by. A channel whose gain is zero, or would become zero or infinite, stays as it is.

    Args:
        tensors: of the block; modified.
        group: what to scale.
        scale: float [channels], positive.
        norm: the family's.
        heads: of the attention.

    Returns:
        float64 [in]: what the readers' columns were multiplied by.
    """
    scale = scale.double()
    if group.kind is Source.NORM:
        scale = _scale_norm(tensors, group.source, scale, norm)
    else:
        _scale_rows(tensors, group, scale, heads)
    first = tensors.weight(group.readers[0])
    columns = scale[reader_channels(group, first.shape[1], heads)]
    for reader in group.readers:
        tensors.put_weight(reader, tensors.weight(reader).double() * columns)
    return columns


def _scale_norm(tensors: BlockTensors, name: str, scale: Tensor, norm: Norm) -> Tensor:
    """Divide a norm's gain and bias; returns the scale that the rounded gain stands for."""
    key, offset = f"{name}.weight", 1.0 if norm is Norm.RMS_PLUS_ONE else 0.0
    old = tensors[key].double()
    new = ((old + offset) / scale - offset).to(tensors.shipped(key)).double()
    exact = (old + offset) / (new + offset)
    kept = ~torch.isfinite(exact) | ~torch.isfinite(new) | (exact <= 0)
    tensors.put(key, torch.where(kept, old, new))
    exact = torch.where(kept, 1.0, exact)
    if f"{name}.bias" in tensors:
        tensors.put(f"{name}.bias", tensors.wide(f"{name}.bias").double() / exact)
    return exact


def _scale_rows(tensors: BlockTensors, group: ScaleGroup, scale: Tensor, heads: Heads) -> None:
    weight = tensors.weight(group.source).double().clone()
    rows = channel_rows(group, weight.shape[0], scale.numel(), heads)
    weight[rows] /= scale[:, None]
    tensors.put_weight(group.source, weight)
    if f"{group.source}.bias" in tensors:
        bias = tensors.wide(f"{group.source}.bias").double().clone()
        bias[rows] /= scale
        tensors.put(f"{group.source}.bias", bias)


def rotate_values(tensors: BlockTensors, group: ScaleGroup, rotation: Orthogonal, heads: Heads) -> None:
    """Rotate every value head, and back in the readers: ``v → v R``, ``W_o → W_o (I ⊗ R)``.

    SpinQuant's R2 (arXiv:2405.16406, section 3.1); attention mixes tokens and leaves the channels of a head alone.

    Args:
        tensors: of the block; modified.
        group: of a kind of values.
        rotation: of ``heads.dim`` channels.
        heads: of the attention.
    """
    weight = tensors.weight(group.source).double().clone()
    num_channels = int(reader_channels(group, tensors.weight(group.readers[0]).shape[1], heads).max()) + 1
    rows = channel_rows(group, weight.shape[0], num_channels, heads)
    by_head = weight[rows].reshape(-1, heads.dim, weight.shape[1])
    weight[rows] = rotation.apply(by_head.transpose(1, 2)).transpose(1, 2).reshape(rows.numel(), -1)
    tensors.put_weight(group.source, weight)
    if f"{group.source}.bias" in tensors:
        bias = tensors.wide(f"{group.source}.bias").double().clone()
        bias[rows] = rotation.apply(bias[rows].reshape(-1, heads.dim)).reshape(-1)
        tensors.put(f"{group.source}.bias", bias)
    for reader in group.readers:
        columns = tensors.weight(reader).double()
        rotated = rotation.apply(columns.reshape(columns.shape[0], heads.query, heads.dim))
        tensors.put_weight(reader, rotated.reshape(columns.shape))


def rotate_stream(tensors: BlockTensors, stream: ResidualStream, rotation: Orthogonal, norm: Norm, where: str) -> None:
    """Rotate what a block reads from the residual stream and what it writes into it: ``x → x Q``.

    QuaRot (arXiv:2404.00456, section 4, stage 1a), SpinQuant's R1. The gains of norms do not commute with Q and go into
    their readers first. A LayerNorm also takes the mean away: its Q must keep the vector of ones (:mod:`.orthogonal`).

    Args:
        tensors: of the block; modified.
        stream: of the family.
        rotation: Q.
        norm: the family's.
        where: the block's name, for messages.

    Raises:
        CheckpointError: a LayerNorm whose bias cannot be folded.
    """
    for name, readers in stream.norms:
        weights = [tensors.weight(reader).double() for reader in readers]
        biases = [f"{reader}.bias" for reader in readers]
        gain, shift = _take_norm(tensors, name, norm)
        if shift is not None and all(bias in tensors for bias in biases):
            for weight, bias in zip(weights, biases, strict=True):
                tensors.put(bias, tensors.wide(bias).double() + weight @ shift)
            shift = torch.zeros_like(shift)
        if shift is not None:
            tensors.put(f"{name}.bias", rotation.apply(_behind_gain(shift, gain, f"{where}.{name}")))
        for reader, weight in zip(readers, weights, strict=True):
            tensors.put_weight(reader, rotation.apply(weight * gain))
    for writer in stream.writers:
        tensors.put_weight(writer, rotation.apply(tensors.weight(writer).double().T).T)
        if f"{writer}.bias" in tensors:
            tensors.put(f"{writer}.bias", rotation.apply(tensors.wide(f"{writer}.bias").double()))


def _take_norm(tensors: BlockTensors, name: str, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """Make a norm's gain one; returns what its gain and bias (None: it has none) were."""
    assert norm is not Norm.RMS_PLUS_ONE, "no family with such norms has a stream that can be rotated"
    gain = tensors[f"{name}.weight"].double()
    tensors.put(f"{name}.weight", torch.ones_like(gain))
    return gain, tensors[f"{name}.bias"].double() if f"{name}.bias" in tensors else None


def _behind_gain(shift: Tensor, gain: Tensor, where: str) -> Tensor:
    """The bias of a norm whose gain moved into its readers: ``(z + shift/gain)·gain = z·gain + shift``."""
    if bool(((gain == 0) & (shift != 0)).any()):
        raise CheckpointError(
            message(
                where,
                "has a bias where its gain is zero, which cannot be folded",
                "use rotation with residual: false",
            )
        )
    return torch.where(shift == 0, 0.0, shift / torch.where(gain == 0, 1.0, gain))


def rotate_rows(weight: Tensor, rotation: Orthogonal, gain: Tensor | None = None) -> None:
    """``W → W diag(gain) Q`` in place, a few rows at a time: an embedding (no gain) or the head.

    Args:
        weight: float [vocabulary, hidden]; modified, each element rounded once.
        rotation: Q.
        gain: float64 [hidden] of the norm in front of the head.
    """
    for rows in weight.split(_ROWS_AT_ONCE):
        wide = rows.double()
        rows.copy_(rotation.apply(wide if gain is None else wide * gain))


def rotate_final_norm(
    gain: Tensor, bias: Tensor | None, rotation: Orthogonal, where: str
) -> tuple[Tensor, Tensor | None]:
    """The norm in front of the head when its gain has moved into the head, which may have no bias.

    Args:
        gain: float [hidden].
        bias: float [hidden] of a LayerNorm.
        rotation: Q.
        where: the norm's name, for messages.

    Returns:
        gain and bias to write, in their dtypes.

    Raises:
        CheckpointError: a bias where the gain is zero.
    """
    if bias is None:
        return torch.ones_like(gain), None
    moved = rotation.apply(_behind_gain(bias.double(), gain.double(), where))
    return torch.ones_like(gain), moved.to(bias.dtype)
