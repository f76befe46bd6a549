"""One unit per parameter, or per set of parameters whose updates read each other."""

from __future__ import annotations

import operator

import pytest
import torch

from graphs import Sketch, Values, assert_pure, assert_same, program, random_inputs, run
from stq_compile.errors import StqError
from stq_compile.passes.split import split
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import Program, StepGraph


def interleaved(params: int = 2) -> StepGraph:
    """Parameters in turns, a shared scalar computed in the middle, and a created state each."""
    s = Sketch()
    p, g = [s.param(i) for i in range(params)], [s.grad(i) for i in range(params)]
    m = [s.state("buf", i) for i in range(params)]
    lr = s.scalar("lr", 0.1)
    for i in range(params):
        s.call("mul_", m[i], 0.9)
    rate = s.call(operator.neg, s.call("item", lr, at="sgd.py:4 lr.item()"))
    squares = []
    for i in range(params):
        s.call("add_", m[i], g[i])
        squares.append(s.call("mul", g[i], g[i]))
        s.call("add_", p[i], s.call("mul", m[i], rate))
    return s.inplace(*reversed(squares))


def run_all(parts: Program, inputs: Values) -> Values:
    """All units of a split program, each on its own inputs."""
    after: Values = {}
    for unit in parts.units:
        own = {n.name: inputs[n.name] for n in unit.placeholders}
        results = run(unit, own)
        positions = unit.instances[0].returns
        for i, position in enumerate(positions):
            after[f"returned {position}"] = results.pop(f"created_{i}")
        after |= results
    return after


def test_pass(stq_golden: Golden) -> None:
    before = program(interleaved())
    after = assert_pure(split, before)
    stq_golden(str(after))
    inputs = random_inputs(interleaved())
    whole = run(interleaved(), inputs)
    named = {k.replace("created_", "returned "): v for k, v in whole.items()}
    assert_same(dict(sorted(named.items())), dict(sorted(run_all(after, inputs).items())))


def test_units_are_in_the_order_of_the_parameters() -> None:
    units = split(program(interleaved(12))).units
    assert [u.name for u in units] == [f"step_{i}" for i in range(12)]
    assert [u.instances[0].param.source.param for u in units] == list(range(12))


def test_a_unit_has_only_what_it_needs() -> None:
    first, second = split(program(interleaved())).units
    assert [n.name for n in first.placeholders] == ["param_0", "grad_0", "buf_0", "lr"]
    assert [n.name for n in second.placeholders] == ["param_1", "grad_1", "buf_1", "lr"]
    assert first.instances[0].returns == (1,)  # the outputs were in reverse
    assert second.instances[0].returns == (0,)


def test_coupled_parameters_stay_together() -> None:
    """The update of p0 and p2 reads a norm of both; p1 has nothing to do with them."""
    s = Sketch()
    a, b, c = s.param(0), s.param(1), s.param(2)
    g = [s.grad(i) for i in range(3)]
    total = s.call(torch.add, s.call("norm", g[0]), s.call("norm", g[2]))
    for p, grad in zip((a, b, c), g, strict=True):
        s.call("add_", p, grad if p is b else s.call("mul", grad, total))
    both, alone = split(program(s.inplace())).units
    assert [n.name for n in both.placeholders] == ["param_0", "param_2", "grad_0", "grad_2"]
    assert [n.name for n in alone.placeholders] == ["param_1", "grad_1"]


def test_coupling_through_a_foreign_state_is_seen() -> None:
    s = Sketch()
    p, q = s.param(0), s.param(1)
    s.call("add_", p, s.grad(0))
    s.call("add_", q, s.state("exp_avg", 0))
    (unit,) = split(program(s.inplace())).units
    assert len(unit.placeholders) == 4


@pytest.mark.parametrize("from_grad", [False, True])
def test_a_tensor_made_from_nothing_and_written_belongs_to_who_uses_it(from_grad: bool) -> None:
    s = Sketch()
    p = s.param()
    zeros = s.call(torch.zeros, 3, 5)
    s.call("add_", zeros, s.grad() if from_grad else 1.0)
    s.call("add_", p, zeros)
    (unit,) = split(program(s.inplace(zeros))).units
    assert len(unit.calls) == 3
    assert unit.instances[0].returns == (0,)


def test_an_update_of_a_shared_scalar_is_not_lost() -> None:
    """No component owns ``k += 1``, so it cannot be part of a kernel."""
    s = Sketch()
    p, g, k = s.param(), s.grad(), s.scalar("k", 1.0)
    s.call("add_", p, g)
    s.call("add_", k, 1, at="odd.py:5 group['k'] += 1")
    with pytest.raises(StqError, match=r"odd\.py:5"):
        split(program(s.inplace()))


def test_a_state_that_changes_without_its_parameter_is_kept() -> None:
    """Gradient accumulation: a step that only adds to a buffer."""
    s = Sketch()
    g, m = s.grad(), s.state("accumulated")
    s.call("add_", m, g)
    (unit,) = split(program(s.inplace())).units
    assert [n.name for n in unit.calls] == ["add_"]
