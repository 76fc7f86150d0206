"""GPTQ: columns are rounded one by one, and each column's error is made up for by the columns that follow.

The algorithm is GPTQ's (arXiv:2210.17323, Algorithm 1). It is computed from one triangular factor of the Hessian
itself, never from its inverse. Number the columns backwards, so that the first one to be fixed has the last position,
and factor H = C D² Cᵀ with C lower-triangular and of unit diagonal. The loss of a row's errors e = w - ŵ is then
‖D Cᵀ e‖², and line i of Cᵀ e is

    e_i + Σ_{j>i} C_ji e_j  =  t_i - ŵ_i     with the target     t_i = w_i + Σ_{j>i} C_ji e_j,

a sum over the columns j that are already fixed. Rounding t_i minimises that line; going on to i - 1 is back
substitution, and the targets are what GPTQ's updates turn w into (the equivalence is shown as "GPTQ is Babai's nearest
plane algorithm", arXiv:2507.18553). One Cholesky factorisation replaces the factorisation, inversion and second
factorisation of the textbook form; the targets of a block of columns are one matrix product, and no step touches a
column that is not about to be rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from quantkit.errors import HessianError, RecipeError, message
from quantkit.grid import Grids, choose_qparams, dequantize, search_qparams
from quantkit.scheme import QuantScheme
from quantkit.solvers.base import Solution
from quantkit.solvers.descent import sweep
from quantkit.solvers.factor import Factor, check_finite, factorize
from quantkit.solvers.refit import refit
from quantkit.solvers.rounded import Rounded
from quantkit.solvers.rtn import RTN
from quantkit.stats import LayerStats, Stat

ActOrder = Literal["none", "static", "group"]
Fallback = Literal["none", "rtn"]
ScaleSearch = Literal["none", "mse", "hessian"]

MAX_SWEEPS = 100
_PANEL = 32  # columns within a block that are updated by one product; within a panel, by one product a column


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with lazy block updates.

    Attributes:
        damp_percent: this fraction of the mean diagonal is added to the Hessian's diagonal (0.01 is 1 %).
        damp_limit: while the damped Hessian is not positive definite, ``damp_percent`` is multiplied by 10, up to this.
            Each step is recorded. Equal to ``damp_percent``: no second try.
        fallback: what becomes of a layer whose Hessian stays not positive definite, or is zero: ``none`` stops the run
            with its name, ``rtn`` rounds it to nearest and records that.
        act_order: the order in which columns are fixed. ``static``: by decreasing diagonal of the Hessian (ties: the
            lower column first), with scales that were chosen beforehand from the original weights; the groups on disk
            are contiguous. ``none``: in their order on disk, with scales chosen at the start of each group from the
            updated weights. ``group``: by decreasing diagonal, and consecutive columns of that order form the groups,
            with scales as in ``none``; it needs a format that stores the group of each column (g_idx).
        scale_search: ``hessian``: each group's range is shrunk, and the sign of its scale chosen, where that lowers the
            squared error of its rounded weights, each column with the weight that its own rounding has in the loss
            (D², below what the Hessian's diagonal says by what other columns can make up for); ``mse``: unweighted;
            ``none``: the range is that of its extremes.
        drift_correction: strength, 0 to 1, with which the weights are first moved to where the quantized model's inputs
            give the full-precision model's outputs (asymmetric calibration, GPTAQ, arXiv:2504.02692). The loss that is
            reported is then that against the moved weights. The inputs must come from layers that are quantized and
            moved already (true_sequential), or the same error is corrected more than once.
        sweeps: times that all codes are chosen again by coordinate descent (QuantEase, arXiv:2309.01885).
        refit: whether scales are fitted to the codes in closed form, after each sweep, or once.
        block_size: columns between two lazy updates. It changes the speed, not the result.
    """

    name: Literal["gptq"] = "gptq"
    damp_percent: float = 0.01
    damp_limit: float = 1.0
    fallback: Fallback = "none"
    act_order: ActOrder = "static"
    scale_search: ScaleSearch = "hessian"
    drift_correction: float = 0.0
    sweeps: int = 0
    refit: bool = False
    block_size: int = 128
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        _check_number(self, "damp_percent", (int, float))
        _check_number(self, "damp_limit", (int, float))
        _check_number(self, "drift_correction", (int, float))
        _check_number(self, "sweeps", int)
        _check_number(self, "block_size", int)
        if not isinstance(self.refit, bool):
            raise _refusal(self, "refit", "choose true or false", "is not a truth value")
        _check_word(self, "fallback", get_args(Fallback))
        _check_word(self, "act_order", get_args(ActOrder))
        _check_word(self, "scale_search", get_args(ScaleSearch))
        if not 0 < self.damp_percent < 1:
            raise _refusal(self, "damp_percent", "choose between 0 and 1, usually 0.01")
        if not self.damp_percent <= self.damp_limit <= 1:
            raise _refusal(self, "damp_limit", f"choose between damp_percent ({self.damp_percent}) and 1")
        if not 0 <= self.drift_correction <= 1:
            raise _refusal(self, "drift_correction", "choose 0 (none) to 1 (full)")
        if not 0 <= self.sweeps <= MAX_SWEEPS:
            raise _refusal(self, "sweeps", f"choose 0 to {MAX_SWEEPS}")
        if self.block_size < 1:
            raise _refusal(self, "block_size", "choose at least 1, usually 128")

    @property
    def needs(self) -> frozenset[Stat]:
        """See :class:`quantkit.solvers.base.Solver`."""
        return frozenset({Stat.HESSIAN, Stat.DRIFT} if self.drift_correction > 0 else {Stat.HESSIAN})

    @property
    def writes_g_idx(self) -> bool:
        """See :class:`quantkit.solvers.base.Solver`."""
        return self.act_order == "group"

    def solve(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype) -> Solution:
        """See :class:`quantkit.solvers.base.Solver`.

        Raises:
            HessianError: no statistics, activations that are not finite; and, unless there is a fallback, all zero or
                not positive definite.
        """
        if stats is None or stats.num_tokens == 0:
            raise HessianError("GPTQ needs calibration statistics, and there are none")
        hessian = stats.hessian.to(weight.dtype)
        check_finite(hessian)
        positions = self._positions(hessian.diagonal())
        try:
            factor = factorize(hessian, positions, self.damp_percent, self.damp_limit)
        except HessianError as error:
            if self.fallback == "none":
                raise
            return _rounded_instead(weight, scheme, hessian, dtype, str(error))
        original = weight.T.contiguous()
        notes = factor.notes
        if self.drift_correction > 0:
            notes += correct_drift(original, stats.drift.to(weight.dtype), factor, self.drift_correction)
        columns = _Columns(original, factor, scheme, dtype, self.scale_search)
        if self.act_order == "static" or columns.group_size == len(original):
            columns.static(original)
        del original
        columns.run(self.block_size)
        state, damping = columns.rounded(), factor.damping
        del columns, factor
        for _ in range(self.sweeps):
            sweep(state, hessian, damping, self.block_size)
            if self.refit:
                refit(state, hessian, damping)
        if self.refit and self.sweeps == 0:
            refit(state, hessian, damping)
        dead = int((hessian.diagonal() == 0).sum())
        return state.solution(scheme, notes + _dead_note(dead, weight.shape[1]), self.act_order == "group")

    def _positions(self, diagonal: Tensor) -> Tensor:
        """The column at each position; the last position is fixed first."""
        if self.act_order == "none":
            return torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)
        return torch.argsort(diagonal, descending=True, stable=True).flip(0)


class _Columns:
    """The state of one solve. Matrices are held transposed, [in, out], a line for each position."""

    def __init__(
        self, weight: Tensor, factor: Factor, scheme: QuantScheme, dtype: torch.dtype, search: ScaleSearch
    ) -> None:
        in_features, out_features = weight.shape
        groups = scheme.num_groups(in_features)
        self.factor, self.scheme = factor, scheme
        self.group_size = scheme.columns_per_group(in_features)
        self.weight = weight.index_select(0, factor.positions)
        self.error = torch.zeros_like(self.weight)  # w - ŵ of the columns that are fixed, and 0
        self.codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
        self.grids = Grids.empty(groups, out_features, scheme, dtype, weight.dtype, weight.device)
        self.loss = torch.zeros(out_features, dtype=torch.float64, device=weight.device)
        # Groups of consecutive positions, the last positions first, unless static() says otherwise.
        self.group = torch.arange(in_features - 1, -1, -1, device=weight.device) // self.group_size
        self.dynamic = True
        self.search = search
        # In the loss ‖D Cᵀ e‖² a column's own rounding error, squared, stands with the weight D².
        self.importance = factor.diagonal.square() if search == "hessian" else None

    def static(self, original: Tensor) -> None:
        """Fix all scales and zero points from the weights [in, out] as they lie on disk, group by group."""
        importance = None
        if self.importance is not None:
            importance = torch.empty_like(self.importance)
            importance[self.factor.positions] = self.importance
            importance = importance.view(-1, 1, self.group_size)
        self.grids[:] = self.choose(original.unflatten(0, (-1, self.group_size)).mT, importance)
        self.group = self.factor.positions // self.group_size
        self.dynamic = False

    def run(self, block_size: int) -> None:
        """Fix all columns, span by span."""
        spans = self.spans(block_size)
        groups = self.group.tolist()
        for last in range(len(groups), 0, -spans[0]):
            first = max(last - spans[0], 0)
            unit = self.factor.unit[last:, first:last]
            targets = torch.addmm(self.weight[first:last], unit.T, self.error[last:])
            self.fix(first, last, targets, spans, groups)

    def spans(self, block_size: int) -> tuple[int, ...]:
        """Numbers of columns that are fixed between two updates, from the outermost to the innermost.

        Where scales are chosen on the way, one of them is a group, and no span cuts a group of those inside.
        """
        group, panel = self.group_size, min(_PANEL, block_size)
        if not self.dynamic:
            return (block_size, panel)
        if group >= block_size:
            return (group, block_size, panel)
        if group > panel:
            return (block_size // group * group, group, panel)
        return (block_size // group * group, panel // group * group, group)

    def fix(self, first: int, last: int, targets: Tensor, spans: tuple[int, ...], groups: list[int]) -> None:
        """Round the columns at these positions.

        Args:
            first, last: the positions.
            targets: [last - first, out], as far as the positions from ``last`` on decide them; overwritten.
            spans: the first is at least last - first.
            groups: of each position.
        """
        if self.dynamic and spans[0] == self.group_size:
            importance = None if self.importance is None else self.importance[first:last]
            self.grids[groups[first]] = self.choose(self.made_up(first, last, targets).T, importance)
        if len(spans) == 1:
            self.round(first, last, targets, groups[first:last])
            return
        for stop in range(last, first, -spans[1]):
            start = max(stop - spans[1], first)
            inner = targets[start - first : stop - first]
            if stop < last:
                inner.addmm_(self.factor.unit[stop:last, start:stop].T, self.error[stop:last])
            self.fix(start, stop, inner, spans[1:], groups)

    def choose(self, columns: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups [..., group_size]; the importance of their columns broadcasts to them."""
        dtype = self.grids.scale.dtype
        if self.search == "none":
            return choose_qparams(columns, self.scheme, dtype)
        return search_qparams(columns, self.scheme, dtype, importance)

    def made_up(self, first: int, last: int, targets: Tensor) -> Tensor:
        """These columns where GPTQ's updates leave them: they would cancel all errors that were made so far."""
        weight, unit = self.weight[first:last], self.factor.unit[first:last, first:last]
        # From the right, transposed: LAPACK would make a transposed copy otherwise.
        missing = (targets - weight).T
        moved: Tensor = torch.linalg.solve_triangular(unit, missing, upper=False, left=False, unitriangular=True).T
        return moved.add_(weight)

    def round(self, first: int, last: int, targets: Tensor, groups: list[int]) -> None:
        """Round the columns of the innermost span one after the other (Algorithm 1, the inner loop).

        Errors are 0 until they are made, so that one product with all of the span's errors serves every column.
        """
        unit, errors = self.factor.unit[first:last, first:last], self.error[first:last]
        levels = torch.empty_like(targets)
        matrices = (targets, self.weight[first:last], levels, errors, unit.T)
        lines = zip(*(matrix.unbind() for matrix in matrices), groups, strict=True)
        for target, weight, level, error, column, group in reversed(list(lines)):
            target.addmv_(errors.T, column)
            scale = self.grids.nearest(target, group, out=level)
            torch.addcmul(weight, level, scale, value=-1, out=error)
        self.codes[first:last] = levels.add_(self.grids.zero_points(self.group[first:last]))
        residuals = targets.sub_(self.weight[first:last]).add_(errors).mul_(self.factor.diagonal[first:last, None])
        self.loss += residuals.double().square_().sum(0)

    def rounded(self) -> Rounded:
        """What was solved."""
        positions = self.factor.positions
        return Rounded(self.weight, self.error, self.codes, self.grids, self.group, positions, self.loss)


def correct_drift(weight: Tensor, drift: Tensor, factor: Factor, strength: float) -> tuple[str, ...]:
    """Move the weights to where the quantized model's inputs give the full-precision model's outputs best.

    GPTAQ (arXiv:2504.02692, equation 4: asymmetric calibration) minimises ‖Q X - W X̃‖², X what the quantized model
    feeds the layer and X̃ what the full-precision model does. Its projection on the space of X makes that
    ‖(Q - W*) X‖² plus a constant, with

        W*  =  W + W (X̃ - X) Xᵀ (X Xᵀ)⁻¹,

    so that solving for W* with the Hessian of X is all there is to it. Here X Xᵀ is damped, as in GPTQ.

    Args:
        weight: float [in, out], overwritten by W* with the correction times ``strength``.
        drift: float [in, in], ``2/n Σ (x̃ - x) xᵀ``.
        factor: of the damped ``2/n Σ x xᵀ``.
        strength: 0 to 1; GPTAQ is 1.

    Returns:
        a note that says how far the weights moved.
    """
    right = (drift.T @ weight).mul_(strength).index_select(0, factor.positions)
    move = factor.solve(right)
    norm = float(weight.norm())
    weight.index_add_(0, factor.positions, move)
    share = float(move.norm()) / norm if norm > 0 else 0.0
    return (f"drift_correction moved the weights by {share:.2%}, and the loss is that against the moved ones",)


def _rounded_instead(weight: Tensor, scheme: QuantScheme, hessian: Tensor, dtype: torch.dtype, reason: str) -> Solution:
    """The fallback: nearest codes; the loss is that of the Hessian without damping."""
    q = RTN().solve(weight, scheme, None, dtype).weight
    error = dequantize(q, weight.dtype).sub_(weight)
    loss = (error @ hessian).mul_(error).sum(1, dtype=torch.float64).clamp_(min=0)
    return Solution(q, loss, (f"fallback: rounded to nearest, because {reason}",))


def _dead_note(dead: int, columns: int) -> tuple[str, ...]:
    if dead == 0:
        return ()
    return (f"{dead} of {columns} input channels were never active: their weights are rounded to nearest",)


def _check_number(solver: GPTQ, name: str, kind: type | tuple[type, ...]) -> None:
    value = getattr(solver, name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise RecipeError(
            message("gptq", f"{name}={value!r} is not a number of its kind", "see recipes/w4a16-gptq.yaml")
        )


def _check_word(solver: GPTQ, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(solver, name) not in allowed:
        raise _refusal(solver, name, f"choose {' or '.join(allowed)}", "is not one of its words")


def _refusal(solver: GPTQ, name: str, fix: str, what: str = "is out of range") -> RecipeError:
    return RecipeError(message("gptq", f"{name}={getattr(solver, name)!r} {what}", fix))
