"""The quantized layers of a checkpoint: which they are, and each one's weight, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, message
from quantkit.formats import CheckpointFormat
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton

_BYTES_A_WEIGHT = 8  # the widest codes with a float32 scale for each of them
_SLACK = 2**20


@dataclass(frozen=True, slots=True)
class StoredLayers:
    """The quantized layers of a checkpoint, embeddings among them.

    Attributes:
        checkpoint: where their tensors are.
        format: how.
        schemes: of each layer by its module name, a head that has its embedding's codes last.
        members: stem -> the names on disk of all tensors ``stem.…``.
    """

    checkpoint: Checkpoint
    format: CheckpointFormat
    schemes: Mapping[str, QuantScheme]
    members: Mapping[str, tuple[str, ...]] = field(repr=False)

    def names(self, info: LinearInfo) -> tuple[str, ...]:
        """The names on disk of a layer's tensors, its bias among them."""
        return self.members.get(info.stem, ())

    def tied(self, skeleton: Skeleton) -> frozenset[str]:
        """The quantized embeddings whose codes are those of a tied head too."""
        heads = {info.stem for info in skeleton.linears if info.tied and info.name in self.schemes}
        return frozenset(info.name for info in skeleton.embeddings if info.stem in heads)

    def why_too_large(self, info: LinearInfo) -> str | None:
        """Why a layer's tensors are nothing to read: a stranger's may hold more than the memory; None: they can be."""
        total = sum(self.checkpoint.tensors[name].nbytes for name in self.names(info))
        most = _BYTES_A_WEIGHT * info.out_features * info.in_features + _SLACK
        if total <= most:
            return None
        return f"its tensors have {total} bytes, and a layer of {[info.out_features, info.in_features]} at most {most}"

    def check_size(self, info: LinearInfo) -> None:
        """Refuse a layer whose tensors are larger than the model's config allows, before one is read.

        Raises:
            CheckpointError: it is; see :meth:`why_too_large`.
        """
        reason = self.why_too_large(info)
        if reason is not None:
            raise CheckpointError(message(info.name, reason, "check config.json against the weights"))

    def read(self, info: LinearInfo) -> tuple[QuantizedTensor, Tensor | None]:
        """The quantized weight of a layer, and its bias as stored.

        Raises:
            CheckpointError: tensors that are missing or contradict the config or the model.
        """
        self.check_size(info)
        scheme = self.schemes[info.name]
        reason = scheme.why_not(info.in_features)
        if reason is not None:
            raise CheckpointError(f"{info.name}: {reason}")
        tensors = {n.rpartition(".")[2]: t for n, t in self.checkpoint.read(self.names(info)).items()}
        q = self.format.decode(info.name, tensors, scheme, (info.out_features, info.in_features))
        bias = tensors.get("bias")
        if bias is not None and list(bias.shape) != [info.out_features]:
            raise CheckpointError(
                message(f"{info.stem}.bias", f"is {list(bias.shape)}", f"the layer has {info.out_features} outputs")
            )
        return q, bias


def stored_layers(skeleton: Skeleton, fmt: CheckpointFormat, config: Mapping[str, Any]) -> StoredLayers:
    """The quantized layers of an opened checkpoint.

    Where the format's config does not name them all, or names a layer by one of its names only, what is on disk
    decides: a layer whose codes are not there is as it was. A tied head without codes of its own has its embedding's.

    Args:
        skeleton: of the checkpoint.
        fmt: its format.
        config: its ``quantization_config``.

    Raises:
        CheckpointError: a config that quantkit does not run.
    """
    members: dict[str, list[str]] = {}
    for name in skeleton.checkpoint.tensors:
        members.setdefault(name.rpartition(".")[0], []).append(name)
    embeddings = {info.stem: info.name for info in skeleton.embeddings}
    linears = [info for info in skeleton.linears if info.stem not in embeddings]
    by_name = fmt.read_config(config, _asked(linears), _asked(skeleton.embeddings))
    schemes: dict[str, QuantScheme] = {}
    for info in (*linears, *skeleton.embeddings):
        found = [by_name.get(name) for name in _known_as(info)]
        scheme = next((one for one in found if one is not None), None)
        if scheme is None:
            continue
        stored = any(f"{info.stem}.{leaf}" in skeleton.checkpoint.tensors for leaf in fmt.tensors)
        # A tied head that the config's targets cover is on disk as it was: it has no tensor at all.
        if stored or (fmt.config_names_layers and None not in found and not info.tied and not info.embedding):
            schemes[info.name] = scheme
    shared = {info.name: schemes.get(embeddings[info.stem]) for info in skeleton.linears if info.stem in embeddings}
    schemes.update({name: scheme for name, scheme in shared.items() if scheme is not None})
    return StoredLayers(skeleton.checkpoint, fmt, schemes, {stem: tuple(names) for stem, names in members.items()})


def _asked(infos: Iterable[LinearInfo]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for info in infos for name in _known_as(info)))


def _known_as(info: LinearInfo) -> tuple[str, ...]:
    """Its module name and the names that its tensors have on disk, which configs may use as well."""
    return tuple(dict.fromkeys((*info.known_as, info.stem)))
