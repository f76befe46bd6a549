"""How the blocks of a sharded state lie among those of the whole tensor.

Codes and scales of a state are tensors of blocks, ``[blocks, 16 * width]`` and ``[blocks]``. torch
divides the rows of such a tensor as it divides any; whether these rows are the blocks of the shards
is a question of geometry, and answered here.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from stq_compile.formats import BLOCK, block_count
from stq_compile.shards import Box, Layout, boxes, layout_of, placements_of


def is_split(state: Tensor) -> bool:
    """Whether torch would divide the rows of a tensor of blocks otherwise than the blocks are."""
    layout = layout_of(state)
    assert layout is not None
    shape, (mesh, placements) = tuple(state.shape), mesh_of(layout)
    rows = (block_count(state.numel()),)
    for box, (size, start) in zip(
        boxes(shape, mesh, placements), boxes(rows, *mesh_of(by_rows(state))), strict=True
    ):
        found = stretch(box, shape)
        blocks = block_count(math.prod(box[0]))
        if found is None or found % BLOCK or blocks != size[0]:
            return True
        if blocks and found != start[0] * BLOCK:
            return True
    return False


def by_rows(state: Tensor) -> Layout:
    """The layout of a tensor that is divided along its first dimension wherever ``state`` is."""
    layout = layout_of(state)
    assert layout is not None
    return layout[0], tuple((0 if dim >= 0 else -1, 1) for dim, _ in layout[1])


def rows_of(state: Tensor) -> int:
    """Blocks of the largest shard."""
    found = boxes(tuple(state.shape), *mesh_of(layout_of(state)))
    return max(block_count(math.prod(size)) for size, _ in found)


def mesh_of(layout: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    mesh, dims = layout
    return mesh, placements_of(dims)


def stretch(box: Box, shape: tuple[int, ...]) -> int | None:
    """The element at which a box begins that is one stretch of a row-major tensor, else None."""
    size, start = box
    if not math.prod(size):
        return 0
    cut = [d for d, n in enumerate(shape) if size[d] != n]
    if cut and math.prod(size[: cut[-1]]) != 1:
        return None
    begin = 0
    for d, n in enumerate(shape):
        begin = begin * n + start[d]
    return begin
