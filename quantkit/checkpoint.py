"""Reading and writing model directories: safetensors only, lazily and in bounded memory, atomically.

Directories come from strangers, so file names, headers and sizes are checked before anything is read from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import CheckpointError, InterruptedRunError, UnreadFormatError, message
from quantkit.safetensors_header import INTEGERS_ONLY, TensorInfo, read_header
from quantkit.strict_json import read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Where AutoGPTQ and AutoAWQ wrote what is now in config.json, and AutoRound and GPTQModel write it besides.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_MODELOPT_FILE = "hf_quant_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TAIL_BYTES = 2**20
_CHECKED_AT_ONCE = 2**20  # values


@dataclass(frozen=True, slots=True)
class Slice:
    """A matrix within a tensor of stacked matrices: ``tensor[index, start:stop]``."""

    tensor: str
    index: int
    start: int
    stop: int


class Checkpoint:
    """A model directory: its config and the headers of its tensors; the tensors themselves are read on demand.

    Attributes:
        path: the directory.
        config: config.json.
        tensors: name -> TensorInfo, in sorted order.

    Raises:
        CheckpointError: missing, unreadable, truncated or contradictory files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_links(path)
        self.config = read_json(path / CONFIG, missing="a model directory holds config.json and *.safetensors files")
        self.tensors = dict(sorted(_read_headers(path).items()))
        self._slices: dict[str, Slice] = {}

    def split(self, slices: Mapping[str, Slice]) -> Checkpoint:
        """The same directory with stacked tensors taken apart: they are gone from ``tensors``, their slices are there.

        Args:
            slices: name -> slice; together they cover every tensor that they are of. A name must not be in use.

        Raises:
            CheckpointError: a name that is another tensor's.
        """
        stacked = {part.tensor for part in slices.values()}
        parts = {}
        for name, part in slices.items():
            if name in self.tensors:
                raise CheckpointError(message(str(self.path), f"{name} and {part.tensor} are both there", "keep one"))
            whole = self.tensors[part.tensor]
            parts[name] = TensorInfo(whole.file, whole.dtype, (part.stop - part.start, *whole.shape[2:]))
        view = copy(self)
        kept = {name: info for name, info in self.tensors.items() if name not in stacked}
        view.tensors = dict(sorted({**kept, **parts}.items()))
        view._slices = {**self._slices, **slices}
        return view

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the safetensors files, sorted."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of most floating-point parameters, and float32 in place of float64."""
        counts: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
        common = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
        return torch.float32 if common == torch.float64 else common

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization_config``: of config.json, or of the file that older programs wrote; None: it is dense.

        Raises:
            CheckpointError: not an object, or unreadable.
            UnreadFormatError: of a program that writes neither file.
        """
        if self.config.get("quantization_config") is not None:
            config = self.config["quantization_config"]
            if not isinstance(config, dict):
                where = f"{self.path}/{CONFIG}: quantization_config"
                raise CheckpointError(message(where, "is not an object", "repair config.json"))
            return config
        if (self.path / _MODELOPT_FILE).is_file():
            what = "quantized by ModelOpt (FP8, NVFP4, ...), which is not read"
            raise UnreadFormatError(message(f"{self.path}/{_MODELOPT_FILE}", what, INTEGERS_ONLY))
        if not any(name.endswith(".qweight") for name in self.tensors):
            return None
        there = next((name for name in QUANTIZATION_FILES if (self.path / name).is_file()), None)
        if there is None:
            what = "no quantization_config, and quantized weights (qweight) in its files"
            raise CheckpointError(
                message(str(self.path / CONFIG), what, f"add it, or {' or '.join(QUANTIZATION_FILES[:2])}")
            )
        return read_json(self.path / there, missing="")

    def read(self, names: Iterable[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Read these tensors into memory of their own (no mapped pages stay behind).

        Args:
            names: tensor names; a name that is not there is a KeyError.
            device: where to.

        Raises:
            CheckpointError: unreadable, or a floating-point tensor that holds NaN or inf.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with _opened(self.path / file) as handle:
                for name in members:
                    tensor = self._tensor(handle, name).clone()
                    check_finite(f"{self.path / file}, {name}", tensor)
                    found[name] = tensor.to(device)
        return found

    def _tensor(self, handle: Any, name: str) -> Tensor:
        part = self._slices.get(name)
        if part is None:
            return cast(Tensor, handle.get_tensor(name))
        return cast(Tensor, handle.get_slice(part.tensor)[part.index, part.start : part.stop])

    def fingerprint(self) -> str:
        """sha256 over config.json and over the size, the header and the last MiB of every safetensors file."""
        sha = hashlib.sha256((self.path / CONFIG).read_bytes())
        for file in self.files:
            path = self.path / file
            size = path.stat().st_size
            sha.update(f"{file} {size}".encode())
            with path.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                sha.update(handle.read(length))
                handle.seek(max(size - _TAIL_BYTES, 0))
                sha.update(handle.read())
        return sha.hexdigest()

    def other_files(self) -> tuple[Path, ...]:
        """Small files to carry along: all but the weights, their index and the configs; no directories, no pickles."""
        skipped = {CONFIG, INDEX, *QUANTIZATION_FILES, *self.files}
        pickles = {p.name for pattern in _PICKLES for p in self.path.glob(pattern)}
        return tuple(
            p
            for p in sorted(self.path.iterdir())
            if p.is_file() and p.name not in skipped | pickles and not p.name.endswith((".safetensors", ".gguf"))
        )


def check_finite(where: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or inf.

    Raises:
        CheckpointError: it holds one.
    """
    if not tensor.dtype.is_floating_point:
        return
    # In pieces: of the whole of an embedding, isfinite would hold a copy and three masks.
    bad = sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.reshape(-1).split(_CHECKED_AT_ONCE))
    if bad:
        raise CheckpointError(
            message(where, f"{bad} of {tensor.numel()} values are NaN or inf", "repair or re-download the model")
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: it holds either what it held before or all of ``data``.

    Raises:
        InterruptedRunError: the disk is full or refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _disk_error(path, error) from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically, on stable storage when this returns.

    Raises:
        InterruptedRunError: the disk is full or refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, part, metadata={"format": "pt"})
        part.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
        _sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise _disk_error(path, error) from error


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write ``model.safetensors.index.json`` into the directory ``path``."""
    write_json(path / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def _disk_error(path: Path, error: Exception) -> InterruptedRunError:
    return InterruptedRunError(
        message(str(path), f"cannot be written ({error})", "free disk space or choose another --output")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_links(path: Path) -> None:
    """No entry of a directory is a link to outside of it, where a stranger's link could lead to a user's own files.

    The hub's cache is an exception: its snapshots are links into the ``blobs`` beside them.

    Raises:
        CheckpointError: one is.
    """
    home = path.resolve()
    allowed = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if not entry.is_symlink():
            continue
        try:
            target = entry.resolve()
        except (OSError, RuntimeError):  # a circle
            target = Path("/")
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                message(
                    str(path), f"{entry.name} is a link to outside of the directory", "put the file itself in its place"
                )
            )


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    weight_map = _weight_map(path)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())) if weight_map is not None else [_single_file(path)]:
        for name, info in read_header(path / file).items():
            if name in tensors:
                raise CheckpointError(
                    message(str(path), f"{name} stands in {tensors[name].file} and in {file}", "keep one of them")
                )
            tensors[name] = info
    lost = sorted(
        name for name, file in (weight_map or {}).items() if tensors.get(name) is None or tensors[name].file != file
    )
    if lost:
        raise CheckpointError(
            message(
                str(path / INDEX),
                f"{len(lost)} tensors are not where it says, such as {lost[0]}",
                "re-download the model",
            )
        )
    if not tensors:
        raise CheckpointError(message(str(path), "its safetensors files hold no tensor", "re-download the model"))
    return tensors


def _weight_map(path: Path) -> dict[str, str] | None:
    """The index's weight map, its file names checked; None for a single file."""
    if not (path / INDEX).is_file():
        if (path / _single_file(path)).is_file():
            return None
        pickled = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
        what = (
            f"only pickled weights are there ({', '.join(pickled[:3])}), which can run code when opened"
            if pickled
            else "no weights"
        )
        raise CheckpointError(message(str(path), what, f"give a directory with {SINGLE} or {INDEX}"))
    weight_map = read_json(path / INDEX, missing="").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            message(str(path / INDEX), "has no weight_map of names to files", "re-download the model")
        )
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable() or len(file) > 255:
            raise CheckpointError(
                message(
                    str(path / INDEX),
                    f"names the file {file[:80]!a}",
                    "only *.safetensors files in the same directory are read",
                )
            )
    return weight_map


def _single_file(path: Path) -> str:
    """The file of a model in one file: AutoGPTQ called it ``gptq_model-4bit-128g.safetensors`` and the like."""
    others = [p.name for p in path.glob("gptq_model*.safetensors")]
    return others[0] if len(others) == 1 and not (path / SINGLE).is_file() else SINGLE


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise CheckpointError(
            message(str(path), f"is not a whole safetensors file ({error}; {size})", "re-download or repair it")
        ) from error
