"""The directory a run works in: next to the output, moved into its place when everything is verified.

    OUT.partial/run.json              what this run is; --resume continues only the same run
    OUT.partial/records/00000.json    the layer records of a shard, written before the shard
    OUT.partial/model-00001-of-….safetensors    a shard that is there is whole: it was renamed into place

``kill -9`` at any moment leaves whole shards and perhaps a ``*.part`` file, which is removed on resuming.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint import write_index, write_json, write_shard
from quantkit.errors import InterruptedRunError, OutputError, message
from quantkit.report import (
    BlockRecord,
    LayerRecord,
    block_from_dict,
    layer_from_dict,
    layer_to_dict,
    transform_from_dict,
    transform_to_dict,
)
from quantkit.safetensors_header import read_header
from quantkit.strict_json import read_json
from quantkit.transforms import TransformRecord

_RUN = "run.json"
_RECORDS = "records"


def check_output(output: Path, *, overwrite: bool, resume: bool, resumable: bool = True) -> None:
    """The output directory can be written, and nothing is lost that the user did not give up.

    Args:
        output: where the result is to be.
        overwrite: what is there may be replaced.
        resume: an interrupted run is to be continued.
        resumable: whether this kind of run can be; else the message does not offer it.

    Raises:
        OutputError: it can not, or would be.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(message(str(output), "is a file", "choose another --output"))
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            message(
                str(output),
                "is not empty",
                "choose another --output, or --overwrite to replace it at the end of the run",
            )
        )
    partial = partial_path(output)
    if partial.exists() and not (overwrite or resume):
        fix = "--resume continues it, --overwrite starts afresh" if resumable else "start afresh with --overwrite"
        raise OutputError(message(str(partial), "an interrupted run is there", fix))
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OutputError(message(str(output), f"{parent} is not a directory", "choose another --output"))


def partial_path(output: Path) -> Path:
    """Where the run that writes ``output`` works."""
    return output.with_name(output.name + ".partial")


class Staging:
    """A run's working directory.

    Args:
        output: where the result will be.
        num_shards: how many shards it will have.
        identity: everything that decides the bytes of the shards.
        resume: continue an interrupted run of the same identity; otherwise what is there is removed.

    Raises:
        OutputError: the interrupted run is another one, or the directory cannot be made.
    """

    def __init__(self, output: Path, num_shards: int, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.output, self.path, self.num_shards = output, partial_path(output), num_shards
        if self.path.exists() and not resume:
            shutil.rmtree(self.path)
        try:
            (self.path / _RECORDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                message(str(self.path), f"cannot be made ({error})", "choose another --output")
            ) from error
        plain = json.loads(json.dumps(identity))
        if (self.path / _RUN).exists():
            _same_run(self.path, read_json(self.path / _RUN, missing="start afresh with --overwrite"), plain)
        else:
            write_json(self.path / _RUN, plain)
        for part in self.path.glob("*.part"):
            part.unlink()

    def shard_name(self, shard: int) -> str:
        """File name of shard 0, 1, …"""
        return f"model-{shard + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def is_done(self, shard: int) -> bool:
        """Whether this shard is whole on disk."""
        return (self.path / self.shard_name(shard)).exists()

    def num_done(self) -> int:
        """Number of whole shards."""
        return sum(self.is_done(shard) for shard in range(self.num_shards))

    def write(
        self,
        shard: int,
        tensors: Mapping[str, Tensor],
        records: Sequence[LayerRecord],
        transforms: Sequence[TransformRecord] = (),
        tuned: Sequence[BlockRecord] = (),
    ) -> None:
        """Write a shard, atomically, its records first."""
        stored = {
            "layers": [layer_to_dict(record) for record in records],
            "transforms": [transform_to_dict(record) for record in transforms],
            "tuned": [asdict(record) for record in tuned],
        }
        write_json(self._records(shard), stored)
        write_shard(self.path / self.shard_name(shard), tensors)

    def records(self, shard: int) -> list[LayerRecord]:
        """The layer records of a shard that is done."""
        stored = read_json(self._records(shard), missing="start afresh with --overwrite")
        return [layer_from_dict(value) for value in stored["layers"]]

    def transforms(self, shard: int) -> list[TransformRecord]:
        """The transform records of a shard that is done."""
        stored = read_json(self._records(shard), missing="start afresh with --overwrite")
        return [transform_from_dict(value) for value in stored["transforms"]]

    def tuned(self, shard: int) -> list[BlockRecord]:
        """What tuning did to the block of a shard that is done."""
        stored = read_json(self._records(shard), missing="start afresh with --overwrite")
        return [block_from_dict(value) for value in stored["tuned"]]

    def _write_index(self) -> int:
        """Write the index of all shards; returns the bytes of their tensors."""
        weight_map, total = {}, 0
        for shard in range(self.num_shards):
            name = self.shard_name(shard)
            for tensor, info in read_header(self.path / name).items():
                weight_map[tensor] = name
                total += info.nbytes
        write_index(self.path, weight_map, total)
        return total

    def write_rest(self, files: Iterable[Path], configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Everything besides the shards: the index, the source's small files as they are, and configs.

        Args:
            files: to copy.
            configs: file name -> JSON values.

        Returns:
            bytes of the shards' tensors.

        Raises:
            InterruptedRunError: the disk is full.
        """
        try:
            for file in files:
                shutil.copyfile(file, self.path / file.name)
        except OSError as error:
            raise InterruptedRunError(
                message(str(self.path), f"cannot be written ({error})", "free disk space")
            ) from error
        total = self._write_index()
        for name, values in configs.items():
            write_json(self.path / name, dict(values))
        return total

    def publish(self) -> None:
        """Move the finished directory to the output's place; an older output is removed only after that."""
        old = self.output.with_name(self.output.name + ".old")
        if self.output.exists():
            if old.exists():
                shutil.rmtree(old)
            self.output.rename(old)
        self.path.rename(self.output)
        (self.output / _RUN).unlink()
        shutil.rmtree(self.output / _RECORDS)
        if old.exists():
            shutil.rmtree(old)

    def discard(self) -> None:
        """Remove the working directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _records(self, shard: int) -> Path:
        return self.path / _RECORDS / f"{shard:05d}.json"


def _same_run(path: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    changed = sorted(key for key in {*stored, *identity} if stored.get(key) != identity.get(key))
    if changed:
        raise OutputError(
            message(
                str(path),
                f"holds another run ({', '.join(changed)} changed)",
                "use the same model and options to resume, or --overwrite to start afresh",
            )
        )
