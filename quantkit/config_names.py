"""Under which names a config lists layers, so that every loader finds those that it knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton, embedding_modules

_EMBEDDING = "Embedding"
_EXPERTS = r"re:.*\.experts\.\d+\..*"


def named_schemes(skeleton: Skeleton, layers: Iterable[tuple[LinearInfo, QuantScheme]]) -> dict[str, QuantScheme]:
    """Scheme of every quantized layer, by every name that other loaders may know it under.

    Where all embeddings of the model have one scheme, their class has it too: of many models vLLM does not tell the
    embedding its name (its pull request 45535).

    Where experts share one scheme and other layers have another, the experts are one pattern: transformers looks
    for it, and would decode the experts by the first group of the config without.
    """
    layers = list(layers)
    embedded = {info.name: scheme for info, scheme in layers if info.embedding}
    everywhere = len(embedded) == len(embedding_modules(skeleton)) and len(set(embedded.values())) == 1
    by_class = {_EMBEDDING: next(iter(embedded.values()))} if everywhere else {}
    of_experts = {scheme for info, scheme in layers if info.expert is not None}
    if len({scheme for _, scheme in layers}) == 1 or len(of_experts) != 1:
        return {**by_class, **{name: scheme for info, scheme in layers for name in info.known_as}}
    named = {info.name: scheme for info, scheme in layers if info.expert is None}
    return {**by_class, _EXPERTS: of_experts.pop(), **named}


def names_left_out(skeleton: Skeleton, skipped: Sequence[str]) -> tuple[str, ...]:
    """What stays as it is, by every name that other loaders may know it under."""
    names: dict[str, None] = {}
    known_as = {info.name: info.known_as for info in skeleton.linears}
    for name in skipped:
        on_disk = skeleton.disk_names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        routers = (name, on_disk) if name in skeleton.routers else (name,)
        names.update(dict.fromkeys(known_as.get(name, routers)))
    return tuple(names)
