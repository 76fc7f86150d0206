"""A model's quantized layers as the rules of loaders.json look at them, planned or on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from quantkit.loaders import Kind, LayerFacts, layer_facts, relations
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton


def model_facts(
    skeleton: Skeleton, format_name: str, schemes: Mapping[str, QuantScheme], dtype: torch.dtype
) -> Iterator[LayerFacts]:
    """Of every quantized layer, with groups in the order of its columns.

    Args:
        skeleton: the model.
        format_name: of the checkpoint.
        schemes: of the quantized layers, by module name.
        dtype: of the model.
    """
    experts = {info.name: info.expert.module for info in skeleton.linears if info.expert is not None}
    related = relations({info.name: schemes.get(info.name) for info in skeleton.linears}, experts)
    of_experts = {schemes.get(name) for name in experts}
    uneven = bool(skeleton.opaque_experts) or None in of_experts or len(of_experts) > 1
    head, used = skeleton.head_name(), set(schemes.values())
    for info in skeleton.linears:
        if info.name in schemes:
            yield layer_facts(
                info.name,
                format_name,
                schemes[info.name],
                kind=_kind(info, head),
                related=related[info.name],
                uneven_experts=uneven,
                used=used,
                dtype=dtype,
            )


def _kind(info: LinearInfo, head: str | None) -> Kind:
    if info.expert is not None:
        return "expert"
    return "head" if info.name == head else "conv1d" if info.transposed else "linear"
