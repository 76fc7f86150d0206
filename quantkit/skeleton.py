"""A model without its weights: on the meta device, with the names that its tensors have on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.arch import find_blocks, is_linear, is_transposed
from quantkit.checkpoint import CONFIG, Checkpoint
from quantkit.disk_names import conversions, names_on_disk, split_checkpoint
from quantkit.embedding import why_not_embedding
from quantkit.errors import CheckpointError, message
from quantkit.experts import (
    ExpertsInfo,
    ExpertSlot,
    SplitExperts,
    disk_leaves,
    experts_info,
    find_routers,
    is_experts,
    why_not_experts,
)
from quantkit.formats import FORMATS
from quantkit.model_config import CONFIG_ERRORS, check_numbers, open_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
_LEAVES = ("weight", *(fmt.tensors[0] for fmt in FORMATS))  # of a dense layer's weight, then of codes


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """A layer with a weight that may be quantized: a linear layer, or an embedding.

    Attributes:
        name: module name in the model, such as ``model.layers.0.mlp.up_proj``.
        local: the name within its block, such as ``mlp.up_proj``; outside of the blocks, the name.
        stem: its name on disk: ``stem.weight`` is the tensor of a dense checkpoint.
        out_features: rows; of an embedding one a token or position.
        in_features: columns.
        transposed: the weight lies as [in, out] on disk (Conv1D).
        block: index of its decoder block; None outside of the blocks (the head).
        tied: its weight is another module's (an embedding's).
        router: it decides where tokens go in a mixture of experts, or how much of a shared expert they get.
        expert: its place in stacked experts; None for a module of its own.
        embedding: it looks rows up, and multiplies nothing.
    """

    name: str
    local: str
    stem: str
    out_features: int
    in_features: int
    transposed: bool
    block: int | None
    tied: bool
    router: bool = False
    expert: ExpertSlot | None = None
    embedding: bool = False

    @property
    def known_as(self) -> tuple[str, ...]:
        """Its module name, and where it is an expert's, the names that other loaders derive from its tensors' names.

        vLLM asks for an expert by its experts' prefix on disk and ``gate_proj``, ``up_proj`` or ``down_proj``, whatever
        the tensor is called there.
        """
        if self.expert is None:
            return (self.name,)
        by_prefix = f"{self.stem.rpartition('.')[0]}.{self.expert.leaf}"
        return tuple(dict.fromkeys((self.name, by_prefix, self.stem)))


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A causal language model on the meta device; of stacked experts each layer is a module of its own.

    Attributes:
        model: the transformers model; parameters on meta, buffers real.
        block_path: module name of the list of decoder blocks.
        blocks: the decoder blocks, in order.
        linears: every linear layer, in the model's order.
        disk_names: parameter (or persistent buffer) name -> tensor name on disk.
        checkpoint: the tensors on disk; stacked experts are taken apart there.
        experts: the modules of experts whose layers are among ``linears``.
        opaque_experts: modules of experts that cannot be quantized, and why.
        routers: modules beside the experts that decide where tokens go, whether linear layers or not.
        embeddings: the embeddings that can be quantized.
    """

    model: PreTrainedModel
    block_path: str
    blocks: tuple[nn.Module, ...]
    linears: tuple[LinearInfo, ...]
    disk_names: Mapping[str, str]
    checkpoint: Checkpoint
    experts: tuple[ExpertsInfo, ...] = ()
    opaque_experts: tuple[tuple[str, str], ...] = ()
    routers: tuple[str, ...] = ()
    embeddings: tuple[LinearInfo, ...] = ()

    @property
    def layers(self) -> tuple[LinearInfo, ...]:
        """All that may be quantized: the linear layers, then the embeddings."""
        return (*self.linears, *self.embeddings)

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


def open_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
    """Build the model on the meta device and match its parameters with the tensors on disk.

    Args:
        checkpoint: a dense or quantized model directory.
        dtype: what the parameters will be held in.

    Raises:
        CheckpointError: not a causal language model, or no list of decoder blocks.
    """
    check_numbers(checkpoint)
    config = open_config(checkpoint.path)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
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
    experts, opaque = _find_experts(model)
    renamed = names_on_disk(model, checkpoint, experts)
    checkpoint = split_checkpoint(model, checkpoint, experts, renamed)
    for info in experts:
        model.set_submodule(info.name, SplitExperts(model.get_submodule(info.name), info, dtype))
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    names += [n for n in model.state_dict() if n not in set(names)]
    disk_names = {n: renamed[n] for n in names if n in renamed}
    routers = tuple(router for info in experts for router in find_routers(model, info))
    linears = tuple(_linear_infos(model, found.path, renamed, experts, routers))
    embeddings = tuple(_embedding_infos(model, found.path, renamed))
    return Skeleton(
        model,
        found.path,
        found.blocks,
        linears,
        disk_names,
        checkpoint,
        tuple(experts),
        tuple(opaque),
        routers,
        embeddings,
    )


def embedding_modules(skeleton: Skeleton) -> dict[str, nn.Embedding]:
    """The embeddings of a model by name, whether or not they can be quantized."""
    return {name: module for name, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)}


def check_complete(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Every parameter of a dense model has its tensor on disk, of the same shape; tied ones may be absent.

    Raises:
        CheckpointError: with up to three of the tensors that do not match, or why experts on disk were not stacked.
    """
    wrong = []
    tied = set(getattr(skeleton.model, "all_tied_weights_keys", {}) or {})
    for name, disk, shape in expected_tensors(skeleton):
        if disk is None or disk not in checkpoint.tensors:
            _check_readable(skeleton, checkpoint, name)
            if name not in tied:
                wrong.append(f"{name} is missing")
        elif checkpoint.tensors[disk].shape != shape:
            wrong.append(f"{disk} is {list(checkpoint.tensors[disk].shape)} and should be {list(shape)}")
    if wrong:
        raise CheckpointError(
            message(
                str(checkpoint.path),
                f"{len(wrong)} tensors do not fit {type(skeleton.model).__name__}: {'; '.join(wrong[:3])}",
                "check config.json against the weights",
            )
        )


def _check_readable(skeleton: Skeleton, checkpoint: Checkpoint, missing: str) -> None:
    """A parameter that stacks experts may be missing because they lie one by one, and are not read so."""
    for experts, reason in skeleton.opaque_experts:
        if missing.startswith(f"{experts}.") and any(_SINGLE_EXPERT.search(name) for name in checkpoint.tensors):
            fix = "write it with its experts stacked: save_pretrained(DIR, save_original_format=False)"
            what = f"holds {experts} one by one, and its {reason}"
            raise CheckpointError(message(str(checkpoint.path), what, fix))


def expected_tensors(skeleton: Skeleton) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """Name in the model, name on disk if there is one, and shape of every parameter."""
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        yield name, skeleton.disk_names.get(name), tuple(parameter.shape)


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put these tensors into a module in place of its parameters and persistent buffers, by name."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        target = module.get_submodule(owner)
        if leaf in target._parameters:
            target._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            target._buffers[leaf] = tensor


def forget_ties(model: PreTrainedModel, embedding: str) -> None:
    """Let transformers tie no weight to an embedding that is quantized, and so has none to share, in place."""
    source = f"{embedding}.weight"
    for ties in ("all_tied_weights_keys", "_tied_weights_keys"):  # of this model, and of its class
        kept = {name: other for name, other in (getattr(model, ties) or {}).items() if other != source}
        setattr(model, ties, kept)


def set_weight(block: nn.Module, info: LinearInfo, weight: Tensor) -> None:
    """Put a weight [out, in] in the place of a layer's."""
    placed = weight.T if info.transposed else weight
    block.get_submodule(info.local)._parameters["weight"] = nn.Parameter(placed, requires_grad=False)


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
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            message(
                str(path / CONFIG),
                f"no {config.model_type} model can be built from it ({error})",
                "repair or re-download it",
            )
        ) from error
    model.eval().requires_grad_(False)
    return model


def _find_experts(model: nn.Module) -> tuple[list[ExpertsInfo], list[tuple[str, str]]]:
    """The modules of experts that can be quantized, and those that can not, with the reason."""
    converters = conversions(model)[1]
    good, opaque = [], []
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        reason = why_not_experts(module)
        if reason is None and disk_leaves(experts_info(name, module), converters) is None:
            reason = "transformers has no tensor names for its single experts"
        if reason is None:
            good.append(experts_info(name, module))
        else:
            opaque.append((name, f"{type(module).__name__} cannot be quantized: {reason}"))
    return good, opaque


def _linear_infos(
    model: PreTrainedModel,
    block_path: str,
    renamed: Mapping[str, str],
    experts: Sequence[ExpertsInfo],
    routers: Sequence[str],
) -> Iterator[LinearInfo]:
    slots = {slot.name: slot for info in experts for slot in info.slots()}
    tied = set(model.all_tied_weights_keys)
    for name, module in model.named_modules():
        if is_linear(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
            transposed = is_transposed(module)
            out_features, in_features = reversed(weight.shape) if transposed else weight.shape
            place = _place(name, block_path, renamed)
            yield LinearInfo(
                name,
                place[0],
                _shared_stem(model, name, renamed) or place[1],
                int(out_features),
                int(in_features),
                transposed,
                place[2],
                f"{name}.weight" in tied,
                name in routers,
                slots.get(name),
            )


def _embedding_infos(model: PreTrainedModel, block_path: str, renamed: Mapping[str, str]) -> Iterator[LinearInfo]:
    for name, module in model.named_modules():
        if why_not_embedding(module) is None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            rows, columns = weight.shape
            local, stem, block = _place(name, block_path, renamed)
            yield LinearInfo(name, local, stem, int(rows), int(columns), False, block, False, embedding=True)


def _shared_stem(model: PreTrainedModel, name: str, renamed: Mapping[str, str]) -> str | None:
    """Where the codes of a tied head lie that has none of its own: at its embedding; None: elsewhere."""
    source = model.all_tied_weights_keys.get(f"{name}.weight")
    if source is None or any(f"{name}.{leaf}" in renamed for leaf in _LEAVES):
        return None
    stem = source.removesuffix(".weight")
    codes = (renamed[f"{stem}.{leaf}"] for leaf in _LEAVES[1:] if f"{stem}.{leaf}" in renamed)
    return next((disk.rsplit(".", 1)[0] for disk in codes), None)


def _place(name: str, block_path: str, renamed: Mapping[str, str]) -> tuple[str, str, int | None]:
    """A layer's name within its block, its name on disk, and its block."""
    inside = name.startswith(f"{block_path}.")
    block = int(name[len(block_path) + 1 :].split(".", 1)[0]) if inside else None
    disk = next((renamed[f"{name}.{leaf}"] for leaf in _LEAVES if f"{name}.{leaf}" in renamed), None)
    stem = disk.rsplit(".", 1)[0] if disk is not None else name
    return name.removeprefix(f"{block_path}.{block}."), stem, block
