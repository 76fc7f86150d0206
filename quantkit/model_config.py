"""A stranger's config.json: what transformers makes of it, and what it must not make transformers do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import CONFIG, Checkpoint
from quantkit.errors import CheckpointError, first_line, message
from quantkit.strict_json import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What transformers raises for values that it cannot use, besides its StrictDataclassError.
CONFIG_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)

# What a config says of the model's size, by key; other integers are ids and constants.
_LAYERS = re.compile(r"(?:n|num)(?:_\w+)?_layers?")
_EXPERTS = re.compile(r"(?:\w+_)?(?:n|num)(?:_\w+)?_experts")
_SIZES = re.compile(r"\w+_(?:size|dim|heads|rank)|n_embd|n_inner|n_head|d_model")
_POSITIONS = re.compile(r"max_position_embeddings|n_positions|n_ctx")
_MAX_POSITIONS = 2**27
_MAX_MASKED = 2**13
_SQUARE_MASKS = ("gpt_neo", "gpt_bigcode")  # of positions by positions, made when the model is
_CODES_IN_A_WORD = 16


def open_config(path: Path) -> PretrainedConfig:
    """The transformers config of a causal language model; remote code is never run.

    Raises:
        CheckpointError: unknown or malformed, or not a causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stated = read_json(path / CONFIG, missing="a model directory holds config.json")
    _check_no_hub_code(path, stated)
    wanted = stated.get("architectures") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise CheckpointError(message(str(path / CONFIG), "architectures is not a list of names", "repair it"))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (*CONFIG_ERRORS, OSError, ImportError, StrictDataclassError) as error:
        reason = first_line(error)
        raise CheckpointError(
            message(
                str(path / CONFIG),
                f"transformers cannot read it ({reason})",
                "only families that transformers knows without remote code are run",
            )
        ) from error
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (wanted and not causal.intersection(wanted)):
        what = ascii(", ".join(wanted)[:80] or f"model_type {config.model_type}").strip("'")
        raise CheckpointError(
            message(str(path), f"is not a causal language model ({what})", "give a model of a *ForCausalLM class")
        )
    return config


def check_numbers(checkpoint: Checkpoint) -> None:
    """The config is of a model that the files can hold: any other could take all memory, or hours, to build.

    Raises:
        CheckpointError: a number of layers or experts, a size or a length that is beyond them.
    """
    tensors = checkpoint.tensors.values()
    values = _CODES_IN_A_WORD * sum(info.numel for info in tensors)
    stacked = max((info.shape[0] for info in tensors if len(info.shape) == 3), default=0)
    masked = checkpoint.config.get("model_type") in _SQUARE_MASKS
    positions = _MAX_MASKED if masked else _MAX_POSITIONS
    limits = (
        (_LAYERS, len(tensors), f"{len(tensors)} tensors"),
        (_EXPERTS, max(len(tensors), stacked), f"{len(tensors)} tensors"),
        (_SIZES, values, f"room for {values} values"),
        (_POSITIONS, positions, f"at most {positions} positions read"),
    )
    for key, number in _numbers(checkpoint.config):
        for pattern, most, what in limits:
            if pattern.fullmatch(key) and not 0 <= number <= most:
                raise CheckpointError(
                    message(
                        str(checkpoint.path / CONFIG),
                        f"{key}={number} with {what}",
                        "check config.json against the weights",
                    )
                )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a config, with the key that it stands under; not of its quantization, which builds no model."""
    if isinstance(value, Mapping):
        for inner, member in value.items():
            if inner != "quantization_config":  # there a group_size of -1 is one group
                yield from _numbers(member, str(inner))
    elif isinstance(value, list):
        for member in value:
            yield from _numbers(member, key)
    elif type(value) is int:
        yield key, value


def _check_no_hub_code(path: Path, config: Mapping[str, Any]) -> None:
    """transformers would fetch a kernel that a config names by a hub id, and run it.

    Raises:
        CheckpointError: the config names one.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_no_hub_code(path, value)
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise CheckpointError(
                message(
                    str(path / CONFIG), f"{key} {str(value)[:80]!r} is code on a hub, which is not run", f"remove {key}"
                )
            )
