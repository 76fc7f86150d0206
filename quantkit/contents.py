"""Whether the tensors of a checkpoint are what its config and its model ask for; one layer in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.findings import Finding, of_error
from quantkit.qtensor import QuantizedTensor
from quantkit.skeleton import LinearInfo, Skeleton, expected_tensors
from quantkit.stored import StoredLayers

_ROWS_AT_ONCE = 2**22  # codes
_OFF_BY_ONE = 0.3  # steps
_TELLING_BITS = 4  # with more, a step is so small that a weight's own mean can be one
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(?:masked_)?bias$")  # what older programs stored besides weights


class Visitor:
    """What is told of everything that is read while contents are checked; this one listens to nothing."""

    def layer(self, info: LinearInfo, q: QuantizedTensor) -> None:
        """A quantized layer was decoded."""

    def tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor that is no part of a quantized layer was read."""


def check_contents(skeleton: Skeleton, stored: StoredLayers | None, visitor: Visitor) -> Iterator[Finding]:
    """What the model asks for is there, of its shape, and finite; quantized layers decode; nothing is left over.

    Args:
        skeleton: of the checkpoint.
        stored: its quantized layers; None for a dense model.
        visitor: is told of every layer and tensor.
    """
    used: set[str] = set()
    offsets: list[float] = []
    for info in skeleton.layers:
        if stored is not None and info.name in stored.schemes:
            used.update(stored.names(info))
            yield from _check_layer(stored, info, visitor, offsets)
    yield from _off_by_one(stored, offsets)
    quantized = frozenset() if stored is None else frozenset(f"{name}.weight" for name in stored.schemes)
    for name, disk, shape in expected_tensors(skeleton):
        if name not in quantized and disk not in used:
            yield from _check_dense(skeleton, name, disk, shape, visitor)
            used.update([disk] if disk is not None else [])
    used.update(skeleton.disk_names.values())
    yield from _extra(skeleton, used)
    yield from _check_tied(skeleton)


def _check_layer(stored: StoredLayers, info: LinearInfo, visitor: Visitor, offsets: list[float]) -> Iterator[Finding]:
    """A quantized layer decodes, and nothing lies beside its tensors."""
    names = stored.names(info)
    reason = stored.why_too_large(info)
    if reason is not None:
        yield Finding("shape", "error", info.name, reason, "check config.json against the weights")
        return
    try:
        q, _ = stored.read(info)
    except CheckpointError as error:
        yield of_error("layer", error)
        return
    leaves = {"bias", *stored.format.tensors}
    if f"{info.stem}.{stored.format.tensors[0]}" not in names:
        leaves.add("weight")  # the codes themselves, of int-quantized
    for name in names:
        if name.rpartition(".")[2] not in leaves:
            what = f"lies beside the tensors of a {stored.format.name} layer"
            yield Finding("extra", "error", name, what, "remove it, or the codes: loaders differ in what they take")
    if q.scheme.bits <= _TELLING_BITS:
        offsets.append(mean_offset(q))
    visitor.layer(info, q)


def mean_offset(q: QuantizedTensor) -> float:
    """The mean of ``code - zero_point``, in steps of the grid: about 0, for the mean of a weight is about 0."""
    groups = q.zero_point.shape[1]
    if q.g_idx is None:
        columns = torch.full((groups,), q.in_features // groups, dtype=torch.int64, device=q.codes.device)
    else:
        columns = torch.bincount(q.g_idx, minlength=groups)
    total = 0
    for start in range(0, q.out_features, max(_ROWS_AT_ONCE // q.in_features, 1)):
        part = q.rows(start, start + max(_ROWS_AT_ONCE // q.in_features, 1))
        total += int(part.codes.sum(dtype=torch.int64)) - int((part.zero_point.to(torch.int64) * columns).sum())
    return total / q.codes.numel()


def _off_by_one(stored: StoredLayers | None, offsets: list[float]) -> Iterator[Finding]:
    """Zero points of the other version of GPTQ shift every weight of every layer by one step."""
    if stored is None or not offsets or abs(abs(median(offsets)) - 1) > _OFF_BY_ONE:
        return
    middle = median(offsets)
    like = sum(abs(offset - middle) <= _OFF_BY_ONE for offset in offsets)
    if like < 0.9 * len(offsets):
        return
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}.get(stored.format.name)
    fix = f'config.json: write "checkpoint_format": "{other}"' if other else "write the checkpoint again"
    what = f"in {like} of {len(offsets)} layers the mean weight is {middle:+.2f} steps: zero points are off by one"
    yield Finding("zero-points", "error", "config.json: quantization_config", what, fix)


def _check_dense(
    skeleton: Skeleton, name: str, disk: str | None, shape: tuple[int, ...], visitor: Visitor
) -> Iterator[Finding]:
    """A tensor that is as the model holds it; a tied one may be absent."""
    tensors, tied = skeleton.checkpoint.tensors, skeleton.model.all_tied_weights_keys
    if disk is None or disk not in tensors:
        if name not in tied:
            yield Finding("missing", "error", name, "is missing", "re-download the checkpoint")
        return
    info = tensors[disk]
    if info.shape != shape:
        what = f"is {list(info.shape)} and should be {list(shape)}"
        yield Finding("shape", "error", disk, what, "check config.json against the weights")
    elif not info.dtype.is_floating_point:
        what = f"is {str(info.dtype).removeprefix('torch.')}, of a module that is not quantized"
        yield Finding("dtype", "error", disk, what, "check config.json against the weights")
    else:
        try:
            visitor.tensor(disk, skeleton.checkpoint.read([disk])[disk])
        except CheckpointError as error:
            yield of_error("values", error)


def _extra(skeleton: Skeleton, used: set[str]) -> Iterator[Finding]:
    ignored = list(getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ())
    for name in skeleton.checkpoint.tensors:
        if name not in used and not _BUFFERS.search(name) and not any(re.search(one, name) for one in ignored):
            yield Finding("extra", "warning", name, f"{type(skeleton.model).__name__} has no place for it", "remove it")


def _check_tied(skeleton: Skeleton) -> Iterator[Finding]:
    """Two tensors on disk of which the model holds one: loaders take the embedding's for both."""
    for name, source in skeleton.model.all_tied_weights_keys.items():
        one, other = skeleton.disk_names.get(name), skeleton.disk_names.get(source)
        tensors = skeleton.checkpoint.tensors
        if one is None or other is None or one == other or not {one, other} <= tensors.keys():
            continue
        if tensors[one].shape != tensors[other].shape:
            continue  # said already
        if not torch.equal(skeleton.checkpoint.read([one])[one], skeleton.checkpoint.read([other])[other]):
            what = f"differs from {other}, and config.json ties them: loaders use the latter for both"
            yield Finding("tied", "error", one, what, 'write "tie_word_embeddings": false')
