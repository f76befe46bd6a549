"""The run time of a GPU without one: `stq.compile` on Triton kernels under the interpreter.

CPU tensors stand for a device's (`interpreter.interpreter_as_cpu`); all else is what runs on a GPU:
tables that are sent, a clock that the kernels move on, looks of the planner, changes of width by
the device's codec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import stq_compile as stq
from device_runs import CASES, Trained, replayed, train
from interpreter import interpreter_as_cpu, submit
from stq_compile import codec, compiled_step, runtime
from stq_compile.architectures import MODELS
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.triton import run
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.kernel import TritonKernel, tile_map
from stq_compile.codegen.triton.text import Emitted
from stq_compile.rounding import signed64, stream_key
from stq_compile.step_graph import Role

FUNCTIONS = ("scalars", "update", "measure")
FAST = ("adamw", "bfloat16")


def interpreted_run(name: str) -> tuple[Trained, list[str]]:
    """A run, and every launch that it made; changes of width by kernels, however small."""
    launches: list[str] = []

    def counted(function: str) -> Callable[..., Any]:
        original = getattr(TritonKernel, function)

        def call(self: TritonKernel, *args: Any, **kwargs: Any) -> Any:
            launches.append(f"{function} {self.emitted.name}")
            return original(self, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, interpreter_as_cpu():
        patch.setattr(codec, "WORTH_BUILDING", 0)
        for function in FUNCTIONS:
            patch.setattr(TritonKernel, function, counted(function))
        return train(CASES[name], "cpu"), launches


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_a_run_has_the_bits_of_the_cpp_kernels(name: str) -> None:
    """Each step is compared with the eager one; the end, with the CPU's own kernels."""
    started = submit(interpreted_run, name)
    wanted = train(CASES[name], "cpu", check=False)
    got, launches = started.result()
    assert (got.formats, got.transitions) == (wanted.formats, wanted.transitions)
    for key, codes in wanted.codes.items():
        assert torch.equal(got.codes[key], codes), key
    for p, q in zip(got.params, wanted.params, strict=True):
        assert torch.equal(p, q)
    case = CASES[name]
    kinds = {launch.split()[0] for launch in launches}
    assert ("update" in kinds) == case.fused
    assert ("measure" in kinds) == ("interval" in case.options)
    assert any("reencode" in launch for launch in launches) == (got.transitions > 0)
    assert (got.transitions > 0) == ("interval" in case.options or bool(case.change))


# A step that is replayed by a CUDA graph. -----------------------------------------------------


def replay_launches(
    step: Callable[[], object], times: int, before: Callable[[int], None]
) -> Callable[[], None]:
    """What replaying a captured graph does: the launches of one step, again and again."""
    steps: list[run.DeviceStep] = []
    call = run.DeviceStep.__call__

    def noted(self: run.DeviceStep, number: int) -> None:
        steps.append(self)
        call(self, number)

    def again() -> None:
        for one in steps:
            one.launch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.DeviceStep, "__call__", noted)
        patch.setattr(compiled_step, "recording", lambda: True)
        before(0)
        step()
    for number in range(1, times):
        before(number)
        again()
    return again


def interpreted_replay() -> list[str]:
    with interpreter_as_cpu():
        return replayed("cpu", replay_launches)


@pytest.mark.slow
def test_a_replayed_step_is_the_next_step() -> None:
    """Step counters, bias corrections and random numbers move on without the host, and so does a
    learning rate that is a tensor; a checkpoint counts the replays."""
    assert not submit(interpreted_replay).result()


# Launches. ------------------------------------------------------------------------------------


def launches_of_gpt2() -> tuple[int, list[int]]:
    """Parameters, and launches of each step, with tensors a hundredth as large as GPT-2's."""
    launches: list[str] = []

    def count(self: TritonKernel, *args: Any, **kwargs: Any) -> None:
        launches.append(self.emitted.name)

    shapes = [tuple(max(1, n // 8) for n in shape) for shape in MODELS["gpt2"]().values()]
    params = [Parameter(torch.zeros(shape)) for shape in shapes]
    found = []
    with pytest.MonkeyPatch.context() as patch, interpreter_as_cpu():
        for function in FUNCTIONS:
            patch.setattr(TritonKernel, function, count)
        precision = {"exp_avg": 4, "exp_avg_sq": 3}
        optimizer = stq.compile(torch.optim.AdamW(params), precision=precision, min_numel=512)
        for _ in range(3):
            for p in params:
                p.grad = torch.zeros_like(p)
            launches.clear()
            optimizer.step()
            found.append(len(launches))
    return len(params), found


@pytest.mark.slow
def test_gpt2_takes_four_launches_a_step() -> None:
    """Small tensors stay float32: two kernels, each with its scalars before it."""
    assert submit(launches_of_gpt2).result() == (148, [4, 4, 4])


# Faults in the tables. ------------------------------------------------------------------------


def shifted_tiles(numels: Any, blocks: int) -> Any:
    tiles = tile_map(numels, blocks)
    tiles[:, 1] += tiles[:, 1] > 0
    return tiles


class Elsewhere:
    """Codes or scale words that are read and written beside the state's own."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.kept: list[Tensor] = []
        self.buffer = runtime._buffer

    def __call__(self, storage: Any, role: Role) -> Tensor:
        found = self.buffer(storage, role)
        if role is self.role:
            self.kept.append(found.clone())
            return self.kept[-1]
        return found


def sent_once(self: run.DeviceTable) -> bool:
    """The first table for ever, though gradients have other addresses."""
    if self.last is not None:
        return False
    self.last = self.host.copy()
    self.device.copy_(torch.from_numpy(self.last))
    return True


def misread(old: str, new: str) -> Callable[[], Any]:
    """Kernels that read otherwise than they should."""

    def changed(kernel: Kernel) -> Emitted:
        right = emit(kernel)
        return replace(right, source=right.source.replace(old, new))

    return lambda: changed


FAULTS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "the tiles of a tensor": (run, "tile_map", lambda: shifted_tiles),
    "the clock": (run, "signed64", lambda: lambda step: signed64(step) + 1),
    "the random stream": (runtime, "stream_key", lambda: lambda s: stream_key(s + 1)),
    "the random counter": (runtime, "_first_block", lambda: lambda param: 1),
    "the scales": (runtime, "_buffer", lambda: Elsewhere(Role.SCALES)),
    "the codes": (runtime, "_buffer", lambda: Elsewhere(Role.CODES)),
    "a table that is old": (run.DeviceTable, "send", lambda: sent_once),
    "the packing order": (run, "emit", misread("_bytes, 4, plane(i))", "_bytes, 4, plane(i ^ 1))")),
    "the value of a scale": (run, "emit", misread("exp_avg_0_word << 16", "exp_avg_0_word << 15")),
}
"""Module, name, and what makes that which takes its place."""


def faulty_run(fault: str) -> str:
    """What the comparison with the eager optimizer says of two steps."""
    module, name, make = FAULTS.get(fault, (run, "emit", lambda: emit))
    with pytest.MonkeyPatch.context() as patch, interpreter_as_cpu():
        patch.setattr(module, name, make())
        try:
            train(CASES["adamw"], "cpu", steps=2)
        except AssertionError as error:
            return f"seen: {error}"
    return ""


@pytest.mark.slow
def test_the_comparison_sees_faults_in_the_tables() -> None:
    started = {fault: submit(faulty_run, fault) for fault in ("", *FAULTS)}
    seen = {fault: future.result() for fault, future in started.items()}
    assert not seen.pop("")
    assert all(seen.values()), seen
