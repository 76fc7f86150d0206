"""A model without its weights: on the meta device, with the names that its tensors have on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.arch import find_blocks, find_linears, is_transposed
from quantkit.checkpoint import CONFIG, Checkpoint
from quantkit.errors import CheckpointError, message

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """A linear layer of the model.

    Attributes:
        name: module name in the model, such as ``model.layers.0.mlp.up_proj``.
        local: the name within its block, such as ``mlp.up_proj``; outside of the blocks, the name.
        stem: its name on disk: ``stem.weight`` is the tensor of a dense checkpoint.
        out_features: rows.
        in_features: columns.
        transposed: the weight lies as [in, out] on disk (Conv1D).
        block: index of its decoder block; None outside of the blocks (the head).
        tied: its weight is another module's (an embedding's).
    """

    name: str
    local: str
    stem: str
    out_features: int
    in_features: int
    transposed: bool
    block: int | None
    tied: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A causal language model on the meta device.

    Attributes:
        model: the transformers model; parameters on meta, buffers real.
        block_path: module name of the list of decoder blocks.
        blocks: the decoder blocks, in order.
        linears: every linear layer, in the model's order.
        disk_names: parameter (or persistent buffer) name -> tensor name on disk.
    """

    model: PreTrainedModel
    block_path: str
    blocks: tuple[nn.Module, ...]
    linears: tuple[LinearInfo, ...]
    disk_names: Mapping[str, str]

    def block_tensors(self, index: int) -> dict[str, str]:
        """Name within block ``index`` -> tensor name on disk."""
        prefix = f"{self.block_path}.{index}."
        return {n[len(prefix) :]: disk for n, disk in self.disk_names.items() if n.startswith(prefix)}

    def outside_tensors(self) -> dict[str, str]:
        """Parameter name -> tensor name on disk, for all that is not in a block."""
        return {n: disk for n, disk in self.disk_names.items() if not n.startswith(f"{self.block_path}.")}

    def head_name(self) -> str | None:
        """Module name of the output head, such as ``lm_head``; None when the model names none."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), None)


def open_config(path: Path) -> PretrainedConfig:
    """The transformers config of a causal language model; remote code is never run.

    Raises:
        CheckpointError: unknown or malformed, or not a causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            message(
                str(path / CONFIG),
                f"transformers cannot read it ({reason})",
                "only families that transformers knows without remote code are run",
            )
        ) from error
    wanted = list(config.architectures or [])
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (wanted and not causal.intersection(wanted)):
        what = ", ".join(wanted) or f"model_type {config.model_type}"
        raise CheckpointError(
            message(str(path), f"is not a causal language model ({what})", "give a model of a *ForCausalLM class")
        )
    return config


def open_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
    """Build the model on the meta device and match its parameters with the tensors on disk.

    Args:
        checkpoint: a dense or quantized model directory.
        dtype: what the parameters will be held in.

    Raises:
        CheckpointError: not a causal language model, or no list of decoder blocks.
    """
    config = open_config(checkpoint.path)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    _check_depth(checkpoint, config)
    model = _meta_model(checkpoint.path, config, dtype)
    found = find_blocks(model)
    if found is None:
        raise CheckpointError(
            message(
                str(checkpoint.path),
                f"the decoder blocks of {type(model).__name__} were not found",
                "quantkit runs models with one list of decoder blocks",
            )
        )
    renamed = _renamer(model, checkpoint)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    names += [n for n in model.state_dict() if n not in set(names)]
    disk_names = {n: renamed[n] for n in names if n in renamed}
    linears = tuple(_linear_infos(model, found.path, renamed))
    return Skeleton(model, found.path, found.blocks, linears, disk_names)


def check_complete(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Every parameter of a dense model has its tensor on disk, of the same shape; tied ones may be absent.

    Raises:
        CheckpointError: with up to three of the tensors that do not match.
    """
    wrong = []
    tied = set(getattr(skeleton.model, "all_tied_weights_keys", {}) or {})
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        disk = skeleton.disk_names.get(name)
        if disk is None:
            if name not in tied:
                wrong.append(f"{name} is missing")
        elif checkpoint.tensors[disk].shape != tuple(parameter.shape):
            wrong.append(f"{disk} is {list(checkpoint.tensors[disk].shape)} and should be {list(parameter.shape)}")
    if wrong:
        raise CheckpointError(
            message(
                str(checkpoint.path),
                f"{len(wrong)} tensors do not fit {type(skeleton.model).__name__}: {'; '.join(wrong[:3])}",
                "check config.json against the weights (mixture-of-experts weights are not supported yet)",
            )
        )


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put these tensors into a module in place of its parameters and persistent buffers, by name."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        target = module.get_submodule(owner)
        if leaf in target._parameters:
            target._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            target._buffers[leaf] = tensor


def place_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers (position frequencies and the like) to the device that parameters will be on."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)


def release(module: nn.Module) -> None:
    """Put every parameter back on the meta device, which frees its memory."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _meta_model(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            message(
                str(path / CONFIG),
                f"no {config.model_type} model can be built from it ({error})",
                "repair or re-download it",
            )
        ) from error
    model.eval().requires_grad_(False)
    return model


def _check_depth(checkpoint: Checkpoint, config: Any) -> None:
    layers = getattr(config, "num_hidden_layers", 0) or 0
    if layers > len(checkpoint.tensors):
        raise CheckpointError(
            message(
                str(checkpoint.path / CONFIG),
                f"num_hidden_layers={layers} with only {len(checkpoint.tensors)} tensors on disk",
                "check config.json against the weights",
            )
        )


def _renamer(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the model -> name on disk, by transformers' own rules (prefixes, legacy names)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    state = model.state_dict()
    # A quantized layer's tensors follow the names of the weight that they stand for.
    stems = {name: name.rsplit(".", 1)[0] + ".weight" for name in checkpoint.tensors if ".weight_" in name}
    renamed = {}
    for disk in checkpoint.tensors:
        name, converter = rename_source_key(
            stems.get(disk, disk), renamings, converters, model.base_model_prefix, state
        )
        if converter is None:
            if disk in stems:
                name = name.rsplit(".", 1)[0] + "." + disk.rsplit(".", 1)[1]
            renamed[name] = disk
    return renamed


def _linear_infos(model: PreTrainedModel, block_path: str, renamed: Mapping[str, str]) -> list[LinearInfo]:
    tied_names = set(model.all_tied_weights_keys)
    infos = []
    for name, module in find_linears(model).items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        transposed = is_transposed(module)
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
        inside = name.startswith(f"{block_path}.")
        block = int(name[len(block_path) + 1 :].split(".", 1)[0]) if inside else None
        disk = next(
            (renamed[f"{name}.{leaf}"] for leaf in ("weight", "weight_packed") if f"{name}.{leaf}" in renamed), None
        )
        stem = disk.rsplit(".", 1)[0] if disk is not None else name
        tied = f"{name}.weight" in tied_names
        local = name.removeprefix(f"{block_path}.{block}.")
        infos.append(LinearInfo(name, local, stem, int(out_features), int(in_features), transposed, block, tied))
    return infos
