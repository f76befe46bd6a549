"""Standardized columns and ridge regression."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RIDGES = tuple(10.0**k for k in range(-4, 3))
_CONSTANT = 1e-10  # deviation relative to size below which a column does not vary


def checked(
    X: ArrayLike, y: ArrayLike, names: Sequence[str] | None = None
) -> tuple[Floats, Floats]:
    """Both as float64, after a look at shapes, names and values."""
    matrix, target = np.asarray(X, np.float64), np.asarray(y, np.float64)
    if matrix.ndim != 2 or target.shape != matrix.shape[:1]:
        raise ValueError(f"X has shape {matrix.shape}, y {target.shape}; expected [n, p] and [n]")
    if names is not None and (len(names) != matrix.shape[1] or len(set(names)) != len(names)):
        raise ValueError(f"{matrix.shape[1]} factors need as many different names, not {names}")
    wrong = np.flatnonzero(~np.isfinite(matrix).all(axis=0))
    if len(wrong):
        raise ValueError(f"factor {names[wrong[0]] if names else wrong[0]} is not finite")
    if not np.isfinite(target).all():
        raise ValueError("y is not finite")
    return matrix, target


def standardized(matrix: Floats) -> tuple[Floats, Floats, Floats]:
    """Columns with mean 0 and mean square 1, the means and the scales; constant ones become 0.

    The scale of a constant column is 0.
    """
    mean = matrix.mean(axis=0)
    centred = matrix - mean
    scale = np.sqrt((centred**2).mean(axis=0))
    scale[scale <= _CONSTANT * np.abs(matrix).max(axis=0, initial=0)] = 0
    return np.where(scale > 0, centred / np.where(scale > 0, scale, 1), 0), mean, scale


def ridge_regression(z: Floats, y: Floats, ridges: Sequence[float]) -> tuple[Floats, float]:
    """Coefficients of the centred ``y`` on standardized columns, and the ridge used, per row.

    The ridge with the least generalized cross-validation error ``n·RSS / (n - 1 - df)²`` (Golub,
    Heath and Wahba 1979; the mean takes one degree of freedom); of equal ones the strongest.
    """
    n = len(y)
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    centred = y - y.mean()
    projected = u.T @ centred
    best = (math.inf, 0.0, np.zeros(z.shape[1]))
    for ridge in sorted(ridges, reverse=True):
        shrink = s**2 / (s**2 + n * ridge)
        rss = float(((centred - u @ (shrink * projected)) ** 2).sum())
        freedom = n - 1 - float(shrink.sum())
        score = n * rss / freedom**2 if freedom > 1e-9 else math.inf
        if score < best[0]:
            best = (score, ridge, vt.T @ (s / (s**2 + n * ridge) * projected))
    return best[2], best[1]


def r_squared(predicted: Floats, y: Floats) -> float:
    centred = y - y.mean()
    total = float((centred**2).sum())
    return 1 - float(((centred - predicted) ** 2).sum()) / total if total > 0 else 0.0
