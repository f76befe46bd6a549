"""The emitted C++: deterministic, annotated, and three kernels in full."""

from __future__ import annotations

import hashlib
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphs import Sketch, aten, only, program, with_sizes
from kernels import Rig, compiled, differing, kernel_of, quantized, sgd_math
from stq_compile.codegen.cpp.build import CompiledRun, build
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.ir import STORES, Builder, KernelOperand, OperandKind, Value
from stq_compile.codegen.schedule import INLINE
from stq_compile.errors import KernelBuildError
from stq_compile.formats import FORMATS, Format
from stq_compile.passes.functionalize import functionalize
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import StepGraph
from zoo import sgd

PACKED = {"exp_avg": FORMATS["softsign4"], "exp_avg_sq": FORMATS["adaptive_log3"]}
MOMENTUM = {"momentum_buffer": FORMATS["softsign4"]}


def adamw() -> StepGraph:
    """AdamW with an ``lr`` that is an input, functionalized from torch's own in-place calls."""
    s = Sketch("adamw")
    lr, step, p, g = s.scalar("lr", 0.01), s.counter(), s.param(), s.grad()
    m, v = s.state("exp_avg"), s.state("exp_avg_sq")
    call, rate = s.call, s.call("item", lr)
    call("add_", step, 1, at="adam.py:414 step_t += 1")
    decay = call(operator.sub, 1, call(operator.mul, rate, 0.1))
    call("mul_", p, decay, at="adam.py:418 param.mul_(1 - lr * weight_decay)")
    call("lerp_", m, g, 0.1, at="adam.py:448 exp_avg.lerp_(grad, 1 - beta1)")
    square = "adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)"
    call("addcmul_", call("mul_", v, 0.99, at=square), g, g, value=0.01, at=square)
    rest = [call(operator.sub, 1, call(operator.pow, beta, step)) for beta in (0.9, 0.99)]
    size = call(operator.truediv, rate, rest[0], at="adam.py:489 step_size = lr / correction1")
    root = call(torch.sqrt, call(operator.truediv, v, rest[1]), at="adam.py:520 denom = v.sqrt()")
    update = call(operator.truediv, m, call("add_", root, 1e-8))
    call("sub_", p, call("mul", update, size), at="adam.py:524 param.addcdiv_(exp_avg, denom)")
    return only(functionalize(program(s.inplace())))


def source(unit: StepGraph, formats: dict[str, Format]) -> str:
    return emit(kernel_of(quantized(unit, formats, "stochastic")))


# Whole kernels. Three are enough: elsewhere tests assert structure and numbers. ---------------


def test_adamw_float32(stq_golden: Golden) -> None:
    stq_golden(source(adamw(), {}), ".cpp")


def test_adamw_packed(stq_golden: Golden) -> None:
    stq_golden(source(adamw(), PACKED), ".cpp")


def test_sgd_packed(stq_golden: Golden) -> None:
    stq_golden(source(sgd(), MOMENTUM), ".cpp")


# Determinism. ---------------------------------------------------------------------------------


def digest() -> str:
    text = source(adamw(), PACKED) + source(sgd(), MOMENTUM)
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_same_input_gives_the_same_bytes_in_another_process() -> None:
    """Sets of strings are ordered by PYTHONHASHSEED; emission must not depend on one."""
    folder = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = [{str(folder.parent)!r}, {str(folder)!r}]\n"
        "import test_emit; print(test_emit.digest())"
    )
    seed = "77" if os.environ.get("PYTHONHASHSEED") != "77" else "78"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest()


# Every computing line says where it comes from. -----------------------------------------------


@pytest.mark.parametrize("formats", [{}, PACKED])
def test_every_operation_has_a_line_that_names_its_graph_node(formats: dict[str, Format]) -> None:
    unit = quantized(adamw(), formats, "stochastic")
    kernel = kernel_of(unit)
    lines = [line.strip() for line in emit(kernel).splitlines()]
    known = {n.name for n in unit.graph.nodes} | {o.describe() for o in unit.operands}
    assert len(kernel.body) > 20
    for v in kernel.body:
        if v.opcode in INLINE:
            continue  # written out wherever it is used
        notes = [line.partition("  // ")[2] for line in lines if _computes(line, v)]
        origin = v.origin if v.origin in known else v.origin.split("  ")[0]
        assert origin in known or origin.startswith("-> "), f"{v.name} comes from {v.origin!r}"
        node = origin.split("  ")[0]
        assert notes, f"no line computes {v.name}"
        assert all(note.split("  ")[0] == node for note in notes), f"{v.name}: {notes}"


def _computes(line: str, v: Value) -> bool:
    """Whether the line assigns a value, or is the store of an operand."""
    if v.opcode in STORES:
        return f"// -> {v.operand}" in line
    return re.match(rf"(const [\w:]+ |held\.)?{v.name}_?(\[\w+\])* = ", line) is not None


def test_lines_of_the_optimizer_are_named() -> None:
    text = source(adamw(), PACKED)
    for line in ("adam.py:418", "adam.py:448", "adam.py:471", "adam.py:489", "adam.py:524"):
        assert line in text


def test_the_summary_says_what_the_kernel_is() -> None:
    first = source(sgd(), MOMENTUM).splitlines()[0]
    assert first == (
        "// sgd_momentum_buffer_softsign4: momentum_buffer_0 softsign4; 13.03 bytes per element"
    )


# Names and literals. --------------------------------------------------------------------------


def test_operands_may_be_named_like_keywords_of_cpp_and_the_kernels_own_names() -> None:
    """A changing ``self.index`` becomes an operand called ``index``."""
    keys = ["double", "new", "namespace", "operator", "alignas", "int", "NULL", "std", "stq",
            "step", "index", "s", "row", "p", "count", "first", "tail", "numel", "first_block",
            "block", "run", "scalars"]  # fmt: skip
    operands = [KernelOperand(key, OperandKind.FLOATS, written=True) for key in keys]
    b = Builder("names", operands)
    b.origin = "here"
    for key in keys:
        b.store("store", key, b.op("mul", b.read("load", key), 2.0))
    build("names", emit(b.kernel))


@pytest.mark.parametrize(
    "value", [float("inf"), -float("inf"), float("nan"), 1e-42, -0.0, 3.4e38, 1e300, 16777217.0, 7]
)
def test_literals_keep_their_float32_value(value: float) -> None:
    text = source(literal_unit(value), {})
    line = next(x for x in text.splitlines() if " * " in x and "mul_tensor" in x)
    literal = line.split(" * ")[1].split(";")[0]
    constants = {"INFINITY": float("inf"), "-INFINITY": -float("inf"), "NAN": float("nan")}
    found = constants.get(literal)
    if found is None:
        assert re.fullmatch(r"-?\d.*[.e].*f", literal), "no float literal in C++"
        found = float(literal.removesuffix("f"))
    expected = torch.tensor(value, dtype=torch.float64).float()
    assert torch.tensor(found, dtype=torch.float64).float().equal(expected) or found != found
    assert str(found)[0] == str(float(expected))[0]  # the sign of zero


def literal_unit(value: float) -> StepGraph:
    s = Sketch(shape=(5,))
    p, g = s.param(), s.grad()
    return s.functional({p: s.call(aten.add.Tensor, p, s.call(aten.mul.Tensor, g, value))})


def test_an_empty_tensor_is_no_work() -> None:
    rig = Rig(sgd(), MOMENTUM, "stochastic", sizes=(0, 5, 0))
    expected = rig.expected(sgd_math, 0)
    rig.run(compiled(rig.kernel), 0)
    assert not differing(rig.bits(), expected)


def test_the_source_does_not_depend_on_the_tensors() -> None:
    """Or a change of one tensor's width would compile other buckets anew."""
    few, many = (
        kernel_of(quantized(with_sizes(sgd(), sizes), MOMENTUM, "nearest"))
        for sizes in ((7,), (5, 300, 20))
    )
    assert emit(few) == emit(many)


def test_a_compiler_error_names_the_kernel_and_shows_the_output() -> None:
    with pytest.raises(KernelBuildError, match=r"kernel broken[\s\S]*error[\s\S]*g\+\+"):
        build("broken", "this is no C++")


def test_a_run_that_was_interrupted_takes_its_memory_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between taking memory and noting where it is, numpy's code is run."""

    class Kernel:
        def scratch(self, n_rows: int, threads: int) -> Any:
            return np.empty(1000 * threads, dtype=np.uint8)

    class Table:
        def __init__(self) -> None:
            self.interrupts = False

        def __len__(self) -> int:
            return 1

        @property
        def ctypes(self) -> Any:
            if self.interrupts:
                raise KeyboardInterrupt
            return np.zeros(1).ctypes

    table: Any = Table()
    kernel: Any = Kernel()
    run = CompiledRun(kernel, table)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run.prepare()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    table.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        run.prepare()
    table.interrupts = False
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run.prepare()
    assert run.addresses[1] == run.scratch.ctypes.data
