"""Where each node runs, and what has no kernel."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from graphs import Sketch, assert_pure, aten, only, program
from stq_compile.codegen.lower import why_not
from stq_compile.errors import UnsupportedOperatorError
from stq_compile.passes.partition import element_nodes, partition
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import StepGraph
from zoo import adam, amsgrad


def supports_all(node: fx.Node) -> str:
    return ""


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
    stq_golden(str(assert_pure(lambda x: partition(x, supports_all), program(with_scalars()))))


def test_the_graph_is_not_changed() -> None:
    before = with_scalars()
    after = only(partition(program(before), supports_all))
    assert after.graph is before.graph
    assert after.replace(regions={}) == before


def test_every_node_has_a_region() -> None:
    unit = only(partition(program(amsgrad()), supports_all))
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


def test_an_unsupported_operator_is_named_with_optimizer_line_and_parameter() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    update = s.call(aten.mm.default, g, g, at="muon.py:31 x = g @ g")
    unit = s.functional({p: s.call(aten.sub.Tensor, p, update)})
    with pytest.raises(UnsupportedOperatorError) as error:
        partition(program(adam(), unit), why_not)
    for part in ("Sketched", "p0", "aten::mm", "muon.py:31 x = g @ g", "pointwise"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "target", [aten.mean.default, aten.sum.default, aten.cumsum.default, torch.ops.aten.t.default]
)
def test_what_is_not_pointwise_is_refused(target: torch._ops.OpOverload) -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    unit = s.functional({p: s.call(aten.sub.Tensor, p, s.call(target, g))})
    with pytest.raises(UnsupportedOperatorError, match=target._schema.name):
        partition(program(unit), why_not)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.bfloat16])
def test_values_of_other_dtypes_are_refused_with_the_dtype(dtype: torch.dtype) -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    cast = s.call(aten._to_copy.default, g, dtype=dtype, at="odd.py:2 g.to(dtype)")
    cast.meta["val"] = torch.empty(3, 5, dtype=dtype, device="meta")
    unit = s.functional({p: s.call(aten.sub.Tensor, p, s.call(aten.mul.Tensor, cast, 2))})
    with pytest.raises(UnsupportedOperatorError, match=rf"{dtype}[\s\S]*odd.py:2"):
        partition(program(unit), why_not)


def test_the_reason_is_the_code_generators() -> None:
    with pytest.raises(UnsupportedOperatorError, match="it is Tuesday"):
        partition(program(adam()), lambda node: "it is Tuesday")
