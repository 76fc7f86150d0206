"""replace_linears(): QuantLinear in the place of a model's linear layers, and which layers these are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from torch import nn

from quantkit.errors import InputError, KernelError, SchemeError, message
from quantkit.experts import is_experts
from quantkit.kernels import choose_backend
from quantkit.linear import QuantLinear, dense_weight, dynamic_scheme, is_conv1d, spec_of
from quantkit.scheme import QuantScheme


def replace_linears(
    model: nn.Module,
    scheme: QuantScheme | str,
    *,
    skip: Callable[[str, nn.Module], bool] | Sequence[str] = (),
    backend: str | None = None,
) -> dict[str, QuantLinear]:
    """Round every linear layer of a model to the nearest codes (RTN), in place.

    Replaced are nn.Linear, its subclasses that do not change its forward, and the Conv1D of transformers. These
    stay as they are: a layer whose weight another module that stays uses too (a head tied to an embedding), and the
    output projection of nn.MultiheadAttention, which reads that weight itself. The fused inference path of an
    nn.TransformerEncoderLayer reads its linears' dense weights, so a replaced layer's encoder stops taking it.

    Stacked experts (the weights of several in one parameter, as transformers holds them) are not layers of their own:
    they are refused unless they are skipped, so that none stays dense unseen.

    Nothing is touched before all layers have been checked and rounded; until then both forms are in memory.

    Args:
        model: any module, transformers or not.
        scheme: a scheme or its name, such as ``w4a16_g128``.
        skip: what stays dense: full names of modules, each with all below it, or a function of name and module.
        backend: a kernel backend by name; None is the first that can run each layer.

    Returns:
        Name -> layer, for every layer that was replaced; a module with two names has both.

    Raises:
        SchemeError: shapes that the scheme does not divide (all are listed), or weights that are not finite.
        InputError: a name in ``skip`` that the model does not have, stacked experts, or a model that is itself a
            linear layer.
        KernelError: no backend can run a layer.
    """
    wanted = dynamic_scheme(scheme)
    targets = linear_targets(model, skip)
    check_targets(targets, wanted, backend)
    made: dict[nn.Module, QuantLinear] = {}
    for name, linear in targets.items():
        if linear in made:
            continue
        try:
            made[linear] = QuantLinear.from_linear(linear, wanted, backend=backend)
        except SchemeError as error:
            raise SchemeError(f"{name}: {error}") from error
    for name, linear in targets.items():
        model.set_submodule(name, made[linear])
    leave_fused_paths(model)
    return {name: made[linear] for name, linear in targets.items()}


def linear_targets(model: nn.Module, skip: Callable[[str, nn.Module], bool] | Sequence[str]) -> dict[str, nn.Module]:
    """The layers to replace, under every name that they have; see :func:`replace_linears`.

    Raises:
        InputError: a name in ``skip`` that the model does not have, stacked experts, or a model that is itself a
            linear layer.
    """
    if _is_replaceable(model):
        what = f"the model is itself a {type(model).__name__}, which nothing holds"
        raise InputError(message("model", what, "use QuantLinear.from_linear"))
    skipped = _skip_rule(model, skip)
    _check_experts(model, skipped)
    attention = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    owned = {child for module in attention for child in module.children()}
    wanted = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_replaceable(module) and module not in owned and not skipped(name, module)
    }
    staying = set(model.modules()) - set(wanted.values())
    tied = {id(p) for module in staying for p in module.parameters(recurse=False)}
    return {name: module for name, module in wanted.items() if id(module.weight) not in tied}


def _check_experts(model: nn.Module, skipped: Callable[[str, nn.Module], bool]) -> None:
    stacked = [name for name, module in model.named_modules() if is_experts(module) and not skipped(name, module)]
    if stacked:
        what = f"{len(stacked)} modules stack the weights of several experts, such as {stacked[0]}"
        fix = "skip them, or quantize the model's directory with quantkit.quantize, which takes experts one by one"
        raise InputError(message("model", what, fix))


def check_targets(targets: Mapping[str, nn.Module], scheme: QuantScheme, backend: str | None) -> None:
    """Every layer can have the scheme and be run.

    Raises:
        SchemeError: shapes that the scheme does not divide; all are listed.
        KernelError: no backend can run a layer.
    """
    specs = {name: spec_of(dense_weight(linear), scheme) for name, linear in targets.items()}
    reasons = {name: scheme.why_not(spec.in_features) for name, spec in specs.items()}
    refused = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if refused:
        what = f"{len(refused)} of {len(targets)} layers cannot have {scheme} ({' | '.join(refused)})"
        raise SchemeError(message("scheme", what, "choose another group size or skip these layers"))
    for name, spec in specs.items():
        try:
            choose_backend(spec, backend)
        except KernelError as error:
            raise KernelError(f"{name}: {error}") from error


def _skip_rule(
    model: nn.Module, skip: Callable[[str, nn.Module], bool] | Sequence[str]
) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    names = (skip,) if isinstance(skip, str) else tuple(skip)
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in known:
            near = ", ".join(get_close_matches(name, known)) or "a name from model.named_modules()"
            raise InputError(message("skip", f"the model has no module {name!r}", f"did you mean {near}"))
    return lambda name, _: any(name == top or name.startswith(f"{top}.") for top in names)


def leave_fused_paths(model: nn.Module) -> None:
    """Clear the flags that let torch's encoder layers hand dense weights to a fused operator."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, QuantLinear) for child in module.children()
        ):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, QuantLinear) for child in module.modules()
        ):
            module.use_nested_tensor = False


def _is_replaceable(module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_linear or is_conv1d(module)
