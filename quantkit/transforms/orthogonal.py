"""Orthogonal matrices: randomized Hadamard where one is known, seeded random ones elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WIDEST_FACTOR = 64  # of the powers of two: wider ones cost more multiplications, narrower ones more passes


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal:
    """``Q = diag(signs) (F_1 ⊗ … ⊗ F_k)``, kept as its factors, by which it is multiplied quickly.

    Attributes:
        signs: float64 [n], 1 or -1.
        factors: float64, square and orthogonal; the product of their sizes is n.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    def apply(self, x: Tensor) -> Tensor:
        """``x Q``, float64 [..., n], of rows x in any floating-point dtype."""
        sizes = [factor.shape[0] for factor in self.factors]
        product = (x.double() * self.signs).reshape(-1, *sizes)
        for axis, factor in enumerate(self.factors, start=1):
            product = torch.tensordot(product, factor, dims=([axis], [0])).movedim(-1, axis)
        return product.reshape(x.shape)

    def matrix(self) -> Tensor:
        """Q itself, float64 [n, n]."""
        return self.apply(torch.eye(self.signs.numel(), dtype=torch.float64))


def rotation_of(size: int, seed: int, keep_ones: bool = False) -> Orthogonal:
    """A random rotation (or reflection) of ``size`` channels; the same for the same seed.

    A randomized Hadamard matrix (QuaRot, arXiv:2404.00456, section 3) of a size for which Sylvester's and Paley's
    constructions give one; otherwise a matrix drawn uniformly from all orthogonal ones.

    Args:
        size: channels.
        seed: of the signs, or of the matrix.
        keep_ones: ``1 Q = 1``, so that rotating leaves the mean of the channels as it is; drawn uniformly from all
            orthogonal matrices with this property.
    """
    generator = torch.Generator().manual_seed(seed)
    if keep_ones:
        return Orthogonal(torch.ones(size, dtype=torch.float64), (_keeping_ones(size, generator),))
    factors = hadamard_factors(size)
    if factors is None:
        return Orthogonal(torch.ones(size, dtype=torch.float64), (_uniform(size, generator),))
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return Orthogonal(signs, tuple(factor / math.sqrt(factor.shape[0]) for factor in factors))


def hadamard_factors(size: int) -> tuple[Tensor, ...] | None:
    """Hadamard matrices (±1, orthogonal rows) whose Kronecker product is one of this size; None: none is known here.

    A Paley matrix of the smallest possible size, times powers of two (Sylvester).
    """
    odd = size // (size & -size)
    base = odd
    while base <= size:
        paley = _paley(base)
        if paley is not None:
            return (paley, *_powers_of_two(size // base))
        base *= 2
    return None


def _powers_of_two(size: int) -> list[Tensor]:
    factors = []
    while size > 1:
        part = min(size, _WIDEST_FACTOR)
        factors.append(_sylvester(part))
        size //= part
    return factors


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley(size: int) -> Tensor | None:
    """The Hadamard matrix of this size by Paley's first or second construction over a prime field; 1 for size 1."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):  # then the prime is 3 modulo 4
        return torch.eye(size, dtype=torch.float64) + _bordered(size - 1, skew=True)
    prime = size // 2 - 1
    if size % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        conference, eye = _bordered(prime, skew=False), torch.eye(prime + 1, dtype=torch.float64)
        top = torch.cat([conference + eye, conference - eye], 1)
        return torch.cat([top, torch.cat([conference - eye, -conference - eye], 1)])
    return None


def _bordered(prime: int, skew: bool) -> Tensor:
    """The quadratic characters χ(i - j) of a prime field with a border of ones: [q + 1, q + 1], zero diagonal."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(index[:, None] - index) % prime]
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if skew else 1
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal group: QR of a Gaussian matrix with R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    positive: Tensor = q * r.diagonal().sign()
    return positive


def _keeping_ones(size: int, generator: torch.Generator) -> Tensor:
    """``P diag(1, R) P`` with R uniform and P the reflection that swaps the first axis and the direction of ones."""
    inner = torch.eye(size, dtype=torch.float64)
    if size > 1:
        inner[1:, 1:] = _uniform(size - 1, generator)
    normal = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    normal[0] -= 1
    if size > 1:
        normal /= torch.linalg.vector_norm(normal)
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    return reflection @ inner @ reflection
