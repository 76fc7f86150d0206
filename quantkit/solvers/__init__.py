"""Solvers: each turns a weight and its statistics into a quantized weight."""

from __future__ import annotations

from quantkit.solvers.autoround import AutoRound
from quantkit.solvers.base import Solution, Solver
from quantkit.solvers.gptq import GPTQ
from quantkit.solvers.rtn import RTN

SOLVERS: tuple[type[Solver], ...] = (RTN, GPTQ, AutoRound)

__all__ = ["GPTQ", "RTN", "SOLVERS", "AutoRound", "Solution", "Solver"]
