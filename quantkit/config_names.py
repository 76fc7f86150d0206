"""Under which names a config lists layers, so that every loader finds those that it knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton

_EXPERTS = r"re:.*\.experts\.\d+\..*"


def named_schemes(layers: Iterable[tuple[LinearInfo, QuantScheme]]) -> dict[str, QuantScheme]:
    """Scheme of every quantized layer, by every name that other loaders may know it under.

    Where experts share one scheme and other layers have another, the experts are one pattern: transformers looks
    for it, and would decode the experts by the first group of the config without.
    """
    layers = list(layers)
    of_experts = {scheme for info, scheme in layers if info.expert is not None}
    if len({scheme for _, scheme in layers}) == 1 or len(of_experts) != 1:
        return {name: scheme for info, scheme in layers for name in info.known_as}
    named = {info.name: scheme for info, scheme in layers if info.expert is None}
    return {_EXPERTS: of_experts.pop(), **named}


def names_left_out(skeleton: Skeleton, skipped: Sequence[str]) -> tuple[str, ...]:
    """What stays as it is, by every name that other loaders may know it under."""
    names: dict[str, None] = {}
    known_as = {info.name: info.known_as for info in skeleton.linears}
    for name in skipped:
        on_disk = skeleton.disk_names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        routers = (name, on_disk) if name in skeleton.routers else (name,)
        names.update(dict.fromkeys(known_as.get(name, routers)))
    return tuple(names)
