"""Copies of the weights whose distance from them is no more than rounding.

An optimizer that measures how far it is from where it began (D-Adaptation, Prodigy), or goes on
from slow weights, works with the difference of a copy and the weights. While that is smaller than
the last bit of the copy, which has `formats.WEIGHTS_WIDTH` bits, it works with noise. No graph says
so, and no format of fewer than 32 bits mends it: what the bits are relative to are the weights.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from stq_compile.errors import CopyPrecisionWarning
from stq_compile.formats import BLOCK, WEIGHTS_WIDTH
from stq_compile.packed_state import PackedState, is_dense, memory_order
from stq_compile.session import Session
from stq_compile.storage import REFERENCE, TILE_BLOCKS

LOOKS = (11, 17)
"""Steps after which copies are looked at. Slow weights are at the weights in every fifth step, or
sixth, or tenth: one of two that share no divisor tells their distance from rounding."""
DROWNED = 2.0
"""Distances below so many times the rounding error count as rounding. Of 32 published optimizers
with copies, in 12 steps: those whose path at 12 bits was off by more than a half had 1.3 to 1.5 at
most, the others 2.5 and more, but for one that makes no use of the difference (design/0023)."""


def look_at_copies(session: Session) -> None:
    """Warn, once, of copies that were drowned at all looks. Before a step, since a warning may be
    an error."""
    if session.steps not in LOOKS:
        return
    for leaf, _ in session.leaves():
        state, param = leaf.value, leaf.owner
        if not isinstance(state, PackedState) or not isinstance(param, Tensor):
            continue
        if state.format.width == WEIGHTS_WIDTH:
            far = distance(state, param.detach())
            session.distances[leaf.key] = max(far, session.distances.get(leaf.key, 0.0))
    if session.steps < LOOKS[-1]:
        return
    drowned = [key for key, far in session.distances.items() if far < DROWNED]
    if drowned:
        optimizer = type(session.optimizer).__name__
        pins = ", ".join(f"{key!r}: 32" for key in drowned)
        warning = CopyPrecisionWarning(
            optimizer=optimizer, states=", ".join(drowned), steps=session.steps, pins=pins
        )
        warnings.warn(warning, stacklevel=3)


def distance(state: PackedState, param: Tensor) -> float:
    """From a copy to its parameter, in units of the copy's rounding error, over the first half
    million elements; infinite where they lie in memory in different orders."""
    alike = state.stride() == param.stride() or (state.is_contiguous() and param.is_contiguous())
    if not alike or not is_dense(param):
        return math.inf
    count = min(state.numel(), TILE_BLOCKS * BLOCK)
    copy = state.packed.buffers.tile(0, count, REFERENCE)
    away = float((memory_order(param)[:count].float() - copy).norm())
    return away / max(rounding_error(copy), 1e-30)


def rounding_error(values: Tensor) -> float:
    """The norm of the error of stochastic rounding to ``softsign12``: levels are
    ``s (1 + |x| / s)^2 / 2K`` apart, and the error's variance is a sixth of that squared."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK).abs()
    scale = blocks.amax(1, keepdim=True)
    spacing = (scale + blocks).square() / scale.clamp(min=1e-30) / (1 << WEIGHTS_WIDTH)
    return float(spacing.norm()) / math.sqrt(6)
