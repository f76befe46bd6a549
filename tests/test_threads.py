"""Threads, processes that share a cache, forks, and changed numbers of threads: the same bits."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.callback import CallbackTrigger, callback_handler
from torch.utils.data import DataLoader, Dataset

import stq_compile as stq
from kernels import torch_threads
from models import make_model
from stq_compile import symbolic_math
from stq_compile.planner.turns import one_thread
from stq_compile.steps import own_code
from stq_compile.storage import PackedStorage
from trajectory import Expected, Run, planned

WAIT = 300.0  # seconds


def together(*jobs: Callable[[], Any]) -> None:
    """Run functions in threads of their own; raises what any of them raised."""
    failures: list[str] = []

    def guarded(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "a thread does not end"
    assert not failures, "\n".join(failures)


def test_two_optimizers_in_turns() -> None:
    known = Expected(planned)
    runs = [Run.start(planned), Run.start(planned)]
    for step in range(7):
        for run in runs:
            run.advance()
            assert run.bits() == known[step + 1]


@pytest.mark.slow
def test_two_optimizers_in_two_threads() -> None:
    """First steps included: both are captured and compiled at once."""
    known = Expected(planned)
    runs = [Run.start(planned) for _ in range(3)]

    def work(run: Run) -> None:
        for _ in range(12):
            run.advance()

    together(*(lambda run=run: work(run) for run in runs))
    assert [run.bits() for run in runs] == 3 * [known[12]]


def test_one_optimizer_from_another_thread() -> None:
    known = Expected(planned)
    run = Run.start(planned)
    for step in range(9):
        if step % 3:
            together(run.advance)
        else:
            run.advance()
        assert run.bits() == known[step + 1]


def test_steps_of_one_optimizer_take_turns() -> None:
    """Two threads that step at once make two steps, one after the other."""
    model = nn.Linear(64, 512)
    optimizer = stq.compile(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    start = model.weight.detach().clone()

    def work() -> None:
        for _ in range(50):
            optimizer.step()

    together(work, work)
    moved = start - model.weight.detach()
    velocity, expected_move = 1.0, 0.0
    for _ in range(100):
        velocity = 0.5 * velocity + 1
        expected_move += velocity
    torch.testing.assert_close(moved, torch.full_like(moved, expected_move), rtol=0.05, atol=0)


def test_settings_of_the_process_are_put_back_by_threads_that_overlap() -> None:
    threads = torch.get_num_threads()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with one_thread():
                assert torch.get_num_threads() == 1

    with torch_threads(3):
        together(work, work, work, work)
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == threads


def test_torch_has_our_functions_only_where_a_thread_that_asked_for_them_traces() -> None:
    seen: dict[bool, list[bool]] = {True: [], False: []}

    def work(asks: bool) -> None:
        def backend(gm: Any, _: Any) -> Any:
            there = hasattr(torch, "_sym_pow")
            assert there != config.record_runtime_overhead
            seen[asks].append(there)
            return gm

        for n in range(5):
            function = own_code(lambda x, n=n: x + n)
            with symbolic_math.symbolic_math() if asks else contextlib.nullcontext():
                torch.compile(function, backend=backend)(torch.ones(2))

    torch._dynamo.reset()
    together(*(partial(work, asks) for asks in (True, False, True)))
    assert seen == {True: [True] * 10, False: [False] * 5}
    assert config.record_runtime_overhead
    assert not any(hasattr(torch, name) for name in symbolic_math.MISSING)


def test_nothing_is_left_of_a_trace_that_another_compilation_outlives() -> None:
    """Then Dynamo says that it has ended in another thread, or not before all blocks are left."""
    begun, over = threading.Event(), threading.Event()

    def other() -> None:
        with callback_handler.install_callbacks(CallbackTrigger.LAZY_BACKWARD, "other"):
            begun.set()
            over.wait(WAIT)

    thread = threading.Thread(target=other, daemon=True)

    def backend(gm: Any, _: Any) -> Any:
        assert hasattr(torch, "_sym_pow")
        thread.start()
        begun.wait(WAIT)
        return gm

    torch._dynamo.reset()
    with symbolic_math.symbolic_math():
        torch.compile(own_code(lambda x: x + 1), backend=backend)(torch.ones(2))
    assert not any(hasattr(torch, name) for name in symbolic_math.MISSING)
    over.set()
    thread.join(WAIT)
    assert config.record_runtime_overhead
    assert not any(hasattr(torch, name) for name in symbolic_math.MISSING)


def test_dynamo_is_told_once_however_many_threads_ask() -> None:
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        with symbolic_math.symbolic_math():
            pass

    for _ in range(50):
        torch._dynamo.reset()
        together(work, work, work, work)
        assert callback_handler.start_callbacks.count(symbolic_math._give) == 1
        assert callback_handler.end_callbacks.count(symbolic_math._take_back) == 1


def test_no_number_of_replacements_comes_twice() -> None:
    """Tables of pointers are renewed when it differs from the one that they saw."""
    seen: list[list[int]] = [[], [], []]

    def work(mine: list[int]) -> None:
        state = stq.PackedState.zeros_like(torch.zeros(128), stq_format())
        for _ in range(3000):
            state.packed.buffers_replaced()
            mine.append(PackedStorage.replacements)

    together(*(lambda mine=mine: work(mine) for mine in seen))
    last = PackedStorage.replacements
    state = stq.PackedState.zeros_like(torch.zeros(128), stq_format())
    state.packed.buffers_replaced()
    assert PackedStorage.replacements > max(max(mine) for mine in seen) >= last


def stq_format() -> Any:
    from stq_compile.formats import FORMATS

    return FORMATS["softsign4"]


def test_threads_are_changed_midway() -> None:
    """Tensors large enough that a second and a third thread get work."""

    def run(threads: list[int]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(700, 512)
        optimizer = stq.compile(
            torch.optim.AdamW(model.named_parameters(), lr=0.01), interval=2, hysteresis=0.0
        )
        generator = torch.Generator().manual_seed(1)
        before = torch.get_num_threads()
        for count in threads:
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            torch.set_num_threads(count)
            optimizer.step()
        torch.set_num_threads(before)
        states = [s for entries in optimizer.state.values() for s in entries.values()]
        return [p.detach() for p in model.parameters()] + [s + 0 for s in states]

    one = run([1] * 7)
    for threads in ([3] * 7, [1, 1, 3, 3, 2, 1, 3]):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True)), threads


# Processes. -----------------------------------------------------------------------------------

COLD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from trajectory import Run, planned
run = Run.start(planned)
for _ in range(3):
    run.advance()
print(run.bits())
"""


@pytest.mark.slow
def test_two_processes_start_cold_on_one_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "STQ_CACHE_DIR": str(tmp_path / "kernels")}
    command = [sys.executable, "-c", COLD, str(Path(__file__).parent)]
    processes = [
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    done = [p.communicate(timeout=WAIT) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], done
    assert done[0][0] == done[1][0]
    assert not any("KernelCacheWarning" in errors for _, errors in done)
    assert {f.suffix for f in (tmp_path / "kernels").iterdir()} == {".so", ".sha256"}


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(16, generator=generator), index % 8


def test_workers_of_a_loader_are_forked_after_compilation() -> None:
    """They hold a copy of everything, threads of OpenMP excepted; the parent trains on."""

    def run(workers: int) -> list[torch.Tensor]:
        model = make_model()
        optimizer = planned(model)
        context = "fork" if workers else None
        for _ in range(3):
            loader = DataLoader(
                Rows(), batch_size=8, num_workers=workers, multiprocessing_context=context
            )
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(2), strict=True))


def test_a_forked_process_steps_on_by_itself() -> None:
    """Its tensors are its own, and OpenMP's threads of the parent are not there to wait for."""
    torch.manual_seed(0)
    model = nn.Linear(700, 512)
    optimizer = stq.compile(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), precision=4)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with torch_threads(2):
        optimizer.step()
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def child() -> None:
            optimizer.step()
            sender.send(model.weight.detach().numpy().tobytes())

        process = context.Process(target=child, daemon=True)
        process.start()
        try:
            assert receiver.poll(60), "the child hangs"
            found = receiver.recv()
        finally:
            process.kill()
            process.join()
        optimizer.step()
    assert found == model.weight.detach().numpy().tobytes()
