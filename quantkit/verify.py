"""A finished directory is opened again, as a stranger's would be, before success is declared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.checkpoint import Checkpoint
from quantkit.digest import digest
from quantkit.errors import CheckpointError, message
from quantkit.plan import Plan
from quantkit.report import BlockRecord, LayerRecord


def verify_output(path: Path, plan: Plan, records: Sequence[LayerRecord], tuned: Sequence[BlockRecord] = ()) -> None:
    """Names, shapes, dtypes, finite scales, every layer's decoded weight against what its solver returned, and every
    other tensor against the source's unless a transform or the tuning changes it.

    Args:
        path: the directory that was written.
        plan: what it should hold.
        records: one for each layer, with the digest of the solver's result.
        tuned: one for each tuning of a block, with the digests of the gains and biases that it changed.

    Raises:
        CheckpointError: the first thing that is not as it should be.
    """
    written = Checkpoint(path)
    _verify_config(written, plan)
    digests = {record.name: record.digest for record in records}
    expected: set[str] = set()
    for layer in plan.layers:
        prefix = f"{layer.info.stem}."
        names = [n for n in written.tensors if n.startswith(prefix) and "." not in n[len(prefix) :]]
        tensors = {n.removeprefix(prefix): t for n, t in written.read(names).items()}
        shape = (layer.info.out_features, layer.info.in_features)
        q = plan.format.decode(layer.info.name, tensors, layer.scheme, shape)
        if q.digest() != digests.get(layer.info.name):
            raise CheckpointError(
                message(layer.info.name, "reads back different from what was solved", "check the disk, and run again")
            )
        expected.update(prefix + name for name in plan.format.encode(q))
    _verify_rest(written, plan, expected, plan.changed.union(*(record.changed for record in tuned)))
    _verify_tuned(written, tuned)


def _verify_tuned(written: Checkpoint, tuned: Sequence[BlockRecord]) -> None:
    """What tuning changed on purpose is as it was kept."""
    for record in tuned:
        for name, tensor in written.read(record.changed).items():
            if digest(tensor) != record.changed[name]:
                raise CheckpointError(
                    message(name, "reads back different from what was tuned", "check the disk, and run again")
                )


def _verify_config(written: Checkpoint, plan: Plan) -> None:
    config = dict(written.config)
    quantization = config.pop("quantization_config", None)
    if config != plan.config:
        raise CheckpointError(message(str(written.path), "config.json differs from what was planned", "run again"))
    found = plan.format.read_config(quantization or {}, tuple(info.name for info in plan.skeleton.linears))
    if found != {layer.info.name: layer.scheme for layer in plan.layers}:
        raise CheckpointError(
            message(str(written.path), "quantization_config names other layers than were quantized", "run again")
        )


def _verify_rest(written: Checkpoint, plan: Plan, expected: set[str], changed: frozenset[str]) -> None:
    kept = {name: info for name, info in plan.checkpoint.tensors.items() if name not in plan.replaced}
    if plan.untied is not None:
        kept[plan.head] = plan.untied
    missing = sorted((expected | kept.keys()) - written.tensors.keys())
    extra = sorted(written.tensors.keys() - (expected | kept.keys()))
    if missing or extra:
        raise CheckpointError(
            message(str(written.path), f"missing tensors: {missing[:3]}, unknown tensors: {extra[:3]}", "run again")
        )
    for name, info in kept.items():
        there = written.tensors[name]
        if (there.dtype, there.shape) != (info.dtype, info.shape):
            raise CheckpointError(
                message(
                    f"{written.path}: {name}",
                    f"is {there.dtype} {list(there.shape)}",
                    f"the source has {info.dtype} {list(info.shape)}",
                )
            )
    for name in sorted(kept.keys() - changed):  # one at a time and never both sides, for they may be large
        if digest(written.read([name])[name]) != digest(plan.checkpoint.read([name])[name]):
            raise CheckpointError(
                message(f"{written.path}: {name}", "differs from the source's", "check the disk, and run again")
            )
