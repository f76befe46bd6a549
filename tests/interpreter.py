"""Triton kernels on the CPU, under Triton's interpreter, in the place of a C++ kernel.

The interpreter is chosen when a function is decorated, by ``TRITON_INTERPRET=1``. So everything
here runs in processes of their own (`interpreted`), and the tests hand functions to them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import interpreter_process
from kernels import Rig
from stq_compile.codegen.lower import lower
from stq_compile.codegen.triton.emit import Emitted, emit
from stq_compile.codegen.triton.kernel import TritonKernel, tile_map, vector_of

INTERPRETED_BLOCKS = 64
"""A larger tile than a GPU's: the interpreter's time goes by operations, not by elements."""


@lru_cache(maxsize=1)
def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, mp_context=context, initializer=interpreter_process.start)


def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Start ``function`` in a process whose kernels are interpreted."""
    return _pool().submit(function, *args)


def interpreted(function: Callable[..., Any], *args: Any) -> Any:
    return submit(function, *args).result()


class InterpretedKernel:
    """Takes the call of a `CompiledKernel`: a table, one step of all its rows."""

    def __init__(self, kernel: TritonKernel, *, blocks: int = INTERPRETED_BLOCKS) -> None:
        self.kernel = kernel
        self.blocks = blocks

    @property
    def row_bytes(self) -> int:
        return self.kernel.row_bytes

    def scratch(self, n_rows: int, threads: int) -> NDArray[np.uint8]:
        return np.empty(0, dtype=np.uint8)

    def run(
        self, rows: NDArray[np.int64], step: int, threads: int, scratch: NDArray[np.uint8]
    ) -> None:
        table, n_rows = torch.from_numpy(rows), len(rows)
        clock = torch.from_numpy(np.array([step], dtype=np.uint64).view(np.int64))
        slots = self.kernel.new_slots(n_rows, torch.device("cpu"))
        self.kernel.scalars(table, slots, clock)
        # Sizes that are no multiple of 4 have a launch of their own.
        numels = table[:, -2].tolist()
        for vector in (4, 1):
            mine = [n if vector_of(n, ()) == vector else 0 for n in numels]
            tiles = torch.from_numpy(tile_map(mine, self.blocks))
            self.kernel.update(table, slots, tiles, vector=vector, blocks=self.blocks)


@lru_cache(maxsize=8)
def _loaded(emitted: Emitted) -> TritonKernel:
    return TritonKernel.of(emitted)


def run_triton(rig: Rig, step: int, *, blocks: int = INTERPRETED_BLOCKS) -> None:
    """One step of the rig's tensors by the Triton kernel; its own IR has tables, for C++."""
    kernel = _loaded(emit(lower(rig.graph)))
    rig.run(InterpretedKernel(kernel, blocks=blocks), step)  # type: ignore[arg-type]
