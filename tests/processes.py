"""Runs a function in several processes that gloo joins, and gives back what each returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

TIMEOUT = 900.0  # seconds for all of it

# Processes are forked from one that has imported torch already.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["stq_compile", "torch.distributed.fsdp"])


def run_processes(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world, *args)`` in ``world`` processes; the results by rank.

    The function must be one of a module. Raises RuntimeError with the traceback of a process that
    failed, and TimeoutError where they did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_processes(world, function, *args, folder=Path(folder))
        wait(processes, TIMEOUT)
        results = [torch.load(Path(folder) / f"{r}", weights_only=False) for r in range(world)]
    failed = "\n".join(str(result) for ok, result in results if not ok)
    if failed:
        raise RuntimeError(failed)
    return [result for _, result in results]


def start_processes(
    world: int, function: Callable[..., Any], *args: Any, folder: Path, timeout: float = TIMEOUT
) -> list[BaseProcess]:
    """Start them and return at once; each leaves (succeeded, result or traceback) in ``folder``."""
    processes: list[BaseProcess] = []
    for rank in range(world):
        process = _CONTEXT.Process(
            target=_work, args=(rank, world, str(folder), timeout, function, args), daemon=True
        )
        process.start()
        processes.append(process)
    return processes


def wait(processes: list[BaseProcess], timeout: float) -> None:
    """Until all have ended; kills them and raises TimeoutError after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    if late:
        raise TimeoutError(f"{len(late)} of {len(processes)} processes did not end")


def _work(
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    result: tuple[bool, Any]
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world, init_method=f"file://{folder}/store",
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        result = True, function(rank, world, *args)
        dist.destroy_process_group()
    except BaseException:
        result = False, f"process {rank}: {traceback.format_exc()}"
    torch.save(result, Path(folder) / f"{rank}.part")
    (Path(folder) / f"{rank}.part").rename(Path(folder) / f"{rank}")
