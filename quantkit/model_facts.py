"""A model's quantized layers as the rules of loaders.json look at them, planned or on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from quantkit.loaders import Kind, LayerFacts, layer_facts, relations
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton


def model_facts(
    skeleton: Skeleton,
    format_name: str,
    schemes: Mapping[str, QuantScheme],
    dtype: torch.dtype,
    *,
    tied: Collection[str],
) -> Iterator[LayerFacts]:
    """Of every quantized layer and embedding, with groups in the order of its columns.

    Args:
        skeleton: the model.
        format_name: of the checkpoint.
        schemes: of the quantized layers, by module name.
        dtype: of the model.
        tied: the embeddings whose codes are those of a tied head too.
    """
    experts = {info.name: info.expert.module for info in skeleton.linears if info.expert is not None}
    related = relations({info.name: schemes.get(info.name) for info in skeleton.linears}, experts)
    of_experts = {schemes.get(name) for name in experts}
    uneven = bool(skeleton.opaque_experts) or None in of_experts or len(of_experts) > 1
    head, used = skeleton.head_name(), set(schemes.values())
    for info in skeleton.layers:
        if info.name in schemes:
            yield layer_facts(
                info.name,
                format_name,
                schemes[info.name],
                kind=_kind(info, head, tied),
                related=related.get(info.name, ("none", "none")),
                uneven_experts=uneven,
                used=used,
                dtype=dtype,
            )


def _kind(info: LinearInfo, head: str | None, tied: Collection[str]) -> Kind:
    if info.embedding:
        return "tied-embedding" if info.name in tied else "embedding"
    if info.expert is not None:
        return "expert"
    return "head" if info.name == head else "conv1d" if info.transposed else "linear"
