"""load(): a model directory, dense or quantized, as a transformers model that runs on quantkit's backends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from quantkit.checkpoint import Checkpoint
from quantkit.embedding import QuantEmbedding
from quantkit.errors import CheckpointError, first_line, message
from quantkit.formats import format_of
from quantkit.linear import QuantLinear
from quantkit.model_config import CONFIG_ERRORS, open_config
from quantkit.rounded_head import check_head_bits, round_head
from quantkit.skeleton import Skeleton, assign, check_complete, forget_ties, open_skeleton
from quantkit.source import resolve_device, resolve_dtype, resolve_model
from quantkit.stored import StoredLayers, stored_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    head_bits: int | None = None,
) -> PreTrainedModel:
    """Open a model for inference.

    Args:
        model: ``builtin``, a directory or a hub id; dense, or quantized in a format that quantkit reads.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the activations and of the weights that are not quantized; ``auto`` is the checkpoint's own.
        backend: the kernel backend by name; None is the first that can run each layer.
        head_bits: the output head is rounded to so many bits for its product, see
            :func:`quantkit.rounded_head.round_head`; None, or a head that is quantized already, leaves it as it is.

    Returns:
        A transformers model in eval mode; quantized layers are :class:`quantkit.QuantLinear`, quantized embeddings
        :class:`quantkit.QuantEmbedding`. Only one layer at a time is unpacked while it loads.

    Raises:
        CheckpointError: missing, truncated or contradictory files.
        KernelError: no backend can run a layer here.
        InputError: ``head_bits`` out of range, or of a model without a linear head.
    """
    check_head_bits(head_bits)
    opened = _load(model, device, dtype, backend)
    if head_bits is not None:
        round_head(opened, head_bits, backend=backend)
    return opened


def _load(model: str | Path, device: str, dtype: str, backend: str | None) -> PreTrainedModel:
    path = resolve_model(model)
    checkpoint = Checkpoint(path)
    placed = resolve_device(device)
    compute = resolve_dtype(dtype, checkpoint.float_dtype)
    config = checkpoint.quantization
    if config is None:
        check_complete(open_skeleton(checkpoint, compute), checkpoint)
        return _load_dense(path, placed, compute)
    fmt = format_of(config)
    skeleton = open_skeleton(checkpoint, compute)
    checkpoint = skeleton.checkpoint
    taken = _put_quantized(skeleton, stored_layers(skeleton, fmt, config), placed, compute, backend)
    _put_dense(skeleton, checkpoint, taken, placed, compute)
    return _finished(skeleton.model, path, placed)


def _load_dense(path: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    open_config(path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, SafetensorError, *CONFIG_ERRORS) as error:
        reason = first_line(error)
        raise CheckpointError(
            message(str(path), f"transformers cannot open it ({reason})", "repair or re-download it")
        ) from error
    model.to(device).eval()  # type: ignore[arg-type]
    return model


def _put_quantized(
    skeleton: Skeleton, stored: StoredLayers, device: torch.device, dtype: torch.dtype, backend: str | None
) -> set[str]:
    """Replace every quantized linear and embedding by quantkit's; returns the disk names of the tensors used."""
    taken: set[str] = set()
    for info in skeleton.layers:
        if info.name not in stored.schemes:
            continue
        q, bias = stored.read(info)
        layer: nn.Module
        if info.embedding:
            layer = QuantEmbedding.in_place_of(skeleton.model.get_submodule(info.name), q, dtype=dtype).to(device)
            forget_ties(skeleton.model, info.name)
        else:
            layer = QuantLinear.from_quantized(
                q, None if bias is None else bias.to(dtype), dtype=dtype, device=device, backend=backend
            )
        skeleton.model.set_submodule(info.name, layer)
        taken.update(stored.names(info))
    return taken


def _put_dense(
    skeleton: Skeleton, checkpoint: Checkpoint, taken: set[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Read everything else, one tensor at a time."""
    expected = {**dict(skeleton.model.named_parameters(remove_duplicate=False)), **dict(skeleton.model.named_buffers())}
    for name, disk in skeleton.disk_names.items():
        if disk in taken or name not in expected or disk not in checkpoint.tensors:
            continue
        if checkpoint.tensors[disk].shape != tuple(expected[name].shape):
            raise CheckpointError(
                message(
                    disk, f"is {list(checkpoint.tensors[disk].shape)}", f"the model's is {list(expected[name].shape)}"
                )
            )
        tensor = checkpoint.read([disk])[disk]
        assign(skeleton.model, {name: tensor.to(device, dtype if tensor.dtype.is_floating_point else tensor.dtype)})


def _finished(model: PreTrainedModel, path: Path, device: torch.device) -> PreTrainedModel:
    from transformers import GenerationConfig

    model.tie_weights()
    lost = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lost:
        raise CheckpointError(
            message(str(path), f"{len(lost)} tensors are missing, such as {lost[0]}", "re-download the checkpoint")
        )
    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except (OSError, *CONFIG_ERRORS) as error:
            where = f"{path}/generation_config.json"
            raise CheckpointError(message(where, f"cannot be read ({error})", "repair or remove it")) from error
    model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return model
