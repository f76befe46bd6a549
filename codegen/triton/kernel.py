"""A loaded Triton module, and its launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stq_compile.codegen.triton.load import load
from stq_compile.codegen.triton.text import Emitted
from stq_compile.formats import block_count

WARPS = 4
BLOCKS = 8 * WARPS
"""Blocks of a tile: 8 a warp, so that a thread's 4 lanes of a plane are one 128-bit access."""
MEASURED_BLOCKS = 1
"""Blocks of a measuring kernel's tile, which is one warp's: 4 elements a thread. With several warps
every sum would go through shared memory, with barriers."""
MEASURED_TILES = 1 << 16
"""Tiles of one launch of a measuring kernel: their sums are what a look takes of memory."""
MAX_REGISTERS = 128
SCALAR_ROWS = 128
"""Tensors that the scalars kernel takes at a time."""
BORDERS = -1
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
CUDA_OPTIONS = {**OPTIONS, "maxnreg": MAX_REGISTERS}
MEASURE_OPTIONS = {**OPTIONS, "num_warps": MEASURED_BLOCKS}

Tiles = np.ndarray[Any, np.dtype[np.int64]]
"""``[tiles, 2]``: the row and the first block of every tile."""


def tile_map(numels: Any, blocks: int = BLOCKS) -> Tiles:
    """The tiles of all blocks of tensors of so many elements."""
    return _tiles(np.arange(0, block_count(int(n)), blocks, dtype=np.int64) for n in numels)


def sampled_tile_map(numels: Any, begins: Any, strides: Any, blocks: int) -> Tiles:
    """The tiles of every ``stride``-th block from ``begin`` on."""
    rows = zip(numels, begins, strides, strict=True)
    return _tiles(
        np.arange(begin, block_count(int(n)), stride * blocks, dtype=np.int64)
        for n, begin, stride in rows
    )


def _tiles(firsts: Any) -> Tiles:
    parts = [np.stack([np.full(len(f), r), f], axis=1) for r, f in enumerate(firsts) if len(f)]
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)


def vectors_of(numels: Any, addresses: Any) -> Any:
    """For each row, 4 where 4 neighbours may be one access (16 bytes of float32), else 1.

    Takes int64 ``[rows]`` and ``[rows, addresses]``.
    """
    return np.where((numels % 4 == 0) & (addresses % 16 == 0).all(1), 4, 1)


@dataclass(frozen=True)
class TritonKernel:
    """A generated module, imported; its functions launched with the options that they are meant
    for. Nothing here waits for the device."""

    emitted: Emitted
    module: Any

    @classmethod
    def of(cls, emitted: Emitted) -> TritonKernel:
        return cls(emitted, load(emitted.source))

    def new_slots(self, rows: int, device: torch.device) -> Tensor:
        """Memory for what `scalars` hands to the others."""
        return torch.zeros(rows, self.emitted.slot_fields, dtype=torch.int64, device=device)

    def scalars(self, table: Tensor, slots: Tensor, clock: Tensor) -> None:
        """First launch; ``clock`` is int64 ``[1]``, the mixed step, which it moves on."""
        rows = table.shape[0]
        with _on(table.device):
            self.module.scalars[(1,)](
                table,
                slots,
                clock,
                rows,
                ROWS=SCALAR_ROWS,
                CHUNKS=-(-rows // SCALAR_ROWS),
                enable_fp_fusion=False,
            )

    def update(
        self, table: Tensor, slots: Tensor, tiles: Tensor, *, vector: int, blocks: int = BLOCKS
    ) -> None:
        """Second launch: one program per tile."""
        cuda = table.device.type == "cuda" and torch.version.hip is None
        with _on(table.device):
            self.module.update[(tiles.shape[0],)](
                table,
                slots,
                tiles,
                BORDERS,
                BLOCKS=blocks,
                VECTOR=vector,
                ALIGNMENT=16 if vector == 4 else 1,
                **(CUDA_OPTIONS if cuda else OPTIONS),
            )

    def measure(
        self, table: Tensor, slots: Tensor, tiles: Tensor, *, blocks: int = MEASURED_BLOCKS
    ) -> Tensor:
        """What a measuring kernel launches instead; gives the sums of every tile."""
        sums = torch.zeros(
            tiles.shape[0], self.emitted.sums, dtype=torch.float64, device=table.device
        )
        with _on(table.device):
            self.module.measure[(tiles.shape[0],)](
                table, slots, tiles, sums, BLOCKS=blocks, **MEASURE_OPTIONS
            )
        return sums


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
