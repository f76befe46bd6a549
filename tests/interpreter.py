"""Triton kernels on the CPU, under Triton's interpreter, in the place of a C++ kernel.

The interpreter is chosen when a function is decorated, by ``TRITON_INTERPRET=1``. So everything
here runs in processes of their own (`interpreted`), and the tests hand functions to them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

import interpreter_process
from kernels import Rig
from stq_compile.codegen.backend import BACKENDS
from stq_compile.codegen.lower import lower
from stq_compile.codegen.target import Target
from stq_compile.codegen.triton.backend import TritonBackend
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.kernel import TritonKernel
from stq_compile.codegen.triton.run import TritonExecutable
from stq_compile.codegen.triton.text import Emitted

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


def executable(emitted: Emitted, blocks: int = INTERPRETED_BLOCKS) -> TritonExecutable:
    """A generated module that runs on CPU tensors as if they were a device's."""
    return TritonExecutable(_loaded(emitted), torch.device("cpu"), blocks, blocks)


@lru_cache(maxsize=8)
def _loaded(emitted: Emitted) -> TritonKernel:
    return TritonKernel.of(emitted)


def run_triton(rig: Rig, step: int, *, blocks: int = INTERPRETED_BLOCKS) -> None:
    """One step of the rig's tensors by the Triton kernel; its own IR has tables, for C++."""
    rig.run(executable(emit(lower(rig.graph)), blocks), step)


INTERPRETER = Target(
    "interpreter", tables=False, dtypes=frozenset(("float32", "bfloat16", "float16")), lanes=32
)


@contextmanager
def interpreter_as_cpu() -> Iterator[None]:
    """Steps of CPU parameters are run by Triton kernels: a GPU's run time without the GPU."""
    blocks = (8, 4)  # small, so that small tensors have several tiles
    before = BACKENDS["cpu"]
    BACKENDS["cpu"] = TritonBackend(lambda device: INTERPRETER, blocks)
    try:
        yield
    finally:
        BACKENDS["cpu"] = before
