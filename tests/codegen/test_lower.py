"""Every lowering against torch, in one kernel for elements and one for scalars."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from graphs import Sketch, aten, only, program
from kernels import Rig, compiled, differing, quantized, run_compiled
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.ir import OperandKind
from stq_compile.codegen.lower import LOWERINGS, bytes_per_element, lower, lowers, why_not
from stq_compile.errors import (
    DuplicateLoweringError,
    InvalidKernelError,
)
from stq_compile.formats import FORMATS
from stq_compile.passes.partition import partition, why_unfused
from stq_compile.step_graph import StepGraph
from zoo import sgd

Row = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operator and its arguments: x and y are tensors of elements, k a counter."""

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e-42, 3e38, float("inf"), -float("inf"), float("nan")]
EXACT: list[Row] = [
    (aten.mul.Tensor, ("x", "y"), {}), (aten.mul.Scalar, ("x", 0.3), {}),
    (aten.div.Tensor, ("x", "y"), {}), (aten.div.Scalar, ("x", 3.0), {}),
    (aten.add.Tensor, ("x", "y"), {}), (aten.add.Scalar, ("x", 0.3), {}),
    (aten.sub.Tensor, ("x", "y"), {}), (aten.sub.Scalar, ("x", 0.3), {}),
    (aten.add.Tensor, ("x", "y"), {"alpha": 2}), (aten.sub.Tensor, ("x", "y"), {"alpha": -4}),
    (aten.rsub.Scalar, ("x", 1.0), {}), (aten.rsub.Tensor, ("x", "y"), {}),
    (aten.rsub.Scalar, ("x", 1.0, 2.0), {}), (aten.rsub.Tensor, ("x", "y"), {"alpha": 2}),
    (aten.neg.default, ("x",), {}), (aten.abs.default, ("x",), {}),
    (aten.reciprocal.default, ("x",), {}), (aten.sign.default, ("x",), {}),
    (aten.floor.default, ("x",), {}), (aten.ceil.default, ("x",), {}),
    (aten.maximum.default, ("x", "y"), {}), (aten.minimum.default, ("x", "y"), {}),
    (aten.clamp.default, ("x", -0.5, 0.5), {}), (aten.clamp.default, ("x", None, 0.5), {}),
    (aten.clamp.default, ("x",), {"min": -0.5}), (aten.clamp.Tensor, ("x", "y"), {}),
    (aten.clamp.default, ("x", 0.5, -0.5), {}),
    (aten.pow.Tensor_Scalar, ("x", 2), {}), (aten.pow.Tensor_Scalar, ("x", 2.0), {}),
    (aten.where.self, ("x<y", "x", "y"), {}), (aten.where.self, ("mask and late", "x", "y"), {}),
    (aten.where.self, ("not (mask and late)", "x", "y"), {}),
    (aten.where.self, ("not (mask or early)", "x", "y"), {}),
    (aten.clone.default, ("x",), {}), (aten.copy.default, ("x", "y"), {}),
    (aten._to_copy.default, ("x",), {"dtype": torch.float32}),
    (aten._to_copy.default, ("x<y",), {"dtype": torch.float32}),
    (aten.mul.Tensor, ("x", "x<y"), {}),
    (aten.full_like.default, ("x", 0.25), {}), (aten.zeros_like.default, ("x",), {}),
    (aten.ones_like.default, ("x",), {}),
    (aten.neg.default, ("-1",), {}), (aten.mul.Tensor, ("-1", "x"), {}),
    (aten.mul.Tensor, ("x", "k"), {}), (aten.maximum.default, ("x", "k"), {}),
]  # fmt: skip
ROUNDED: list[Row] = [
    (aten.sqrt.default, ("x",), {}), (aten.rsqrt.default, ("x",), {}),
    (aten.pow.Tensor_Scalar, ("x", 0.5), {}), (aten.exp.default, ("x",), {}),
    (aten.log.default, ("x",), {}), (aten.pow.Tensor_Scalar, ("x", 1.7), {}),
    (aten.pow.Scalar, (0.9, "x"), {}), (aten.pow.Tensor_Tensor, ("x", "y"), {}),
    (aten.add.Tensor, ("x", "y"), {"alpha": 0.3}), (aten.sub.Tensor, ("x", "y"), {"alpha": 0.3}),
]  # fmt: skip
"""Where torch's own result may be off by a rounding or two."""


class Inputs:
    """The nodes that the rows name."""

    def __init__(self, s: Sketch) -> None:
        self.s = s
        self.p, self.x, self.y, self.k = s.param(), s.grad(), s.state("y"), s.counter("k")

    def __call__(self, name: Any) -> Any:
        call, x, y = self.s.call, self.x, self.y
        made: dict[Any, Callable[[], fx.Node]] = {
            "x": lambda: x,
            "y": lambda: y,
            "k": lambda: self.k,
            "-1": lambda: call(aten.full_like.default, x, -1.0),
            "x<y": lambda: call(aten.lt.Tensor, x, y),
            "mask and late": lambda: self.flagged(aten.logical_and.default, aten.gt.Scalar),
            "mask or early": lambda: self.flagged(aten.logical_or.default, aten.lt.Scalar),
        }
        if isinstance(name, str) and name.startswith("not ("):
            return call(aten.logical_not.default, self(name[5:-1]))
        return made[name]() if isinstance(name, str) else name

    def flagged(self, join: Any, compare: Any) -> fx.Node:
        """A mask of elements joined with a condition on the counter that is true."""
        bound = 2.0 if compare is aten.gt.Scalar else 5.0
        mask = self.s.call(aten.lt.Tensor, self.x, self.y)
        return self.s.call(join, mask, self.s.call(compare, self.k, bound))


def table_of(rows: list[Row]) -> StepGraph:
    """A unit with a state per row that takes the row's result."""
    s = Sketch(shape=(1000,))
    nodes = Inputs(s)
    outputs = [s.state(f"out{i}") for i in range(len(rows))]
    writes = {nodes.p: s.call(torch.ops.prims.fma.default, nodes.x, nodes.y, nodes.p)}
    for out, (target, args, kwargs) in zip(outputs, rows, strict=True):
        writes[out] = s.call(target, *(nodes(a) for a in args), **kwargs)
    return s.functional(writes)


def inputs_of(unit: StepGraph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {o.name: torch.randn(o.shape, generator=generator) for o in unit.operands}
    special = torch.tensor(SPECIAL)
    count = len(SPECIAL)
    values["grad_0"][: count * count] = special.repeat(count)
    values["y_0"][: count * count] = special.repeat_interleave(count)
    values["k_0"] = torch.tensor(3.0)
    return values


def lowerable(row: Row) -> bool:
    try:
        source = emit(lower(table_of([row])))
    except InvalidKernelError:
        return False
    return "--" not in source  # is no negation of a negative number in C++


def differences(rows: list[Row], tolerance: float) -> dict[int, str]:
    """Rows whose results differ: an input, our result and torch's."""
    unit = table_of(rows)
    inputs = inputs_of(unit)
    expected = dict(zip(unit.writes or (), unit.run(*inputs.values()), strict=True))
    got = run_compiled(unit, inputs)
    wrong = {}
    for i in range(len(rows)):
        a, b = got[f"out{i}_0"], expected[f"out{i}_0"].float().expand(1000)
        bad = ~torch.isclose(a, b, rtol=tolerance, atol=0.0, equal_nan=True)
        if bool(bad.any()):
            x, y = inputs["grad_0"][bad][0], inputs["y_0"][bad][0]
            wrong[i] = f"x = {x}, y = {y}: {a[bad][0]}, torch gives {b[bad][0]}"
    x, y = inputs["grad_0"].double(), inputs["y_0"].double()
    fused = (x * y + inputs["param_0"].double()).float()
    if not torch.equal(got["param_0"].nan_to_num(), fused.nan_to_num()):
        wrong[-1] = "fma"
    return wrong


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """What differs in one kernel of all exact operators that can be lowered."""
    rows = [row for row in EXACT if lowerable(row)]
    rows.append((torch.ops.prims.fma.default, ("x", "y", "p"), {}))
    found = differences(rows[:-1], 0.0)
    return {str(rows[i]): text for i, text in found.items()}


@pytest.mark.parametrize("row", EXACT, ids=str)
def test_an_exact_operator_gives_what_torch_gives(row: Row, wrong: dict[str, str]) -> None:
    assert lowerable(row)
    assert str(row) not in wrong, wrong[str(row)]


def test_fma_is_rounded_once(wrong: dict[str, str]) -> None:
    assert "fma" not in wrong.values()


def test_rounded_operators_are_within_two_roundings_of_torch() -> None:
    assert not differences(ROUNDED, 2.0**-22)


SCALARS: dict[str, Callable[[float], float]] = {
    "k + 1": lambda k: k + 1,
    "1 - 0.9 ** k": lambda k: 1 - 0.9**k,
    "(1 - 0.999 ** k) ** 0.5": lambda k: (1 - 0.999**k) ** 0.5,
    "lr / k": lambda k: 0.3 / k,
    "-lr * k": lambda k: -0.3 * k,
    "exp(log(k))": lambda k: math.exp(math.log(k)),
    "floor(k * lr)": lambda k: math.floor(k * 0.3),
    "k > 5 ? k : lr": lambda k: k if k > 5 else 0.3,
    "max(k, 5)": lambda k: max(k, 5.0),
}


def scalar_rows(s: Sketch, k: fx.Node, lr: fx.Node) -> list[fx.Node]:
    """The nodes of `SCALARS`, in the form in which functionalization leaves them."""
    call = s.call
    rest = [call(aten.sub.Tensor, 1, call(aten.pow.Scalar, beta, k)) for beta in (0.9, 0.999)]
    return [
        call(aten.add.Tensor, k, 1),
        rest[0],
        call(aten.pow.Tensor_Scalar, rest[1], 0.5),
        call(aten.div.Tensor, lr, k),
        call(aten.mul.Tensor, k, call(operator.neg, lr)),
        call(aten.exp.default, call(aten.log.default, k)),
        call(aten.floor.default, call(aten.mul.Tensor, k, lr)),
        call(aten.where.self, call(aten.gt.Scalar, k, 5), k, lr),
        call(aten.clamp.default, k, 5.0),
    ]


@pytest.mark.parametrize("k", [1.0, 2.0, 6.0, 1000.0])
def test_scalars_are_computed_in_float64_once_per_tensor(k: float) -> None:
    s = Sketch(shape=(5,))
    p, g, lr, counter = s.param(), s.grad(), s.scalar("lr", 0.3), s.counter("k")
    outputs = [s.counter(f"out{i}") for i in range(len(SCALARS))]
    writes = dict(zip(outputs, scalar_rows(s, counter, lr), strict=True))
    unit = s.functional(writes | {p: s.call(aten.sub.Tensor, p, g)})
    row = {o.name: torch.randn(o.shape) for o in unit.operands}
    row |= {"k_0": torch.tensor(k), "lr": torch.tensor(0.3, dtype=torch.float64)}
    after = run_compiled(unit, row)
    for i, (name, formula) in enumerate(SCALARS.items()):
        assert after[f"out{i}_0"].item() == float(np.float32(formula(k))), name


def test_a_packed_state_can_be_set_to_one_value() -> None:
    """``state.fill_(x)``: what is written is no value of elements."""
    values = {"softsign4": -0.75, "adaptive_log3": 0.75, "bfloat16": 1 / 3, "softsign8": 0.0}
    s = Sketch()
    p, g = s.param(), s.grad()
    writes = {p: s.call(aten.sub.Tensor, p, g)}
    for name, value in values.items():
        writes[s.state(name)] = s.call(aten.full_like.default, g, value)
    formats = {name: FORMATS[name] for name in values}
    rig = Rig(s.functional(writes), formats, "stochastic", sizes=(1, 300))
    expected = rig.expected(
        lambda p, g, _: (p - g, {k: torch.full_like(p, x) for k, x in values.items()}), 0
    )
    rig.run(compiled(rig.kernel), 0)
    assert not differing(rig.bits(), expected)


# The registry. --------------------------------------------------------------------------------


def test_a_second_lowering_is_an_error() -> None:
    before = dict(LOWERINGS)
    with pytest.raises(DuplicateLoweringError, match=r"aten\.mul\.Tensor has a lowering already"):
        lowers(aten.mul.Tensor)(lambda b, args, kwargs: args[0])
    assert before == LOWERINGS


def test_what_is_registered_is_lowerable() -> None:
    for target in LOWERINGS:
        node = fx.Graph().call_function(target, ())
        assert why_not(node) == ""


def test_what_is_not_registered_is_not() -> None:
    s = Sketch()
    for target in (aten.mm.default, aten.sum.default, torch.mul, operator.getitem):
        assert "pointwise" in why_not(s.call(target, s.param(), 0))
    assert "pointwise" in why_not(s.call("mul", s.param(), 2))


def test_a_mask_is_lowered() -> None:
    """Cautious optimizers: ``mask = (m * g > 0).to(g.dtype)``."""
    s = Sketch()
    p, g, m = s.param(), s.grad(), s.state("m")
    mask = s.call(aten.gt.Scalar, s.call(aten.mul.Tensor, m, g), 0)
    cast = s.call(aten._to_copy.default, mask, at="cautious.py:4 mask.to(grad.dtype)",
                  dtype=torch.float32)  # fmt: skip
    unit = s.functional({p: s.call(aten.sub.Tensor, p, s.call(aten.mul.Tensor, m, cast))})
    assert not why_unfused(unit, why_not)
    lower(only(partition(program(unit))))


# The operands. --------------------------------------------------------------------------------


def test_operands_have_the_kinds_that_their_roles_need() -> None:
    s = Sketch()
    lr, p, g, k = s.scalar("lr", 0.1), s.param(), s.grad(), s.counter()
    m, h, w = s.state("m"), s.state("h"), s.state("w")
    new = {x: s.call(aten.add.Tensor, x, g) for x in (m, h, w)}
    update = s.call(aten.mul.Tensor, new[m], lr)
    unit = s.functional(
        new | {p: s.call(aten.sub.Tensor, p, update), k: s.call(aten.add.Tensor, k, 1)}
    )
    formats = {"m": FORMATS["softsign5"], "h": FORMATS["bfloat16"]}
    kernel = lower(quantized(unit, formats, "stochastic"))
    kinds = {o.name: (o.kind, o.written, o.width) for o in kernel.operands}
    K = OperandKind
    assert kinds == {
        "lr": (K.NUMBER, False, 0),
        "param_0": (K.FLOATS, True, 0),
        "grad_0": (K.FLOATS, False, 0),
        "step_0": (K.SCALAR, True, 0),
        "m_0_codes": (K.CODES, True, 5),
        "m_0_scales": (K.WORDS, True, 0),
        "m_0_key": (K.KEY, False, 0),
        "h_0_codes": (K.HALVES, True, 16),
        "h_0_scales": (K.WORDS, True, 0),
        "h_0_key": (K.KEY, False, 0),
        "w_0": (K.FLOATS, True, 0),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [("softsign4", 12 + 1 + 4 / 128), ("softsign3", 12 + 6 / 8 + 4 / 128), ("float32", 12 + 8)],
)
def test_bytes_per_element(name: str, expected: float) -> None:
    """Parameter read and written, gradient read, codes and scale words read and written."""
    kernel = lower(quantized(sgd(), {"momentum_buffer": FORMATS[name]}, "nearest"))
    assert bytes_per_element(kernel) == pytest.approx(expected)


def test_dead_operations_are_dropped() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call(aten.exp.default, g)
    kernel = lower(s.functional({p: s.call(aten.sub.Tensor, p, g)}))
    assert [v.opcode for v in kernel.body] == ["load", "load", "sub", "store"]
