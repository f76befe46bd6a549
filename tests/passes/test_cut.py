"""A cut region computes what the whole one does, and its rest decodes no state in vain."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from graphs import Sketch, Values, assert_pure, aten, only, program, random_inputs, run
from stq_compile.codegen.lower import why_not
from stq_compile.passes import cut as cutting
from stq_compile.passes.cut import cut
from stq_compile.passes.feed import feed, without_feeds
from stq_compile.passes.in_place import reuse_memory
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import Program, Role, StepGraph, verify


@pytest.fixture(autouse=True)
def _small_parameters_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "WORTH_CUTTING", 0)


def cut_one(unit: StepGraph) -> StepGraph:
    found = cut(program(unit), why_not)
    verify(found, "cut")
    return only(found)


def as_region(unit: StepGraph) -> StepGraph:
    """The unit as `functionalize` leaves one that is no kernel: nodes know their values."""
    found = random_inputs(unit, positive=("v",))
    interpreter = _Noting(unit)
    interpreter.run(*(found[n.name] for n in unit.placeholders))
    return unit.replace(unfused="a reduction")


class _Noting(fx.Interpreter):
    def __init__(self, unit: StepGraph) -> None:
        super().__init__(nn.Module(), graph=unit.graph)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


class _Kernel(nn.Module):
    """A feeding kernel, run as a graph."""

    def __init__(self, unit: StepGraph, inputs: Values) -> None:
        super().__init__()
        self.unit, self.inputs = unit, inputs

    def forward(self, *names: str, **values: Any) -> Any:
        assert self.unit.writes == names
        known = self.inputs | values
        return self.unit.run(*(known.get(n.name) for n in self.unit.placeholders))


def run_cut(unit: StepGraph, inputs: Values) -> Values:
    """What the optimizer's tensors are after the rest, its feeds and the kernel."""
    unit = only(feed(program(unit)))
    assert unit.rest is not None
    kernels = {f"kernel_{i}": _Kernel(part, inputs) for i, part in enumerate(unit.feeds)}
    rest = fx.GraphModule(kernels, unit.rest.graph)
    results = rest(*(inputs.get(n.name) for n in unit.rest.placeholders))
    made = dict(zip(unit.rest.writes or (), results, strict=True))
    after = run(unit, inputs | made)
    return {name: (after | made)[name] for name in inputs}


def lamb() -> StepGraph:
    """A norm of the parameter, and one of an update by two states."""
    s = Sketch()
    p, g, m, v = s.param(), s.grad(), s.state("m"), s.state("v")
    new_m = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), g, alpha=0.1)
    new_v = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, v, 0.9), s.call(aten.mul.Tensor, g, g))
    update = s.call(aten.div.Tensor, new_m, s.call(aten.sqrt.default, new_v))
    norm, size = (s.call(aten.linalg_vector_norm.default, x) for x in (p, update))
    ratio = s.call(aten.div.Tensor, norm, size)
    step = s.call(aten.mul.Tensor, update, ratio)
    return as_region(s.functional({p: s.call(aten.sub.Tensor, p, step), m: new_m, v: new_v}))


def test_pass(stq_golden: Golden) -> None:
    stq_golden(str(assert_pure(lambda given: feed(cut(given, why_not)), program(lamb()))))


def test_what_is_written_is_what_the_whole_region_writes() -> None:
    unit = lamb()
    inputs = random_inputs(unit, positive=("v",))
    found, expected = run_cut(cut_one(unit), inputs), run(unit, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in inputs)
    assert not torch.equal(found["param_0"], inputs["param_0"])


def test_the_kernel_that_writes_feeds_nobody() -> None:
    unit = cut_one(lamb())
    writing = without_feeds(unit)
    assert set(writing.writes or ()) == {"param_0", "m_0", "v_0"}
    assert len(unit.writes or ()) == 4
    between = {o.name for o in writing.operands if o.role is Role.INTERMEDIATE}
    assert unit.rest is not None
    assert between == set(unit.rest.writes or ())


def test_small_parameters_and_those_without_states_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    size = s.call(aten.linalg_vector_norm.default, g)
    step = s.call(aten.div.Tensor, g, size)
    stateless = as_region(s.functional({p: s.call(aten.sub.Tensor, p, step)}))
    assert cut_one(stateless) is stateless
    monkeypatch.setattr(cutting, "WORTH_CUTTING", 16)  # the parameter has 15 elements
    unit = lamb()
    assert cut_one(unit) is unit


@dataclass(frozen=True)
class Region:
    """A unit that a failing example shows as printed."""

    unit: StepGraph

    def __repr__(self) -> str:
        return f"\n{self.unit}\n"


UNARY = [aten.neg.default, aten.abs.default, aten.sign.default, aten.tanh.default]
BINARY = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default]


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Up to 16 nodes: pointwise ones, some of which no kernel has, sums, means and products."""
    s = Sketch()
    p, g, m, v = s.param(), s.grad(), s.state("m"), s.state("v")
    nodes = [p, g, m, v]
    for _ in range(draw(st.integers(3, 16))):
        x, y = draw(st.sampled_from(nodes[-6:])), draw(st.sampled_from(nodes))
        kind = draw(st.sampled_from(["unary", "binary", "binary", "sum", "rows", "product"]))
        if kind == "unary":
            made = s.call(draw(st.sampled_from(UNARY)), x)
        elif kind == "binary":
            made = s.call(draw(st.sampled_from(BINARY)), x, y)
        elif kind == "sum":
            made = s.call(aten.mul.Tensor, s.call(aten.sum.default, x), 0.1)
        elif kind == "rows":
            made = s.call(aten.add.Tensor, g, x)  # a matrix, whatever x is
            made = s.call(aten.mean.dim, made, [1], True)
        else:
            wide = s.call(aten.add.Tensor, p, x)
            square = s.call(aten.mm.default, wide, s.call(aten.permute.default, wide, [1, 0]))
            made = s.call(aten.mul.Tensor, s.call(aten.mm.default, square, wide), 0.01)
        nodes.append(made)
    last = [s.call(aten.add.Tensor, draw(st.sampled_from(nodes)), x) for x in (m, v, p)]
    return Region(as_region(s.functional(dict(zip((m, v, p), last, strict=True)))))


many = settings(max_examples=100, deadline=None)


@many
@given(case=regions(), seed=st.integers(0, 1 << 16))
def test_on_random_regions(case: Region, seed: int) -> None:
    """Operator by operator, whole and cut: the same operators, so the same bits."""
    unit = cut_one(case.unit)
    inputs = random_inputs(case.unit, seed)
    expected = run(case.unit, inputs)
    assume(unit is not case.unit)  # as where all new states come of an operator that no kernel has
    found = run_cut(unit, inputs)
    for name in inputs:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert unit.rest is not None
    _computes_no_states(unit.rest)


def _computes_no_states(rest: StepGraph) -> None:
    """What a kernel can compute of states, kernels compute."""
    shape = (3, 5)
    stateful = {n for n in rest.calls if n.target is operator.getitem}  # what kernels made
    for node, operand in zip(rest.placeholders, rest.operands, strict=True):
        if operand.role is Role.STATE:
            stateful.add(node)
    for node in rest.calls:
        if node.op != "call_function" or node in stateful or why_not(node):
            continue
        inputs = set(node.all_input_nodes)
        shapes = {shape if a in stateful else tuple(a.meta["val"].shape) for a in inputs}
        if tuple(node.meta["val"].shape) == shape and shapes <= {(), shape}:
            assert not stateful & inputs, node


@many
@given(case=regions(), seed=st.integers(0, 1 << 16))
def test_memory_is_used_again_only_where_nobody_reads_it(case: Region, seed: int) -> None:
    inputs = random_inputs(case.unit, seed)
    expected = run(case.unit, inputs)
    graph = fx.Graph()
    graph.output(graph.graph_copy(case.unit.graph, {}))
    row = [inputs[n.name].clone() for n in case.unit.placeholders]
    reuse_memory(graph)
    results = fx.GraphModule({}, graph)(*row)
    for name, value in zip(case.unit.writes or (), results, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)
    for node, value in zip(case.unit.placeholders, row, strict=True):
        assert torch.equal(value, inputs[node.name])


def test_temporaries_are_updated_in_place() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    first = s.call(aten.mul.Tensor, p, 0.5)
    second = s.call(aten.add.Tensor, first, g)
    third = s.call(aten.sqrt.default, second)
    unit = as_region(s.functional({p: s.call(aten.sub.Tensor, third, second)}))
    reuse_memory(unit.graph)
    targets = [node.target for node in unit.calls]
    # The parameter is left alone, and what is read once more.
    assert targets == [aten.mul.Tensor, aten.add_.Tensor, aten.sqrt.default, aten.sub_.Tensor]


def test_a_program_of_kernels_stays() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    unit = s.functional({p: s.call(aten.sub.Tensor, p, g)})
    assert cut(Program("", (unit,)), why_not).units == (unit,)
    assert feed(Program("", (unit,))).units == (unit,)
