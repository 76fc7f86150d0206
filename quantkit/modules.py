"""quantize_module(): any torch module in place, by RTN, or with data by GPTQ; no transformers, no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantkit.capture import Measurement
from quantkit.errors import CalibrationError, InputError, SchemeError, message
from quantkit.layer_plan import LayerPlan
from quantkit.linear import QuantLinear, dense_weight
from quantkit.replacing import check_targets, leave_fused_paths, linear_targets
from quantkit.report import LayerRecord
from quantkit.scheme import QuantScheme, parse_scheme
from quantkit.skeleton import LinearInfo
from quantkit.solvers import GPTQ, RTN
from quantkit.solving import solve_group
from quantkit.stats import Stat

_WHERE = "quantize_module"


def quantize_module(
    module: nn.Module,
    scheme: QuantScheme | str,
    *,
    solver: RTN | GPTQ | None = None,
    data: Iterable[Any] | None = None,
    call: Callable[[nn.Module, Any], object] | None = None,
    skip: Callable[[str, nn.Module], bool] | Sequence[str] = (),
    backend: str | None = None,
) -> list[LayerRecord]:
    """Quantize the linear layers of a module in place: a vision transformer, an MLP, any model that can be called.

    With GPTQ, layers are solved in the order in which they run, each from the inputs that the layers before it give
    once they are quantized; layers that read the same input are solved together. For each such input the module runs
    once over all data.

    Memory, beside the module and one batch: the statistics of one input (float32 [in, in]) with what solving it takes,
    and the quantized layers, which stand beside the dense ones until all are done. If anything fails, the module is as
    it was.

    Args:
        module: run in eval mode and without gradients; its mode is restored.
        scheme: a scheme or its name, such as ``w4a16_g128``; ``w8a8_static`` needs data with RTN, too.
        solver: ``GPTQ(...)`` or ``RTN()``; None is GPTQ where there is data, and RTN where there is none.
        data: batches, such as a DataLoader or a list; walked several times, so not a generator.
        call: how the module is run on a batch; None: ``module(batch)``, or ``module(**batch)`` for a mapping.
            For batches of inputs and labels: ``lambda module, batch: module(batch[0])``.
        skip: what stays dense, as in :func:`quantkit.replace_linears`, which also says what is not replaced.
        backend: a kernel backend by name; None is the first that can run each layer.

    Returns:
        One record a layer, in the order of solving: losses, errors, tokens seen, notes.

    Raises:
        SchemeError: shapes that the scheme does not divide (all are listed).
        CalibrationError: no data where the solver needs some, data that can be walked only once, or a layer that never
            runs on them.
        HessianError: with the layer's name.
        KernelError: no backend can run a layer.
        InputError: see :func:`quantkit.replace_linears`; or GPTQ's drift correction, for which there is no
            full-precision model here.
    """
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    method = solver if solver is not None else (RTN() if data is None else GPTQ())
    _check_request(wanted, method, data)
    targets = linear_targets(module, skip)
    check_targets(targets, wanted, backend)
    layers = {name: _layer_plan(name, linear, wanted, method) for name, linear in _once(targets).items()}
    if not layers:
        return []
    run = call if call is not None else _run
    needs_data = any(layer.needs for layer in layers.values())
    groups = _groups(module, layers, data or (), run) if needs_data else [[name] for name in layers]
    records: list[LayerRecord] = []
    with _restored_on_error(module, targets):
        for names in groups:
            records += _solve(module, {name: layers[name] for name in names}, targets, data or (), run, backend)
    leave_fused_paths(module)
    return records


def _check_request(scheme: QuantScheme, solver: RTN | GPTQ, data: Iterable[Any] | None) -> None:
    if Stat.DRIFT in solver.needs:
        fix = "leave drift_correction at 0, or use quantkit.quantize"
        raise InputError(message(_WHERE, "drift correction needs a full-precision model beside this one", fix))
    if data is None and (solver.needs or scheme.act_static):
        what = f"{solver.name if solver.needs else scheme} needs calibration data"
        raise CalibrationError(message(_WHERE, what, "give data, or use RTN() and dynamic activations"))
    if data is not None and iter(data) is data:
        raise CalibrationError(
            message(_WHERE, "data is an iterator, which ends after one walk", "give a list or a DataLoader")
        )


def _once(targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Each layer under the first of its names."""
    seen: dict[nn.Module, str] = {}
    for name, linear in targets.items():
        seen.setdefault(linear, name)
    return {name: linear for linear, name in seen.items()}


def _layer_plan(name: str, linear: nn.Module, scheme: QuantScheme, solver: RTN | GPTQ) -> LayerPlan:
    rows, columns = dense_weight(linear).shape
    info = LinearInfo(name, name, name, rows, columns, transposed=False, block=None, tied=False)
    return LayerPlan(info, scheme, solver)


def _run(module: nn.Module, batch: Any) -> object:
    return module(**batch) if isinstance(batch, Mapping) else module(batch)


@contextmanager
def _evaluating(module: nn.Module) -> Any:
    """Eval mode, and each module's own mode afterwards."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in module.modules():
            child.training = modes.get(child, module.training)


@contextmanager
def _restored_on_error(module: nn.Module, targets: Mapping[str, nn.Module]) -> Any:
    try:
        yield
    except BaseException:
        for name, linear in targets.items():
            module.set_submodule(name, linear)
        raise


def _groups(
    module: nn.Module, layers: Mapping[str, LayerPlan], data: Iterable[Any], run: Callable[[nn.Module, Any], object]
) -> list[list[str]]:
    """Layers by the input that they share, in the order in which they run; walks the data until all have run."""
    probe = Measurement({name: module.get_submodule(name) for name in layers}, frozenset())
    empty = True
    with _evaluating(module), probe.hooked():
        for batch in data:
            empty = False
            with probe.one_pass():
                run(module, batch)
            if len(probe.inputs) == len(layers):
                break
    if empty:
        raise CalibrationError(message(_WHERE, "data holds no batch", "give at least one"))
    idle = [name for name in layers if name not in probe.inputs]
    if idle:
        what = f"{len(idle)} layers never ran on the data, such as {idle[0]}"
        raise CalibrationError(message(_WHERE, what, "give data that reach them, or skip them"))
    return probe.groups()


def _solve(
    module: nn.Module,
    layers: Mapping[str, LayerPlan],
    targets: Mapping[str, nn.Module],
    data: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    backend: str | None,
) -> list[LayerRecord]:
    """Measure the common input of these layers, solve them and put them in, under all their names."""
    dense = {name: targets[name] for name in layers}
    needs = frozenset[Stat]().union(*(layer.needs for layer in layers.values()))
    measured = Measurement(dense, needs)
    if needs:
        with _evaluating(module), measured.hooked():
            for batch in data:
                with measured.one_pass():
                    run(module, batch)
    first = next(iter(dense))
    weights = [dense_weight(linear) for linear in dense.values()]
    dtype = torch.float32 if weights[0].dtype == torch.float64 else weights[0].dtype
    try:
        solved = solve_group(list(layers.values()), weights, measured.inputs.get(first), weights[0].device, dtype)
    except SchemeError as error:
        raise SchemeError(f"{', '.join(layers)}: {error}") from error
    for linear, result in zip(dense.values(), solved, strict=True):
        bias = linear.bias if isinstance(linear.bias, torch.Tensor) else None
        layer = QuantLinear(result.weight, bias, dtype=dense_weight(linear).dtype, backend=backend)
        for name in [name for name, target in targets.items() if target is linear]:
            module.set_submodule(name, layer.train(linear.training))
    return [result.record for result in solved]
