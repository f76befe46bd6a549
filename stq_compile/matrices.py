"""States that are matrices used by matrix products: orthogonal ones, and semidefinite ones.

*Orthogonal* (eigenvectors, the Q of a QR decomposition): entries are coded as those of other
states, and rounding leaves columns that are no longer orthonormal. One step of Björck's iteration,
``V (3 I - V^T V) / 2``, takes the error in ``V^T V`` from ``e`` to about ``3/4 e^2`` (Björck and
Bowie, 1971; Wang et al., "4-bit Shampoo", 2024).

*Semidefinite* (sums of ``X X^T``): what is used of them is an inverse root or a basis of
eigenvectors, so small eigenvalues count as much as large ones, and rounding the entries drowns
them. Here the Cholesky factor of ``A = C C^T`` is coded (Li et al., "4-bit preconditioned
stochastic optimization", 2024): an error ``E`` in ``C`` moves the root of an eigenvalue, and not
the eigenvalue, by ``|E|``, and ``C C^T`` is semidefinite whatever the error. A triangle is half of
a matrix, so its entries get twice the bits; the diagonal, on which the small eigenvalues rest, is
kept in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stq_compile.errors import IndefiniteStateError
from stq_compile.formats import Format, side

Encode = Callable[[Tensor, Format], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, Tensor, Format, int], Tensor]
Empty = Callable[[Format, int, torch.device | None], tuple[Tensor, Tensor]]

SHIFTS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
"""What is added to the diagonal, relative to itself, until a matrix can be factored: float32 sums
of ``X X^T`` with fewer columns than rows have eigenvalues of about -1e-7."""
ORTHONORMAL = 1e-3
"""How far products of the columns of an orthonormal matrix may be from zero and one."""
SYMMETRY = 1e-4
"""How far apart two mirrored entries may be, relative to the root of their diagonal entries."""


def orthonormal(matrix: Tensor) -> Tensor:
    """A matrix with columns (rows, if it has more columns) that are nearly orthonormal, after one
    step of Björck's iteration; of the same shape and type."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    v = tall.float()
    v = torch.addmm(v, v, v.T @ v, beta=1.5, alpha=-0.5)
    return (v if tall is matrix else v.T).to(matrix.dtype)


def square_orthonormal(values: Tensor) -> Tensor:
    """`orthonormal` of a square matrix in a tensor of any shape, ``[n * n]`` or ``[1, n, n]``."""
    n = side(values.numel())
    return orthonormal(values.reshape(n, n)).view(values.shape)


def is_orthonormal(values: Tensor) -> bool:
    """Whether values are those of a square matrix with orthonormal columns."""
    n = math.isqrt(values.numel())
    if n < 2 or n * n != values.numel():
        return False
    v = values.reshape(n, n).float()
    if not bool(((v * v).sum(0) - 1).abs().max() <= ORTHONORMAL):  # seen without the product
        return False
    off = v.T @ v
    off.diagonal().sub_(1)
    return bool(off.abs().max() <= ORTHONORMAL)


def is_semidefinite(values: Tensor, *, known: bool = True) -> bool:
    """Whether values are those of a square matrix that is symmetric and positive semidefinite, up
    to float32's rounding.

    ``known``: that it ought to be one. Else it is asked more strictly, and a constant, which is
    semidefinite as well, is no evidence.
    """
    n = math.isqrt(values.numel())
    if n < 2 or n * n != values.numel():
        return False
    if not known and bool((values == values.reshape(-1)[0]).all()):
        return False
    return factor(values.reshape(n, n).float(), SHIFTS if known else SHIFTS[:3]) is not None


def factor(matrix: Tensor, shifts: tuple[float, ...] = SHIFTS) -> Tensor | None:
    """The lower triangular Cholesky factor of float32 ``[n, n]``; None if there is none.

    It is that of the matrix scaled to a diagonal of ones, and scaled back, so that rows of very
    different size are factored equally well.
    """
    scale = matrix.diagonal().clamp(min=0).sqrt()
    bound = torch.outer(scale, scale)
    mirrored = (matrix - matrix.T).abs() <= SYMMETRY * bound
    bounded = matrix.abs() <= (1 + SYMMETRY) * bound
    if not bool((mirrored & bounded).all()):  # nor where anything is not a number
        return None
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    scaled = matrix * inverse[:, None] * inverse
    for shift in shifts:
        scaled.diagonal().fill_(1 + shift)
        triangle: Tensor
        triangle, failed = torch.linalg.cholesky_ex(scaled)
        if not int(failed):
            return triangle * scale[:, None]
    return None


# The format ``cholesky``: codes and scales of the entries below the diagonal, row by row, and
# behind the scales the diagonal, a float32 in two words.


def empty_buffers(
    format: Format, numel: int, device: torch.device | None, empty: Empty
) -> tuple[Tensor, Tensor]:
    """Codes and scale words of zeros; ``empty`` gives those of the entries."""
    n = side(numel)
    codes, scales = empty(format.coded, n * (n - 1) // 2, device)
    return codes, torch.cat([scales, scales.new_zeros(2 * n)])


def encode(values: Tensor, format: Format, encode_entries: Encode) -> tuple[Tensor, Tensor]:
    """Encode a semidefinite matrix, float32 ``[n * n]``.

    Raises:
        IndefiniteStateError: it is not one.
    """
    n = side(values.numel())
    triangle = factor(values.view(n, n))
    if triangle is None:
        raise IndefiniteStateError(found=f"a matrix of {n} x {n} that is not", format=format.name)
    codes, scales = encode_entries(triangle[_below(n, values.device)], format.coded)
    diagonal = triangle.diagonal().clone(memory_format=torch.contiguous_format)
    return codes, torch.cat([scales, diagonal.view(torch.int16)])


def decode(
    codes: Tensor, scales: Tensor, format: Format, numel: int, decode_entries: Decode
) -> Tensor:
    """Decode to float32 ``[n * n]``, symmetric and semidefinite."""
    n = side(numel)
    words, diagonal = scales[: len(scales) - 2 * n], scales[len(scales) - 2 * n :]
    triangle = torch.zeros(n, n, device=codes.device)
    entries = decode_entries(codes, words, format.coded, n * (n - 1) // 2)
    triangle[_below(n, codes.device)] = entries
    triangle.diagonal().copy_(diagonal.clone().view(torch.float32))
    return (triangle @ triangle.T).view(-1)


def _below(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries below the diagonal, row by row."""
    rows, columns = torch.tril_indices(n, n, -1, device=device)
    return rows, columns
