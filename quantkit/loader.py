"""load(): a model directory, dense or quantized, as a transformers model that runs on quantkit's backends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, message
from quantkit.experts import SplitExperts
from quantkit.formats import CheckpointFormat, format_of
from quantkit.linear import QuantLinear
from quantkit.model_config import CONFIG_ERRORS, open_config
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton, assign, check_complete, open_skeleton
from quantkit.source import resolve_device, resolve_dtype, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", backend: str | None = None
) -> PreTrainedModel:
    """Open a model for inference.

    Args:
        model: ``builtin``, a directory or a hub id; dense, or quantized in a format that quantkit reads.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the activations and of the weights that are not quantized; ``auto`` is the checkpoint's own.
        backend: the kernel backend by name; None is the first that can run each layer.

    Returns:
        A transformers model in eval mode; quantized layers are :class:`quantkit.QuantLinear`. Only one layer at a
        time is unpacked while it loads.

    Raises:
        CheckpointError: missing, truncated or contradictory files.
        KernelError: no backend can run a layer here.
    """
    path = resolve_model(model)
    checkpoint = Checkpoint(path)
    placed = resolve_device(device)
    compute = resolve_dtype(dtype, checkpoint.float_dtype)
    config = checkpoint.config.get("quantization_config")
    if config is None:
        check_complete(open_skeleton(checkpoint, compute), checkpoint)
        return _load_dense(path, placed, compute)
    if not isinstance(config, dict):
        raise CheckpointError(
            message(f"{path}/config.json: quantization_config", "is not an object", "repair config.json")
        )
    fmt = format_of(config)
    skeleton = open_skeleton(checkpoint, compute)
    checkpoint = skeleton.checkpoint
    for info in skeleton.experts:
        stacked = skeleton.model.get_submodule(info.name)
        _set_module(skeleton.model, info.name, SplitExperts(stacked, info, compute))
    schemes = fmt.read_config(config, tuple(info.name for info in skeleton.linears))
    taken = _put_quantized(skeleton, checkpoint, fmt, schemes, placed, compute, backend)
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            message(str(path), f"transformers cannot open it ({reason})", "repair or re-download it")
        ) from error
    model.to(device).eval()  # type: ignore[arg-type]
    return model


def _put_quantized(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    fmt: CheckpointFormat,
    schemes: dict[str, QuantScheme],
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
) -> set[str]:
    """Replace every quantized linear by a QuantLinear; returns the disk names of the tensors used."""
    members: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        members.setdefault(name.rpartition(".")[0], []).append(name)
    taken: set[str] = set()
    for info in skeleton.linears:
        scheme = schemes.get(info.name)
        if scheme is None or _is_dense(info, checkpoint):
            continue
        reason = scheme.why_not(info.in_features)
        if reason is not None:
            raise CheckpointError(f"{info.name}: {reason}")
        tensors = {n.rpartition(".")[2]: t for n, t in checkpoint.read(members.get(info.stem, [])).items()}
        q = fmt.decode(info.name, tensors, scheme, (info.out_features, info.in_features))
        bias = tensors.get("bias")
        layer = QuantLinear.from_quantized(
            q,
            None if bias is None else _checked_bias(info, bias).to(dtype),
            dtype=dtype,
            device=device,
            backend=backend,
        )
        _set_module(skeleton.model, info.name, layer)
        taken.update(members.get(info.stem, []))
    return taken


def _is_dense(info: LinearInfo, checkpoint: Checkpoint) -> bool:
    """A layer that the config's targets cover but that is on disk as it was: a tied head, which has no tensor."""
    return info.tied and not any(name.startswith(f"{info.stem}.weight_") for name in checkpoint.tensors)


def _checked_bias(info: LinearInfo, bias: Tensor) -> Tensor:
    if list(bias.shape) != [info.out_features]:
        raise CheckpointError(
            message(f"{info.stem}.bias", f"is {list(bias.shape)}", f"the layer has {info.out_features} outputs")
        )
    return bias


def _put_dense(
    skeleton: Skeleton, checkpoint: Checkpoint, taken: set[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Read everything else, one tensor at a time."""
    experts = {f"{info.name}.weight": f"{info.stem}.weight" for info in skeleton.linears if info.expert is not None}
    expected = {**dict(skeleton.model.named_parameters(remove_duplicate=False)), **dict(skeleton.model.named_buffers())}
    for name, disk in {**skeleton.disk_names, **experts}.items():
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


def _set_module(model: nn.Module, name: str, module: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
