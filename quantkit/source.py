"""What the user's words mean: which directory a model is, which device, which dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.errors import CheckpointError, RecipeError, first_line, message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
BUILTIN_PATH = Path(__file__).parent / "builtin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a model directory holds besides pickles and other frameworks' weights, which quantkit never reads.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_HUB_IGNORED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "onnx/*", "original/*", "metal/*"]


def resolve_model(model: str | Path) -> Path:
    """The local directory of a model.

    Args:
        model: ``builtin``, a local directory, or a hub id such as ``org/name`` (fetched through huggingface_hub,
            which honours ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``).

    Raises:
        CheckpointError: no such directory and no such repository, or the hub cannot be reached.
    """
    if str(model) == BUILTIN:
        return BUILTIN_PATH
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            message(str(model), "is a file, not a model directory", "give the directory that holds config.json")
        )
    if not _is_hub_id(str(model)):
        raise CheckpointError(
            message(
                str(model),
                "no such directory",
                "give a model directory, a hub id such as org/name, or the word builtin",
            )
        )
    return _snapshot(str(model))


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device, or else the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        placed = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(
            message("--device", f"{device!r} is not a device", "use auto, cpu, cuda or cuda:N")
        ) from error
    if placed.type not in ("cpu", "cuda") or (
        placed.type == "cuda" and (placed.index or 0) >= torch.cuda.device_count()
    ):
        raise RecipeError(
            message("--device", f"{device!r} is not here ({torch.cuda.device_count()} CUDA devices)", "use auto or cpu")
        )
    return placed


def resolve_dtype(dtype: str, own: torch.dtype) -> torch.dtype:
    """A floating-point dtype by name; ``auto`` is ``own``.

    Raises:
        RecipeError: not one of the dtypes that models run in.
    """
    if dtype == "auto":
        return own
    if dtype not in DTYPES:
        raise RecipeError(message("--dtype", f"{dtype!r} is not a dtype to run in", f"use auto, {', '.join(DTYPES)}"))
    return DTYPES[dtype]


def open_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; remote code is never run.

    Raises:
        CheckpointError: there is none, or it cannot be opened.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        reason = first_line(error)
        raise CheckpointError(
            message(
                str(path),
                f"its tokenizer cannot be opened ({reason})",
                "add its files (tokenizer.json, tokenizer_config.json) to the model directory",
            )
        ) from error


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _snapshot(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            message(
                repo_id,
                "is no local directory, is not in the hub cache, and the hub cannot be reached",
                "check the spelling, the network, HF_HOME and HF_HUB_OFFLINE, or give a local directory",
            )
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(
            message(
                repo_id,
                f"cannot be fetched from the hub ({reason})",
                "check the id, your access (HF_TOKEN) and the network",
            )
        ) from error
