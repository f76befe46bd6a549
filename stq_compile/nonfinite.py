"""Gradients that are not finite, and states that hold what came of them.

A gradient is looked at only where `Options.on_nonfinite` asks for it, before a step, since a step
that has begun cannot be taken back: one pass over the gradients by their sums, which are not
finite if an element is not. A sum may also overflow, so that it only says where to look closely.

States tell afterwards: a block whose scale is not finite was reached by such a gradient, and an
average never forgets one. That is a look at two bytes in 128 elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stq_compile.collective import add_up
from stq_compile.formats import BLOCK
from stq_compile.packed_state import PackedState
from stq_compile.shards import gradient, local, region_of
from stq_compile.storage import PackedStorage

EXPONENT = 0x7F80
"""The exponent of a bfloat16: all of its bits are set in an infinity or a NaN."""


def nonfinite_gradients(params: Sequence[Tensor]) -> list[int]:
    """The numbers of the parameters whose gradient has a NaN or an infinity.

    Of a sharded parameter on any process: all processes get the same answer, by one all-reduce of
    a number per parameter and mesh (`collective.add_up`); they must all call it.
    """
    grads = {
        n: gradient(p.grad, region_of(p)).detach()
        for n, p in enumerate(params)
        if p.grad is not None
    }
    found = dict.fromkeys(range(len(params)), 0.0)
    for number, total in zip(grads, _sums(list(grads.values())), strict=True):
        found[number] = float(not math.isfinite(total) and not _is_finite(grads[number]))
    counts, _ = add_up({n: {"nonfinite": count} for n, count in found.items()}, params)
    return [n for n, row in counts.items() if row["nonfinite"] > 0]


def _sums(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    sums: list[float] = torch.stack([t.sum(dtype=torch.float32) for t in tensors]).tolist()
    return sums


def _is_finite(values: Tensor) -> bool:
    values = values.coalesce().values() if values.is_sparse else values
    return bool(values.isfinite().all())


def nonfinite_elements(state: Tensor) -> int:
    """How many elements of a state may not be finite: those that are not, or all of their block."""
    held = local(state)
    if not isinstance(held, PackedState):
        return _count(held)
    storage = held.packed
    if not storage.format.blocked:
        return _count(storage.read())
    broken = _broken_blocks(storage).tolist()
    last = storage.codes.shape[0] - 1
    return sum(storage.numel - last * BLOCK if block == last else BLOCK for block in broken)


def _count(values: Tensor) -> int:
    if not values.is_floating_point():
        return 0
    if math.isfinite(values.sum(dtype=torch.float32)):
        return 0
    return int(values.isfinite().logical_not_().sum())


def _broken_blocks(storage: PackedStorage) -> Tensor:
    """The numbers of the blocks whose scale is an infinity or a NaN."""
    words = storage.scales.to(torch.int32) & 0xFFFF
    # The upper 11 bits of a float without its sign, above the range; or its upper 16 bits.
    patterns = words >> 1 if storage.format.kind == "adaptive_log" else words
    return ((patterns & EXPONENT) == EXPONENT).nonzero()[:, 0]
