"""quantkit as a quantizer of transformers: what from_pretrained and save_pretrained call for a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.base import HfQuantizer

from quantkit.checkpoint import Checkpoint
from quantkit.embedding import QuantEmbedding
from quantkit.errors import CheckpointError, InputError, message
from quantkit.experts import DOWN, GATE_UP, LEAVES, SplitExperts, disk_leaves
from quantkit.formats import format_of
from quantkit.joining import separated
from quantkit.linear import QuantLinear
from quantkit.skeleton import Skeleton, forget_ties, open_skeleton
from quantkit.stored import stored_layers
from quantkit.transformers.packed import PackedEmbedding, PackedLayer, PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "quantkit"


class QuantkitQuantizer(HfQuantizer):
    """Opens any checkpoint that quantkit reads; quantized layers become :class:`quantkit.QuantLinear`.

    Nothing is dense on the way: transformers places each layer's tensors as they are on disk, and then one layer at a
    time is packed for its kernel backend. Layers that a device map sends to the disk, or from an accelerator to the
    CPU, stay as they are on disk and are decoded for each call.
    """

    requires_calibration = True  # to quantize is what quantkit.quantize is for

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._on_disk: dict[str, Any] = quantization_config.to_dict()
        self._format = format_of(self._on_disk)
        self._split_leaves: dict[str, str] = {}
        self._ties: dict[str, str] = {}  # a head that has its embedding's codes -> that embedding

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,  # noqa: ARG002 - transformers' own
    ) -> PreTrainedModel:
        """Put a :class:`PackedLayer` in the place of every layer that is quantized on disk."""
        if not checkpoint_files:
            raise CheckpointError(
                message("from_pretrained", "no files to read quantized weights from", "give a directory or a hub id")
            )
        compute = dtype if dtype is not None else torch.get_default_dtype()
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        skeleton = open_skeleton(checkpoint, compute)
        stored = stored_layers(skeleton, self._format, self._on_disk)
        schemes = stored.schemes
        if any(info.expert is not None and info.name in schemes for info in skeleton.linears):
            _check_no_stack(checkpoint)
            self._split_experts(model, skeleton, compute)
        embeddings = {info.stem: info.name for info in skeleton.embeddings}
        for info in skeleton.layers:
            scheme = schemes.get(info.name)
            if scheme is None:
                continue
            if info.tied and info.stem in embeddings:
                self._tie(model, info.name, embeddings[info.stem])
                continue
            stored.check_size(info)  # before transformers reads them
            tensors = {name.rpartition(".")[2]: skeleton.checkpoint.tensors[name] for name in stored.names(info)}
            shape = (info.out_features, info.in_features)
            name = _name_in(model, info.name)
            packed: PackedLayer
            if info.embedding:
                dense = model.get_submodule(name)
                packed = PackedEmbedding(dense, info.name, shape, scheme, self._format, tensors, compute)
                forget_ties(model, name)
            else:
                packed = PackedLinear(info.name, shape, scheme, self._format, tensors, compute)
            model.set_submodule(name, packed)
            _nothing_to_initialize(model.get_submodule(name.rpartition(".")[0]))
        return model

    def _tie(self, model: PreTrainedModel, head: str, embedding: str) -> None:
        """Put nothing in the place of a head that has its embedding's codes; AutoModel's have no head."""
        if any(name == head for name, _ in model.named_modules()):
            model.set_submodule(head, nn.Identity())
            self._ties[head] = embedding

    def _split_experts(self, model: PreTrainedModel, skeleton: Skeleton, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        rules = [r for r in get_model_conversion_mapping(skeleton.model) if isinstance(r, WeightConverter)]
        for info in skeleton.experts:
            self._split_leaves.update(disk_leaves(info, rules) or {})
            name = _name_in(model, info.name)
            split = SplitExperts(model.get_submodule(name), info, dtype)
            _nothing_to_initialize(split.gating)
            model.set_submodule(name, split)

    def update_weight_conversions(
        self,
        weight_conversions: list[Any],
        model: PreTrainedModel | None = None,  # noqa: ARG002 - not given by transformers 5.17 to 5.19
    ) -> list[Any]:
        """Experts that stand one by one are not stacked on loading, only renamed."""
        if not self._split_leaves:
            return weight_conversions  # there is nothing else to deserialize
        stacks = (GATE_UP, DOWN)
        kept = [
            rule
            for rule in weight_conversions
            if not (isinstance(rule, WeightConverter) and rule.target_patterns[0].endswith(stacks))
        ]
        names = [
            WeightRenaming(rf"experts\.(\d+)\.{disk}\.", rf"experts.\1.{leaf}.")
            for leaf, disk in self._split_leaves.items()
            if leaf != disk
        ]
        assert set(self._split_leaves) == set(LEAVES)
        return [*kept, *names]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:  # noqa: ARG002
        """Pack layer after layer for its backend; what it was loaded into is freed at once."""
        for head, embedding in self._ties.items():
            source = model.get_submodule(embedding)
            assert isinstance(source, PackedEmbedding)
            if not source.is_here:
                what = f"{head} has its codes, and it is offloaded"
                raise CheckpointError(message(embedding, what, "let the device map keep it in memory"))
            _put(model, head, QuantLinear(source.quantized(), dtype=source.dtype).train(source.training))
        for name in [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]:
            packed = model.get_submodule(name)
            assert isinstance(packed, PackedLayer)
            if not packed.is_here:
                continue
            _put(model, name, packed.unpacked().train(packed.training))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """For save_pretrained: every tensor in the checkpoint's own format, the codes those that were loaded.

        Beside the model, all its quantized weights are in memory once more, packed as on disk.
        """
        state: dict[str, Tensor] = {}
        for name, module in separated(model, remove_duplicate=False):
            if name in self._ties:
                continue  # its codes are the embedding's
            if isinstance(module, QuantLinear | QuantEmbedding):
                tensors = self._encoded(module)
            else:
                tensors = _own_tensors(module)
            state.update({f"{name}.{leaf}" if name else leaf: tensor for leaf, tensor in tensors.items()})
        return state, {}

    def _encoded(self, layer: QuantLinear | QuantEmbedding) -> dict[str, Tensor]:
        bias = layer.bias if isinstance(layer, QuantLinear) else None
        return {**self._format.encode(layer.quantized()), **({} if bias is None else {"bias": bias})}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """For model.dequantize(): dense layers of the same weights, one after another."""
        for name, module in separated(model):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, _dense(module, dtype or module.spec.dtype))
            elif isinstance(module, QuantEmbedding):
                model.set_submodule(name, _dense_embedding(name, module, dtype or module.dtype))
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes the checkpoint's own format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are: gradients pass through the quantized layers to their inputs."""
        return True


def _put(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of what stood for it, with the hook of a device map that places this very layer."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    model.set_submodule(name, layer)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer.to(getattr(hook, "execution_device", None)), hook)


def _check_no_stack(checkpoint: Checkpoint) -> None:
    stacked = next((name for name in checkpoint.tensors if name.endswith((f".{GATE_UP}", f".{DOWN}"))), None)
    if stacked is not None:
        what = f"{stacked} stacks dense experts, and others are quantized one by one"
        raise CheckpointError(message(str(checkpoint.path), what, "open it with quantkit.load"))


def _name_in(model: PreTrainedModel, name: str) -> str:
    """A causal model's module name in a model that may lack the outermost prefix (AutoModel's)."""
    shorter = name.removeprefix(f"{model.base_model_prefix}.")
    names = {found for found, _ in model.named_modules()}
    return name if name in names or shorter not in names else shorter


def _nothing_to_initialize(module: nn.Module) -> None:
    """Keep transformers from initializing, through this module, weights that are not there any more."""
    if not module._parameters:
        module._is_hf_initialized = True  # type: ignore[assignment]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module itself, as a state_dict has them."""
    buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {n: t.detach() for n, t in {**module._parameters, **buffers}.items() if t is not None}


def _dense_embedding(name: str, layer: QuantEmbedding, dtype: torch.dtype) -> nn.Embedding:
    if layer.embed_scale is not None:
        what = "scales its rows, which a dense nn.Embedding does not"
        raise InputError(message(f"{name}: dequantize", what, "load the original model"))
    weight = layer.dequantize().to(dtype)
    dense = nn.Embedding.from_pretrained(weight, padding_idx=layer.padding_idx)
    return cast(nn.Embedding, dense.train(layer.training))


def _dense(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return dense.train(layer.training)
