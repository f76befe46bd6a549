"""``python out_of_memory_process.py ALLOCATOR CASE [first]``: a process whose memory runs out.

Prints how many allocations failed, one in each attempt, and fails if any left something behind that
must not be. See `test_out_of_memory`.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import stq_compile as stq
from stq_compile.compiled_step import CompiledStep
from stq_compile.errors import (
    EagerStepMemoryError,
    EagerStepWarning,
    PartialStepError,
    PlanningWarning,
    StepMemoryError,
)
from stq_compile.session import Session
from test_interrupts import Counting, counting, regions
from trajectory import Expected, Run, planned, session

MOST = {"regions": 40, "eager": 100, "counting": 100}
"""Attempts by case; a step of Muon takes a fifth of a second."""


class Branching(Counting):
    """Its step asks for a value, so that it runs eagerly."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        if self.param_groups[0]["params"][0].sum() != 0:
            super().step()


def eager(model: nn.Module) -> torch.optim.Optimizer:
    return stq.compile(Branching(model.parameters()), min_numel=64, precision=4)


MAKE = {"planned": planned, "counting": counting, "regions": regions, "eager": eager}


def fails_at(library: Any, at: int, call: Callable[[], Any]) -> tuple[bool, Exception | None, str]:
    """Whether the call came to allocation ``at``, what it raised, and of what it warned."""
    error: Exception | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library.arm(at)
        try:
            call()
        except Exception as found:
            error = found
        finally:
            count = library.disarm()
    told = [str(w.message) for w in caught if issubclass(w.category, PlanningWarning)]
    return count >= at, error, " ".join(told)


def with_planner(library: Any) -> int:
    """Beside a twin that is left in peace, and that leaves out what memory did not suffice for."""
    run, twin = Run.start(planned), Run.start(planned)
    for _ in range(6):
        run.advance()
        twin.advance()
    tried = warned = 0
    for at in range(1, 80000, 97):
        finished = 0
        for _ in range(2):  # a plain step and one with a look
            run.gradients()
            reached, error, warning = fails_at(library, at, run.optimizer.step)
            if error is not None:
                assert isinstance(error, StepMemoryError), repr(error)
                assert "call step() again" in str(error)
                assert run.bits() == twin.bits()
                run.gradients()
                run.optimizer.step()
            run.step += 1
            skipped: Any = nullcontext()
            if warning:
                target = CompiledStep if "not measure" in warning else Session
                name = "_look" if "not measure" in warning else "replan"
                skipped = patch.object(target, name, side_effect=MemoryError)
                assert "free some memory" in warning
                assert "not measure" in warning or "not change widths" in warning
            with skipped, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twin.advance()
            assert run.bits() == twin.bits(), (at, warning, error)
            tried += reached
            warned += bool(warning)
            finished += not reached
        if finished == 2:
            assert warned > 5
            return tried
    raise AssertionError("a step has more allocations than were tried")


Part = dict[Any, list[torch.Tensor]]


def parts(run: Run) -> Part:
    """What each parameter consists of: itself, and the tensors of its states."""
    found: Part = {id(p): [p.detach()] for p in run.model.parameters()}
    for leaf, _ in session(run.optimizer).leaves():
        if isinstance(leaf.value, stq.PackedState):
            assert leaf.value.packed.working is None
            found[id(leaf.owner)] += [leaf.value.packed.codes, leaf.value.packed.scales]
        else:
            found[id(leaf.owner)].append(leaf.value)
    return found


def copies(part: Part) -> Part:
    return {key: [t.clone() for t in tensors] for key, tensors in part.items()}


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def put_back(run: Run, before: Part, counters: dict[Any, Any], steps: int) -> None:
    """Everything as it was, in whatever buffers it is now."""
    for key, tensors in parts(run).items():
        for tensor, former in zip(tensors, before[key], strict=True):
            tensor.copy_(former)
    for leaf, _ in session(run.optimizer).leaves():
        if isinstance(leaf.value, stq.PackedState):
            leaf.value.packed.eager_writes = counters[id(leaf.value.packed)]
    for state in run.optimizer.state.values():
        if "count" in state:
            state["count"] = steps
    session(run.optimizer).steps = steps


def with_pinned_widths(library: Any, case: str) -> int:
    """Always the same step, from the same state."""
    run = Run.start(MAKE[case])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EagerStepWarning)
        for _ in range(6):
            run.advance()
    before, steps = copies(parts(run)), session(run.optimizer).steps
    counters = {
        id(leaf.value.packed): leaf.value.packed.eager_writes
        for leaf, _ in session(run.optimizer).leaves()
        if isinstance(leaf.value, stq.PackedState)
    }
    run.gradients()
    library.arm(0)
    run.optimizer.step()
    total = library.disarm()
    after = copies(parts(run))
    torn = tried = 0
    for at in range(1, total + 1, max(1, total // MOST[case])):
        put_back(run, before, counters, steps)
        reached, error, _ = fails_at(library, at, run.optimizer.step)
        assert reached
        tried += 1
        now = parts(run)
        old = sum(same(now[key], before[key]) for key in now)
        new = sum(same(now[key], after[key]) for key in now)
        if case == "eager":
            assert isinstance(error, EagerStepMemoryError), repr(error)
            for key, tensors in now.items():
                for tensor, was, becomes in zip(tensors, before[key], after[key], strict=True):
                    if tensor.ndim > 0 and tensor.dtype != torch.float32:
                        assert torch.equal(tensor, was) or torch.equal(tensor, becomes), at
            continue
        assert old + new >= len(now), f"allocation {at}: a parameter is half updated"
        if isinstance(error, PartialStepError):
            assert case == "regions"
            assert 0 < error.fields["done"] < len(now)  # type: ignore[operator]  # a number
            torn += 1
        elif error is not None:
            assert isinstance(error, StepMemoryError), repr(error)
            assert old == len(now), at
        else:
            assert new == len(now), at
    put_back(run, before, counters, steps)
    run.optimizer.step()
    assert all(same(now, after[key]) for key, now in parts(run).items())
    print(torn, "steps of", tried, "were made in part; allocations in all:", total)
    return tried


def first_step(library: Any, case: str) -> int:
    """Capture and compilation included; some allocations of them."""
    known = Expected(MAKE[case])
    run = Run.start(MAKE[case])
    run.gradients()
    library.arm(0)
    run.optimizer.step()
    total = library.disarm()
    tried = 0
    for at in range(1, total + 1, max(1, total // 30)):
        run = Run.start(MAKE[case])
        run.gradients()
        reached, error, _ = fails_at(library, at, run.optimizer.step)
        tried += reached
        if isinstance(error, PartialStepError):
            continue
        if error is not None:
            assert isinstance(error, StepMemoryError), repr(error)
            assert run.bits() == known[0], at
            run.advance()
        assert run.bits() == known[1], at
    return tried


def main() -> None:
    torch.set_num_threads(1)
    library = ctypes.CDLL(sys.argv[1])
    library.arm.argtypes = [ctypes.c_long]
    library.disarm.restype = ctypes.c_long
    case = sys.argv[2]
    if "first" in sys.argv:
        print(first_step(library, case))
    elif case == "planned":
        print(with_planner(library))
    else:
        print(with_pinned_widths(library, case))


if __name__ == "__main__":
    main()
