"""Which tensor on disk is which parameter of a model, by transformers' own rules; stacked experts are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint, Slice
from quantkit.errors import CheckpointError, message
from quantkit.experts import DOWN, GATE_UP, ExpertsInfo, disk_leaves, slot_on_disk
from quantkit.formats import codes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' rules from names on disk to names in the model: those that rename, those that also stack."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    return renamings, [r for r in rules if isinstance(r, WeightConverter)]


def names_on_disk(model: PreTrainedModel, checkpoint: Checkpoint, experts: Sequence[ExpertsInfo]) -> dict[str, str]:
    """Name in the model -> name on disk, by transformers' own rules (prefixes, legacy names, stacked experts)."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = conversions(model)
    state = model.state_dict()
    stacks = {f"{info.name}.{parameter}": info for info in experts for parameter in (GATE_UP, DOWN)}
    leaves = {info.name: disk_leaves(info, converters) or {} for info in experts}
    # A quantized layer's tensors follow the names of the weight that they stand for.
    stems = {
        name: name.rsplit(".", 1)[0] + ".weight"
        for name in checkpoint.tensors
        if any(codes in checkpoint.tensors for codes in codes_of(name))
    }
    renamed = {}
    for disk in checkpoint.tensors:
        dense = stems.get(disk, disk)
        name, converter = rename_source_key(dense, renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            info = stacks.get(name)
            slot = slot_on_disk(info, leaves[info.name], dense) if info is not None else None
            if info is None or slot is None:
                continue
            name = f"{info.name}.{slot[0]}.{slot[1]}.weight"
        if disk in stems:
            name = name.rsplit(".", 1)[0] + "." + disk.rsplit(".", 1)[1]
        renamed[name] = disk
    return renamed


def split_checkpoint(
    model: PreTrainedModel, checkpoint: Checkpoint, experts: Sequence[ExpertsInfo], renamed: dict[str, str]
) -> Checkpoint:
    """A view of the checkpoint without stacked experts; their parts get the names that single experts have on disk."""
    converters = conversions(model)[1]
    slices: dict[str, Slice] = {}
    for info in experts:
        leaves = disk_leaves(info, converters) or {}
        for slot in info.slots():
            stacked = f"{info.name}.{slot.parameter}"
            disk = renamed.get(stacked)
            if disk is None:
                continue
            _check_stack(checkpoint, disk, tuple(model.get_parameter(stacked).shape))
            stem = disk.removesuffix(f".{slot.parameter}")
            part = f"{stem}.{slot.index}.{leaves[slot.leaf]}.weight"
            slices[part] = Slice(disk, slot.index, slot.rows.start, slot.rows.stop)
            renamed[f"{slot.name}.weight"] = part
        for parameter in (GATE_UP, DOWN):
            renamed.pop(f"{info.name}.{parameter}", None)
    return checkpoint.split(slices) if slices else checkpoint


def _check_stack(checkpoint: Checkpoint, disk: str, shape: tuple[int, ...]) -> None:
    there = checkpoint.tensors[disk].shape
    if there != shape:
        raise CheckpointError(
            message(f"{checkpoint.path}: {disk}", f"is {list(there)} and should be {list(shape)}", "check config.json")
        )
