"""Ahead-of-time compilation: what the kernels need of GPUs that are not here.

Triton's compiler runs in processes of its own, since one with interpreted kernels cannot compile.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_emit import adamw
from test_measure_kernel import MOMENTUM, measuring
from test_reencode import CHANGES
from test_triton_emit import with_dtype

from kernels import quantized
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.lower import lower
from stq_compile.codegen.reencode import reencode_kernel
from stq_compile.codegen.target import parse_target
from stq_compile.codegen.triton.aot import Resources, compile_for
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.report import static_report
from stq_compile.formats import FORMATS, Format
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import StepGraph
from zoo import ADAM_FACTS, adagrad, adam, adamax, amsgrad, lion, rmsprop, sgd

Report = dict[str, Any]
AT_4_4 = {"exp_avg": FORMATS["midrise4"], "exp_avg_sq": FORMATS["adaptive_log4"]}
AT_4_3 = {"exp_avg": FORMATS["midrise4"], "exp_avg_sq": FORMATS["adaptive_log3"]}
AT_2_3 = {"exp_avg": FORMATS["midrise2"], "exp_avg_sq": FORMATS["adaptive_log3"]}
ADAMW = replace(adamw(), facts=ADAM_FACTS)
ONE_REGISTER = 8  # of a thread: its stack grows by this
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
UNITS: dict[str, tuple[StepGraph, dict[str, Format]]] = {
    "adamw 4+4": (ADAMW, AT_4_4),
    "adamw 4+3": (ADAMW, AT_4_3),
    "adamw float32": (adamw(), {}),
    "adam 2+3": (adam(ADAM_FACTS), AT_2_3),
    "lion 5": (lion(), {"exp_avg": FORMATS["softsign5"]}),
    "sgd 6 bfloat16": (
        with_dtype(sgd(), torch.bfloat16),
        {"momentum_buffer": FORMATS["softsign6"]},
    ),
}


def report(name: str, target: str) -> Report:
    unit, formats = UNITS[name]
    kernel = lower(quantized(unit, formats, "stochastic"))
    return static_report(kernel, emit(kernel), unit.name, parse_target(target)).as_dict()


def kernel_of(name: str) -> Kernel:
    """``"measure adam"``, ``"from softsign4 to midrise3"``, or one of `UNITS` and `matrix`."""
    kind, *rest = name.split()
    if kind == "measure":
        unit, formats = {"sgd": (sgd(), MOMENTUM), "adam": (adam(ADAM_FACTS), AT_4_4)}[rest[0]]
        return lower(quantized(measuring(unit), formats, "nearest"))
    if kind == "from":
        old, new = FORMATS[rest[0]], FORMATS[rest[2]]
        unit_format = FORMATS["adaptive_log4"] if old.normalized or new.normalized else None
        return reencode_kernel(old, new, "stochastic", unit_format)
    unit, formats = {**UNITS, **matrix()}[name]
    return lower(quantized(unit, formats, "stochastic"))


def uses(name: str, target: str, function: str = "") -> Resources:
    """What a kernel takes, and takes to compile; assembly is left out."""
    function = function or ("measure" if name.startswith("measure") else "update")
    found = compile_for(emit(kernel_of(name)), parse_target(target), function=function)
    return replace(found, assembly="")


def matrix() -> dict[str, tuple[StepGraph, dict[str, Format]]]:
    """AdamW at every width, and every optimizer of the zoo."""
    found = {}
    for width in (2, 3, 4, 5, 6, 8, 16):
        signed = "bfloat16" if width == 16 else f"softsign{width}"
        plain = "bfloat16" if width == 16 else f"adaptive_log{width}"
        found[f"adamw {width}"] = (
            adamw(),
            {"exp_avg": FORMATS[signed], "exp_avg_sq": FORMATS[plain]},
        )
    for unit in (sgd(), lion(), adagrad(), adamax(), amsgrad(), rmsprop(centered=True)):
        keys = [o.source.key for o in unit.operands if o.role == "state" and o.shape != ()]
        found[unit.name] = (unit, dict.fromkeys(keys, FORMATS["softsign4"]))
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=_compile_anew) as processes:
        yield processes


def _compile_anew() -> None:
    """What Triton finds in its cache takes no time, and says nothing of what compiling takes."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"


@pytest.fixture(scope="module")
def reports(pool: ProcessPoolExecutor) -> dict[tuple[str, str], Report]:
    """AdamW at 4+3 on every target, the other units on one."""
    wanted = [("adamw 4+3", t) for t in TARGETS if t != "cuda:90"]
    wanted += [(name, "cuda:90") for name in UNITS]
    started = {key: pool.submit(report, *key) for key in wanted}
    return {key: future.result() for key, future in started.items()}


@pytest.mark.parametrize("name", ["adamw 4+4", "adamw 4+3"])
def test_adamw_as_it_is_recommended_on_an_h100(
    name: str, reports: dict[tuple[str, str], Report]
) -> None:
    found = reports[name, "cuda:90"]
    assert (found["spill_bytes"] <= ONE_REGISTER, found["local_bytes"]) == (True, 0)
    assert found["registers"] <= 128
    assert (found["shared_bytes"], found["barriers"]) == (0, 0)
    assert found["widest_access_bits"] == 128
    assert found["bytes_per_param"] <= 15
    assert found["counted_bytes_per_param"] == pytest.approx(found["bytes_per_param"], abs=0.05)


@pytest.mark.parametrize("target", TARGETS)
def test_no_more_than_one_register_is_spilled_anywhere(
    target: str, reports: dict[tuple[str, str], Report]
) -> None:
    found = reports["adamw 4+3", target]
    assert found["registers"] <= 128 or target.startswith("hip")
    assert found["spill_bytes"] <= ONE_REGISTER
    for use in ("local_bytes", "shared_bytes", "barriers"):
        assert found[use] == 0, use


@pytest.mark.parametrize("name", UNITS)
def test_the_count_of_instructions_agrees_with_the_kernels(
    name: str, reports: dict[tuple[str, str], Report]
) -> None:
    found = reports[name, "cuda:90"]
    assert found["counted_bytes_per_param"] == pytest.approx(found["bytes_per_param"], abs=0.05)


@pytest.mark.parametrize(
    ("target", "machine", "bandwidth", "instructions", "registers", "lanes", "most_warps"),
    [
        ("cuda:80", "A100", 2039e9, 19.5e12 / 2, 65536, 32, 64),
        ("cuda:90", "H100", 3.35e12, 67e12 / 2, 65536, 32, 64),
        ("hip:gfx942", "MI300X", 5.3e12, 163.4e12 / 4, 131072, 64, 32),
    ],
)
def test_predictions_follow_from_published_figures(
    target: str,
    machine: str,
    bandwidth: float,
    instructions: float,
    registers: int,
    lanes: int,
    most_warps: int,
    reports: dict[tuple[str, str], Report],
) -> None:
    """Nanoseconds per parameter by bytes and by instructions; warps by registers, in fours."""
    found = reports["adamw 4+3", target]
    moved = {"memory_time": found["bytes_per_param"], "fused_float32_time": 28.0}
    for name, size in moved.items():
        assert found[name] == {machine: pytest.approx(size / bandwidth * 1e9, rel=0.01)}
    time = found["instructions_per_param"] / instructions * 1e9
    assert found["instruction_time"] == {machine: pytest.approx(time, rel=0.01)}
    warps = registers // (-(-found["registers"] // 8) * 8 * lanes) // 4 * 4
    assert found["occupancy_limit"] == min(warps, most_warps) / most_warps


def test_nothing_is_predicted_of_a_gpu_without_figures(
    reports: dict[tuple[str, str], Report],
) -> None:
    found = reports["adamw 4+3", "cuda:100"]
    assert (found["memory_time"], found["occupancy_limit"]) == ({}, None)


@pytest.mark.parametrize("name", UNITS)
def test_static_report(
    name: str, reports: dict[tuple[str, str], Report], stq_golden: Golden
) -> None:
    """Source and what does not depend on the assembler's version."""
    found = reports[name, "cuda:90"]
    keys = ("name", "template", "widths", "target", "spill_bytes", "shared_bytes", "barriers")
    keys += ("widest_access_bits", "bytes_per_param", "counted_bytes_per_param")
    facts = json.dumps({k: found[k] for k in keys}, indent=1)
    commented = "\n".join(f"# {line}" for line in facts.splitlines())
    stq_golden(f"{commented}\n{found['source']}", ".txt")


def rounds_to_nearest() -> bool:
    unit, formats = UNITS["sgd 6 bfloat16"]
    emitted = emit(lower(quantized(unit, formats, "stochastic")))
    found = compile_for(emitted, parse_target("cuda:90"))
    return "cvt.rn.bf16" in found.assembly and "cvt.rz.bf16" not in found.assembly


def test_bfloat16_parameters_are_rounded_to_nearest(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(rounds_to_nearest).result()


def test_the_scalars_kernel_compiles(pool: ProcessPoolExecutor) -> None:
    started = [pool.submit(uses, "adamw 4+4", t, "scalars") for t in TARGETS]
    assert [s.result().spill_bytes for s in started] == [0] * len(TARGETS)


@pytest.mark.parametrize("name", ["measure sgd", "measure adam"])
def test_a_measuring_kernel_is_one_warp_s(name: str, pool: ProcessPoolExecutor) -> None:
    """No sum goes through shared memory."""
    found = pool.submit(uses, name, "cuda:90").result()
    assert (found.spill_bytes, found.local_bytes) == (0, 0)
    assert (found.shared_bytes, found.barriers) == (0, 0)


# Everything. ----------------------------------------------------------------------------------

MOST_SECONDS = 3.0
TRIES = 3
"""Of a compilation: processor time, too, is longer while others use the memory."""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_in_time(target: str, pool: ProcessPoolExecutor) -> None:
    """Steps, looks, changes of width; the first compilation of a process is left out."""
    names = [*UNITS, *matrix(), "measure sgd", "measure adam"]
    names += [f"from {old} to {new}" for old, new in CHANGES]
    for start in [pool.submit(uses, "sgd", target) for _ in range(2)]:
        start.result()
    started = {name: pool.submit(uses, name, target) for name in names}
    for name, future in started.items():
        found = future.result()
        seconds = [found.seconds]
        assert seconds[0] > 0.02, f"{name} was not compiled"
        while seconds[-1] >= MOST_SECONDS and len(seconds) < TRIES:
            seconds.append(pool.submit(uses, name, target).result().seconds)
        print(f"{target} {name}: {min(seconds):.2f} s, {found.registers} registers", end=", ")
        print(f"{found.spill_bytes} bytes spilled")
        assert min(seconds) < MOST_SECONDS, name
        if name.startswith("measure") and target.startswith("cuda"):
            assert (found.spill_bytes, found.shared_bytes, found.barriers) == (0, 0, 0)
