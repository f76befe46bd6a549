"""Where each node runs, and what has no kernel."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from graphs import Sketch, assert_pure, aten, only, program
from stq_compile.codegen.lower import why_not
from stq_compile.passes.functionalize import functionalize
from stq_compile.passes.partition import (
    element_nodes,
    partition,
    why_instance_unfused,
    why_unfused,
)
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import Instance, StepGraph
from zoo import adam, amsgrad


def with_scalars() -> StepGraph:
    """A counter, a bias correction from it, an ``lr`` that is an input, and elements."""
    s = Sketch()
    lr, step, p, g = s.scalar("lr", 0.1), s.counter(), s.param(), s.grad()
    new_step = s.call(aten.add.Tensor, step, 1)
    rate = s.call(operator.neg, lr)
    correction = s.call(aten.sub.Tensor, 1, s.call(aten.pow.Scalar, 0.9, new_step))
    update = s.call(aten.div.Tensor, s.call(aten.mul.Tensor, g, rate), correction)
    return s.functional({step: new_step, p: s.call(aten.add.Tensor, p, update)})


def test_pass(stq_golden: Golden) -> None:
    stq_golden(str(assert_pure(partition, program(with_scalars()))))


def test_the_graph_is_not_changed() -> None:
    before = with_scalars()
    after = only(partition(program(before)))
    assert after.graph is before.graph
    assert after.replace(regions={}) == before


def test_every_node_has_a_region() -> None:
    unit = only(partition(program(amsgrad())))
    assert set(unit.regions) == {n.name for n in unit.calls}
    scalars = {name for name, region in unit.regions.items() if region == "scalar"}
    by_name = {n.name: n for n in unit.calls}
    assert all(
        not any(a in element_nodes(unit) for a in by_name[n].all_input_nodes) for n in scalars
    )
    assert len(scalars) == 4  # step, beta^step, 1 - beta^step, its root


def test_a_zero_dim_parameter_makes_its_states_elements() -> None:
    s = Sketch(shape=())
    p, g, m, k = s.param(), s.grad(), s.state("m"), s.counter()
    new = s.call(aten.add.Tensor, m, g)
    later = s.call(aten.add.Tensor, k, 1)
    unit = s.functional({m: new, k: later, p: s.call(aten.sub.Tensor, p, new)})
    names = {n.name for n in element_nodes(unit)}
    assert {"m_0", "param_0", "grad_0", new.name} <= names
    assert not {"step_0", later.name} & names


def test_an_element_value_written_to_a_scalar_reaches_what_reads_it() -> None:
    """``k`` becomes an element, and with it the value that is computed from ``k`` alone."""
    s = Sketch(shape=())
    p, g, k = s.param(), s.grad(), s.counter("k")
    from_k = s.call(aten.mul.Tensor, k, 2.0)
    unit = s.functional({k: s.call(aten.add.Tensor, k, g), p: s.call(aten.sub.Tensor, p, from_k)})
    assert {"k_0", from_k.name} <= {n.name for n in element_nodes(unit)}


def functional(update: Any) -> StepGraph:
    """``param -= update(grad)``, as the functionalizing pass leaves it."""
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call("sub_", p, update(s, g))
    return only(functionalize(program(s.inplace()), why_not))


def test_a_matrix_product_makes_a_region_and_is_named_with_its_line() -> None:
    def update(s: Sketch, g: fx.Node) -> fx.Node:
        side = s.call("t", g, at="muon.py:31 x = g @ g.T")
        return s.call("matmul", s.call("matmul", g, side), g)

    unit = only(partition(program(functional(update))))
    for part in ("aten::permute", "pointwise", "muon.py:31 x = g @ g.T"):
        assert part in unit.unfused
    assert set(unit.regions.values()) == {"region"}


@pytest.mark.parametrize("name", ["mean", "sum", "t", "cumsum"])
def test_what_is_not_pointwise_makes_a_region(name: str) -> None:
    arguments = (0,) if name == "cumsum" else ()

    def update(s: Sketch, g: fx.Node) -> fx.Node:
        value = s.call(name, g, *arguments)
        return s.call("t", value) if name == "t" else value

    assert functional(update).unfused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_other_dtypes_make_a_region(dtype: torch.dtype) -> None:
    unit = functional(lambda s, g: s.call("to", g, dtype))
    assert str(dtype) in unit.unfused


def test_pointwise_graphs_are_kernels() -> None:
    assert not functional(lambda s, g: s.call("mul", g, 0.1)).unfused
    assert not why_unfused(adam(), why_not)


def test_the_reason_is_the_code_generators() -> None:
    assert "it is Tuesday" in why_unfused(adam(), lambda node: "it is Tuesday")


def test_regions_are_traced_for_each_shape() -> None:
    """``grad.mean()`` divides by the number of elements: a constant of each shape."""
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call("sub_", p, s.call("mean", g))
    unit = s.inplace()
    (row,) = unit.instances
    tall = tuple(replace(o, shape=(7, 2), stride=(2, 1)) for o in row.operands)
    both = unit.replace(instances=(row, Instance(tall)))
    parts = functionalize(program(both), why_not).units
    assert [len(part.instances) for part in parts] == [1, 1]
    for part, numel in zip(parts, (15, 14), strict=True):
        x = torch.arange(float(numel)).view(part.operands[0].shape)
        assert torch.equal(part.run(torch.zeros_like(x), x)[0], torch.zeros_like(x) - x.mean())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (3, 1), "stride": (1, 1)}, "shape"),
        ({"stride": (1, 3)}, "strides"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
    ],
)
def test_a_state_that_does_not_lie_like_its_parameter_makes_a_region(
    change: dict[str, Any], reason: str
) -> None:
    unit = adam()
    (row,) = unit.instances
    assert not why_instance_unfused(row)
    odd = (replace(o, **change) if o.source.key == "exp_avg" else o for o in row.operands)
    assert reason in why_instance_unfused(Instance(tuple(odd)))
