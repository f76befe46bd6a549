"""A loaded Triton kernel: two launches that update every tensor of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stq_compile.codegen.triton.emit import Emitted
from stq_compile.codegen.triton.load import load
from stq_compile.formats import BLOCK, block_count

WARPS = 4
BLOCKS = 8 * WARPS
"""Blocks of a tile: 8 a warp, so that a thread's 4 lanes of a plane are one 128-bit access."""
MAX_REGISTERS = 128
SCALAR_ROWS = 128
"""Tensors of one program of the scalars kernel."""
BORDERS = -1
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
CUDA_OPTIONS = {**OPTIONS, "maxnreg": MAX_REGISTERS}


def tile_map(numels: Sequence[int], blocks: int = BLOCKS) -> np.ndarray[Any, Any]:
    """``[tiles, 2]`` int64: the row and the first block of every tile."""
    parts = [
        np.stack([np.full(len(first), row), first], axis=1)
        for row, n in enumerate(numels)
        if len(first := np.arange(0, block_count(n), blocks, dtype=np.int64))
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)


def vector_of(numel: int, addresses: Sequence[int]) -> int:
    """4 where 4 neighbours may be one access (16 bytes of float32), else 1."""
    return 4 if numel % 4 == 0 and all(a % 16 == 0 for a in addresses) else 1


@dataclass(frozen=True)
class TritonKernel:
    """A generated module, imported."""

    emitted: Emitted
    module: Any

    @classmethod
    def of(cls, emitted: Emitted) -> TritonKernel:
        return cls(emitted, load(emitted.source))

    @property
    def name(self) -> str:
        return self.emitted.name

    @property
    def source(self) -> str:
        return self.emitted.source

    @property
    def row_bytes(self) -> int:
        return 8 * self.emitted.row_fields

    def new_slots(self, rows: int, device: torch.device) -> Tensor:
        """Memory for what `scalars` hands to `update`."""
        return torch.zeros(rows, self.emitted.slot_fields, dtype=torch.int64, device=device)

    def scalars(self, table: Tensor, slots: Tensor, clock: Tensor) -> None:
        """First launch; ``clock`` is int64 ``[1]``, the mixed step (`rounding.mixed_step`)."""
        rows = table.shape[0]
        grid = (-(-rows // SCALAR_ROWS),)
        self.module.scalars[grid](
            table, slots, clock, rows, ROWS=SCALAR_ROWS, enable_fp_fusion=False
        )

    def update(
        self, table: Tensor, slots: Tensor, tiles: Tensor, *, vector: int, blocks: int = BLOCKS
    ) -> None:
        """Second launch: one program per tile."""
        if not tiles.shape[0]:
            return
        cuda = table.device.type == "cuda" and torch.version.hip is None
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


__all__ = ["BLOCK", "BLOCKS", "CUDA_OPTIONS", "OPTIONS", "TritonKernel", "tile_map", "vector_of"]
