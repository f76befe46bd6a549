"""In-place steps become functions over core ATen operators."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch

from graphs import Sketch, assert_pure, assert_same, only, program, random_inputs, run
from stq_compile.errors import UnsupportedOperatorError
from stq_compile.passes.functionalize import functionalize
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import Instance, Role, StepGraph, location_of
from zoo import adam


def momentum() -> StepGraph:
    """SGD with an ``lr`` that is an input."""
    s = Sketch()
    p, g, m, lr = s.param(), s.grad(), s.state("momentum_buffer"), s.scalar("lr", 0.25)
    s.call("mul_", m, 0.9, at="sgd.py:4 buf.mul_(momentum)")
    s.call("add_", m, g, at="sgd.py:5 buf.add_(grad)")
    rate = s.call(operator.neg, s.call("item", lr))
    s.call("add_", p, s.call("mul", m, rate, at="sgd.py:6 param.add_(buf, alpha=-lr)"))
    return s.inplace()


def torch_adam() -> StepGraph:
    """torch's own calls: a step counter, lerp, addcmul, bias corrections, addcdiv."""
    s = Sketch()
    p, g = s.param(), s.grad()
    m, v, step = s.state("exp_avg"), s.state("exp_avg_sq"), s.counter()
    s.call("add_", step, 1)
    s.call("lerp_", m, g, 0.1)
    s.call("addcmul_", s.call("mul_", v, 0.99), g, g, value=0.01)
    correction = s.call(operator.sub, 1, s.call(operator.pow, 0.99, step))
    root = s.call("add_", s.call(torch.sqrt, s.call(operator.truediv, v, correction)), 1e-8)
    s.call("addcdiv_", p, m, root, value=-0.1)
    return s.inplace()


def creating() -> StepGraph:
    """The first step of an optimizer that makes its state inside ``step``."""
    s = Sketch()
    p, g = s.param(), s.grad()
    buffer = s.call(torch.clone, g)
    s.call("add_", p, buffer, alpha=-0.5)
    return s.inplace(buffer, s.call(torch.zeros, ()))


def through_a_view() -> StepGraph:
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call("mul_", s.call("view", p, -1), 0.5)
    s.call("add_", s.call("detach", p), g)
    return s.inplace()


def copies() -> StepGraph:
    """A state that takes the gradient as it is, and one that is overwritten twice."""
    s = Sketch()
    p, g, old, m = s.param(), s.grad(), s.state("prev_grad"), s.state("buf")
    s.call("add_", p, s.call("sub", g, old))
    s.call("copy_", old, g)
    s.call("zero_", m)
    s.call("add_", m, g)
    return s.inplace()


def heavy_lerp() -> StepGraph:
    """The other formula of ``lerp``, for weights of a half and more."""
    s = Sketch()
    p, g, m, w = s.param(), s.grad(), s.state("z"), s.scalar("weight", 0.75)
    s.call("lerp_", m, g, s.call(operator.sub, 1, s.call("item", w)))
    s.call("lerp_", p, m, s.call("item", w))
    return s.inplace()


STEPS: list[Callable[[], StepGraph]] = [
    momentum, torch_adam, creating, through_a_view, copies, heavy_lerp,
]  # fmt: skip


@pytest.mark.parametrize("make", STEPS)
def test_results_stay_the_same(make: Callable[[], StepGraph]) -> None:
    before = program(make())
    after = only(assert_pure(functionalize, before))
    inputs = random_inputs(make(), positive=["exp_avg_sq"])
    assert_same(run(make(), inputs), run(after, inputs), tolerance=1e-6)


@pytest.mark.parametrize("make", STEPS)
def test_what_remains_is_functional_core_aten(make: Callable[[], StepGraph]) -> None:
    unit = only(functionalize(program(make())))
    numbers = {operator.sub, operator.neg}
    for node in unit.calls:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert node.target.namespace in ("aten", "prims")
            assert node.target is not torch.ops.aten.lerp.Scalar
        else:
            assert node.target in numbers, node.target


def test_pass(stq_golden: Golden) -> None:
    stq_golden(str(functionalize(program(momentum()))))


def test_adam(stq_golden: Golden) -> None:
    stq_golden(str(functionalize(program(torch_adam()))))


def test_a_functional_unit_is_left_alone() -> None:
    unit = adam()
    assert only(functionalize(program(unit))) is unit


def test_lines_of_the_optimizer_survive() -> None:
    unit = only(functionalize(program(momentum())))
    assert {location_of(n) for n in unit.calls} >= {
        "sgd.py:4 buf.mul_(momentum)",
        "sgd.py:5 buf.add_(grad)",
        "sgd.py:6 param.add_(buf, alpha=-lr)",
    }


def test_placeholders_keep_names_and_examples() -> None:
    before, after = torch_adam(), only(functionalize(program(torch_adam())))
    assert [n.name for n in after.placeholders] == [n.name for n in before.placeholders]
    for old, new in zip(before.placeholders, after.placeholders, strict=True):
        assert new.meta["example"].shape == old.meta["example"].shape


def test_a_hyperparameter_that_is_an_input_is_not_frozen() -> None:
    """The graph was traced at lr 0.25 and is run at another."""
    unit = only(functionalize(program(momentum())))
    inputs = random_inputs(unit)
    inputs["lr"].fill_(0.0625)
    assert_same(run(momentum(), inputs), run(unit, inputs), tolerance=1e-6)


@pytest.mark.parametrize(
    ("method", "traced", "used"),
    [
        ("addcmul_", 1.0, 0.5),
        ("addcdiv_", 1.0, 0.5),
        ("addcmul_", 0.5, 1.0),
        ("lerp_", 0.25, 0.75),
        ("lerp_", 1.0, 0.0),
        ("add_", 1.0, 0.5),
        ("pow_", 2.0, 3.0),
        ("mul_", 0.0, 2.0),
        ("clamp_min_", 0.0, 0.5),
    ],
)
def test_no_branch_is_taken_for_the_traced_value(method: str, traced: float, used: float) -> None:
    """A hyperparameter may have a special value (1, 0) while the step is traced, and then not."""

    def step() -> StepGraph:
        s = Sketch()
        p, g, v, x = s.param(), s.grad(), s.state("v"), s.scalar("x", traced)
        value = s.call("item", x)
        if method.startswith("addc"):
            s.call(method, p, g, v, value=value)
        elif method == "lerp_":
            s.call(method, p, g, value)
        elif method == "add_":
            s.call(method, p, g, alpha=value)
        else:
            s.call(method, v, value)
            s.call("add_", p, v)
        return s.inplace()

    unit = only(functionalize(program(step())))
    inputs = random_inputs(unit, positive=["v"])
    inputs["x"].fill_(used)
    assert_same(run(step(), inputs), run(unit, inputs), tolerance=1e-6)


def test_created_states_become_write_only_inputs() -> None:
    unit = only(functionalize(program(creating())))
    made = [o for o in unit.operands if o.returned >= 0]
    assert [(o.name, o.returned, o.shape) for o in made] == [
        ("created_0", 0, (3, 5)),
        ("created_1", 1, ()),
    ]
    assert all(o.role is Role.STATE and o.source.name == "p0" for o in made)
    assert set(unit.writes or ()) == {"param_0", "created_0", "created_1"}


def test_created_states_follow_each_instance() -> None:
    """Every instance's created state has its own parameter's shape, stride and position."""
    before = creating()
    (first,) = before.instances
    operands = tuple(
        o.__class__(**{**o.__dict__, "shape": (7,), "stride": (1,)}) for o in first.operands
    )
    before = before.replace(instances=(first, Instance(operands, (5, 4))))
    unit = only(functionalize(program(before)))
    made = [o for o in unit.instances[1].operands if o.returned >= 0]
    assert [(o.returned, o.shape, o.stride) for o in made] == [(5, (7,), (1,)), (4, (), ())]


def test_dead_arithmetic_is_gone() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call("exp", g)
    s.call("add_", p, g)
    (node,) = only(functionalize(program(s.inplace()))).calls
    assert node.target is torch.ops.aten.add.Tensor


def test_out_arguments_are_written() -> None:
    """``torch.mul(g, g, out=b)`` on a buffer that begins undefined (Muon's products)."""
    s = Sketch()
    p, g = s.param(), s.grad()
    buffer = s.call(torch.empty_like, g)
    s.call(torch.mul, g, g, out=buffer)
    s.call("sub_", p, buffer)
    before = s.inplace()
    after = only(functionalize(program(before)))
    inputs = random_inputs(before)
    assert_same(run(before, inputs), run(after, inputs))


def test_undefined_values_are_not_compiled() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call("sub_", p, s.call("mul", g, s.call(torch.empty_like, g)))
    with pytest.raises(UnsupportedOperatorError, match="undefined"):
        functionalize(program(s.inplace()))
