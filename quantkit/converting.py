"""convert(): a quantized checkpoint in another format, with the same codes, scales and zero points.

Nothing is rounded: what the other format cannot express is refused, by layer and reason, before anything is written. A
shard at a time is in memory, each layer is decoded again from the finished files, and the output appears at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.card import CARD, converted_card, hub_id
from quantkit.checkpoint import CONFIG, Checkpoint, write_bytes
from quantkit.config_names import named_schemes, names_left_out
from quantkit.errors import CheckpointError, InputError, SchemeError, message
from quantkit.formats import FORMATS, AWQCheckpoint, CheckpointFormat, format_named, format_of
from quantkit.qtensor import QuantizedTensor
from quantkit.report import Note, Observer, Stage, Step, ignore, versions
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, open_skeleton
from quantkit.source import resolve_model
from quantkit.staging import Staging, check_output
from quantkit.stored import StoredLayers, stored_layers
from quantkit.strict_json import read_json

RECORD = "conversion.json"
_SHARD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished conversion.

    Attributes:
        path: the output directory.
        source: name of the format that was read.
        target: name of the format that was written.
        schemes: number of layers of each scheme, as written.
        copied: tensors that are as they were.
        bytes_before: of all tensors of the source.
        bytes_after: of all tensors of the output.
        notes: what the user should know, one sentence each.
    """

    path: Path
    source: str
    target: str
    schemes: Mapping[QuantScheme, int]
    copied: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """A checked conversion.

    Attributes:
        checkpoint: the source.
        stored: its layers.
        target: the format to write.
        of_layer: tensor of the source -> the layer whose codes, scales or zero points it holds; not the biases.
        schemes: what each layer will be written with.
        config: the ``quantization_config`` to write.
        notes: what the user should know.
        record: what conversion.json will hold.
    """

    checkpoint: Checkpoint
    stored: StoredLayers
    target: CheckpointFormat
    of_layer: Mapping[str, LinearInfo]
    schemes: Mapping[str, QuantScheme]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    record: Mapping[str, Any]


def convert(
    model: str | Path,
    output: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    shard_bytes: int = _SHARD_BYTES,
    observer: Observer = ignore,
) -> Conversion:
    """Write a quantized checkpoint in another format.

    Args:
        model: a directory or hub id, quantized in a format that quantkit reads.
        output: the directory to write; it appears when everything is verified.
        to: ``compressed-tensors``, ``gptq``, ``gptq_v2`` or ``awq``.
        overwrite: replace what is at ``output`` (which may be ``model``), at the end.
        shard_bytes: tensors of about so many bytes are in memory and in one file.
        observer: told of every step.

    Raises:
        CheckpointError: not quantized, or malformed.
        SchemeError: something that the other format cannot express, with the layer.
        OutputError: the output directory cannot be written as asked; nothing is left behind.
        InterruptedRunError: the disk is full; nothing is kept.
    """
    target = Path(output).expanduser().absolute()
    check_output(target, overwrite=overwrite, resume=False, resumable=False)
    work = _checked(Checkpoint(resolve_model(model)), _target_named(to))
    shards = list(_shards(work, shard_bytes))
    staging = Staging(target, len(shards), {"convert": str(work.checkpoint.path), "to": to}, resume=False)
    finished = False
    try:
        for note in work.notes:
            observer(Note(note))
        digests = _write(work, shards, staging, observer)
        total = _write_rest(work, staging)
        _verify(work, digests, staging.path, observer)
        staging.publish()
        finished = True
    finally:
        if not finished:
            staging.discard()
    counts: dict[QuantScheme, int] = {}
    for scheme in work.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    copied = len(work.checkpoint.tensors) - len(work.of_layer)
    before = work.checkpoint.nbytes
    return Conversion(target, work.stored.format.name, to, counts, copied, before, total, work.notes)


def _target_named(name: str) -> CheckpointFormat:
    if name not in {fmt.name for fmt in FORMATS}:
        known = ", ".join(fmt.name for fmt in FORMATS)
        raise InputError(message("--to", f"{name!r} is not a format", f"choose one of {known}"))
    return format_named(name)


def _checked(checkpoint: Checkpoint, target: CheckpointFormat) -> _Work:
    """Everything that can be refused, before anything is written."""
    config = checkpoint.quantization
    if config is None:
        fix = "give a quantized model, or quantize this one with quantkit quantize --format"
        raise CheckpointError(message(str(checkpoint.path), "is not quantized", fix))
    source = format_of(config)
    skeleton = open_skeleton(checkpoint, checkpoint.float_dtype)
    stored = stored_layers(skeleton, source, config)
    layers = {info.name: info for info in skeleton.layers if info.name in stored.schemes}
    if not layers:
        raise CheckpointError(
            message(str(checkpoint.path), "its config and its tensors agree on no quantized layer", "check config.json")
        )
    for info in layers.values():
        stored.check_size(info)
    schemes, notes = _target_schemes(stored, layers, target)
    for name, info in layers.items():
        if info.embedding and not target.holds_embeddings:
            fix = "choose compressed-tensors"
            raise SchemeError(message(name, f"format {target.name} holds linear layers only, no embedding", fix))
        reason = target.why_not(schemes[name], (info.out_features, info.in_features))
        if reason is not None:
            raise SchemeError(message(name, f"format {target.name} cannot hold {schemes[name]}", reason))
    reordered, sorted_away = _reordered(stored, layers.values())
    if reordered and not target.holds_g_idx:
        others = f", as are those of {len(reordered) - 1} other layers" if len(reordered) > 1 else ""
        fix = f"format {target.name} holds contiguous groups: choose gptq or gptq_v2"
        raise SchemeError(message(reordered[0], f"its groups are reordered (g_idx){others}", fix))
    if sorted_away and not target.holds_g_idx:
        notes += (f"{len(sorted_away)} layers name contiguous groups in another order: their scales are sorted",)
    opaque = [name for name, _ in skeleton.opaque_experts]
    kept = [info.name for info in skeleton.linears if info.name not in layers]
    kept += [name for name in skeleton.routers if name not in kept and name not in layers]
    written = target.write_config(
        named_schemes(skeleton, ((info, schemes[name]) for name, info in layers.items())),
        names_left_out(skeleton, [*kept, *opaque]),
        reordered=target.holds_g_idx and bool(reordered or sorted_away),
    )
    of_layer = {name: info for info in layers.values() for name in _own_tensors(stored, info)}
    record = _record(checkpoint.path, source.name, target.name, notes)
    return _Work(checkpoint, stored, target, of_layer, schemes, written, notes, record)


def _target_schemes(
    stored: StoredLayers, layers: Mapping[str, LinearInfo], target: CheckpointFormat
) -> tuple[dict[str, QuantScheme], tuple[str, ...]]:
    """What each layer's scheme is called in the other format, which changes no number.

    AWQ's weights always have zero points. So a symmetric layer gets them, all in the middle, and a checkpoint of which
    all are in the middle is symmetric elsewhere.
    """
    schemes = dict(stored.schemes)
    if target.name == AWQCheckpoint.name:
        if any(scheme.symmetric for scheme in schemes.values()):
            note = "symmetric weights are written with zero points in the middle: awq has no other"
            return {name: replace(scheme, symmetric=False) for name, scheme in schemes.items()}, (note,)
    elif stored.format.name == AWQCheckpoint.name and not any(scheme.symmetric for scheme in schemes.values()):
        zeros = (f"{info.stem}.qzeros" for info in layers.values())
        read = (stored.checkpoint.read([name]).values() for name in zeros if name in stored.checkpoint.tensors)
        if all(AWQCheckpoint.in_the_middle(*tensors) for tensors in read):
            note = "all zero points are in the middle: the weights are written as symmetric"
            return {name: replace(scheme, symmetric=True) for name, scheme in schemes.items()}, (note,)
    return schemes, ()


def _reordered(stored: StoredLayers, layers: Iterable[LinearInfo]) -> tuple[list[str], list[str]]:
    """The layers whose groups are not contiguous, and those whose contiguous groups are in another order."""
    reordered, shuffled = [], []
    for info in layers:
        name = f"{info.stem}.g_idx"
        if name not in stored.names(info):
            continue
        g_idx = stored.checkpoint.read([name])[name]
        size = stored.schemes[info.name].columns_per_group(info.in_features)
        if g_idx.numel() != info.in_features or info.in_features % size:
            continue  # decoding the layer will say so
        blocks = g_idx.reshape(-1, size)
        if not bool((blocks == blocks[:, :1]).all()):
            reordered.append(info.name)
        elif not torch.equal(blocks[:, 0].long(), torch.arange(len(blocks))):
            shuffled.append(info.name)
    return reordered, shuffled


def _own_tensors(stored: StoredLayers, info: LinearInfo) -> list[str]:
    """The tensors that hold a layer's weight; a bias is none, and is left as it is."""
    names = {name.rpartition(".")[2]: name for name in stored.names(info)}
    leaves = stored.format.tensors if stored.format.tensors[0] in names else ("weight", *stored.format.tensors)
    return [names[leaf] for leaf in leaves if leaf in names]


def _shards(work: _Work, limit: int) -> Iterator[list[str]]:
    """The tensors of the source in the order of its files, in portions; those of a layer are together."""
    shard: list[str] = []
    size = 0
    done: set[str] = set()
    for name in sorted(work.checkpoint.tensors, key=lambda name: (work.checkpoint.tensors[name].file, name)):
        if name in done:
            continue
        layer = work.of_layer.get(name)
        unit = [name] if layer is None else _own_tensors(work.stored, layer)
        nbytes = sum(work.checkpoint.tensors[n].nbytes for n in unit)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard += unit
        size += nbytes
        done.update(unit)
    yield shard


def _write(work: _Work, shards: Sequence[list[str]], staging: Staging, observer: Observer) -> dict[str, str]:
    """Write all shards; returns the digest of every layer."""
    of_layer = work.of_layer
    digests: dict[str, str] = {}
    observer(Stage("converting", len(shards)))
    for index, names in enumerate(shards):
        tensors: dict[str, Tensor] = work.checkpoint.read([name for name in names if name not in of_layer])
        for info in {of_layer[name].name: of_layer[name] for name in names if name in of_layer}.values():
            q = _as_written(work.stored.read(info)[0], work.schemes[info.name], work.target)
            tensors.update({f"{info.stem}.{leaf}": tensor for leaf, tensor in work.target.encode(q).items()})
            digests[info.name] = q.digest()
        staging.write(index, tensors, ())
        observer(Step(f"shard {index + 1} of {len(shards)}"))
    return digests


def _as_written(q: QuantizedTensor, scheme: QuantScheme, target: CheckpointFormat) -> QuantizedTensor:
    """The same weight under the other format's name for its scheme, its groups in order where they must be."""
    q = replace(q, scheme=scheme)
    if q.g_idx is None or target.holds_g_idx:
        return q
    first = q.g_idx.reshape(q.scale.shape[1], -1)[:, 0].long()
    scale, zero_point = q.scale[:, first].contiguous(), q.zero_point[:, first].contiguous()
    return replace(q, scale=scale, zero_point=zero_point, g_idx=None)


def _write_rest(work: _Work, staging: Staging) -> int:
    """Index, configs, the source's small files as they are, and what was done; returns the bytes of all tensors.

    recipe.yaml and report.json, where they are, tell of the run that found the codes, and stay. The conversions since
    then are in a file of their own; a model card that quantkit wrote names the format that is there now.
    """
    config = {**work.checkpoint.config, "quantization_config": dict(work.config)}
    records = {CONFIG: config, RECORD: work.record, **work.target.config_files(work.config)}
    total = staging.write_rest(work.checkpoint.other_files(), records)
    text = converted_card(work.checkpoint.path, work.stored.format.name, work.config)
    if text is not None:
        write_bytes(staging.path / CARD, text.encode())
    return total


def _record(source: Path, before: str, after: str, notes: tuple[str, ...]) -> dict[str, Any]:
    """What conversion.json holds: every conversion since the codes were found, the last one last.

    Args:
        source: the directory that is converted.
        before, after: names of its format and of the one to write.
        notes: what the user should know.

    Raises:
        CheckpointError: the source's own is not one.
    """
    earlier = read_json(source / RECORD, missing="").get("conversions") if (source / RECORD).is_file() else []
    if not isinstance(earlier, list):
        raise CheckpointError(message(str(source / RECORD), "holds no list of conversions", "repair or remove it"))
    done = {
        "from": before,
        "to": after,
        "source": hub_id(source) or source.name,
        "notes": list(notes),
        "versions": versions(),
    }
    return {"conversions": [*earlier, done]}


def _verify(work: _Work, digests: Mapping[str, str], path: Path, observer: Observer) -> None:
    """The finished directory is opened as a stranger's would be: the same layers, the same weights, the same rest."""
    written = Checkpoint(path)
    skeleton = open_skeleton(written, written.float_dtype)
    stored = stored_layers(skeleton, work.target, written.config["quantization_config"])
    if dict(stored.schemes) != dict(work.schemes):
        what = "quantization_config names other layers than were written"
        raise CheckpointError(message(str(path), what, "report this as a bug, with the source's config.json"))
    observer(Stage("verifying", 1))
    for info in skeleton.layers:
        if info.name in digests and stored.read(info)[0].digest() != digests[info.name]:
            raise CheckpointError(message(info.name, "reads back different from what was read", "check the disk"))
    for name in work.checkpoint.tensors.keys() - work.of_layer.keys():
        if not torch.equal(written.read([name])[name], work.checkpoint.read([name])[name]):
            raise CheckpointError(message(f"{path}: {name}", "differs from the source's", "check the disk"))
    observer(Step("verified"))
