"""Foreach calls become one call per tensor."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from graphs import Sketch, assert_pure, assert_same, only, program, random_inputs, run
from stq_compile.passes.expand_foreach import expand_foreach
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import StepGraph, location_of


def adam_like() -> StepGraph:
    """Two parameters; lists in place, lists of results, items of lists, a norm that is dropped."""
    s = Sketch()
    p, g, m, v = ([make(i) for i in range(2)] for make in (s.param, s.grad, _m(s), _v(s)))
    s.call(torch._foreach_lerp_, m, g, 0.1, at="adam.py:5 torch._foreach_lerp_(m, g, 0.1)")
    s.call(torch._foreach_mul_, v, 0.99)
    s.call(torch._foreach_addcmul_, v, g, g, 0.01)
    root = s.call(torch._foreach_sqrt, v)
    s.call(torch._foreach_add_, root, 1e-8)
    halves = s.call(torch._foreach_mul, m, [0.5, 2.0])
    s.call("add_", p[0], s.call(operator.getitem, halves, 0))
    s.call(torch._foreach_addcdiv_, p, m, root, [-0.1, -0.2])
    return s.inplace()


def _m(s: Sketch) -> Any:
    return lambda i: s.state("exp_avg", i)


def _v(s: Sketch) -> Any:
    return lambda i: s.state("exp_avg_sq", i)


def test_pass(stq_golden: Golden) -> None:
    before = program(adam_like())
    after = assert_pure(expand_foreach, before)
    stq_golden(str(after))
    inputs = random_inputs(adam_like(), positive=["exp_avg_sq"])
    assert_same(run(only(before), inputs), run(only(after), inputs), tolerance=1e-6)


def test_every_new_node_keeps_the_line_of_its_foreach_call() -> None:
    s = Sketch()
    p = [s.param(0), s.param(1)]
    # A function without a method of that name makes two nodes per tensor.
    s.call(torch._foreach_reciprocal_, p, at="a.py:3 torch._foreach_reciprocal_(p)")
    s.call(torch._foreach_pow, 2.0, p, at="a.py:4 torch._foreach_pow(2.0, p)")
    unit = only(expand_foreach(program(s.inplace())))
    first, second = "a.py:3 torch._foreach_reciprocal_(p)", "a.py:4 torch._foreach_pow(2.0, p)"
    assert {location_of(n) for n in unit.calls} == {first, second}


CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "add alpha": (torch._foreach_add_, ("p", "g"), {"alpha": 0.3}),
    "add scalar": (torch._foreach_add, ("p", 2.5), {}),
    "add scalars": (torch._foreach_add_, ("p", [2.5, 3.5]), {}),
    "sub": (torch._foreach_sub_, ("p", "g"), {"alpha": 2}),
    "mul tensor": (torch._foreach_mul_, ("p", "lr"), {}),
    "mul lists": (torch._foreach_mul_, ("p", "g"), {}),
    "div": (torch._foreach_div_, ("p", [2.0, 4.0]), {}),
    "neg": (torch._foreach_neg_, ("p",), {}),
    "abs": (torch._foreach_abs, ("p",), {}),
    "sign": (torch._foreach_sign, ("p",), {}),
    "zero": (torch._foreach_zero_, ("p",), {}),
    "copy": (torch._foreach_copy_, ("p", "g"), {}),
    "lerp lists": (torch._foreach_lerp_, ("p", "g", "v"), {}),
    "maximum": (torch._foreach_maximum_, ("p", "g"), {}),
    "maximum scalar": (torch._foreach_maximum_, ("p", 0.25), {}),
    "minimum scalars": (torch._foreach_minimum, ("p", [0.25, -0.25]), {}),
    "clamp": (torch._foreach_clamp_min_, ("p", 0.25), {}),
    "addcmul scalars": (torch._foreach_addcmul_, ("p", "g", "v", [0.5, 2.0]), {}),
    "addcmul value": (torch._foreach_addcmul, ("p", "g", "v"), {"value": 0.5}),
    "addcdiv scalars": (torch._foreach_addcdiv, ("p", "g", "v", [0.5, 2.0]), {}),
    "pow": (torch._foreach_pow, ("v", 0.75), {}),
    "pow of a number": (torch._foreach_pow, (0.9, "v"), {}),
    "exp": (torch._foreach_exp, ("p",), {}),
    "reciprocal": (torch._foreach_reciprocal_, ("v",), {}),
    "norm": (torch._foreach_norm, ("p",), {}),
    "norm of order": (torch._foreach_norm, ("p", 1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_operator(name: str) -> None:
    """Each call does to two tensors, and returns, what the foreach call does."""
    target, args, kwargs = CALLS[name]
    s = Sketch()
    named: dict[str, Any] = {
        "p": [s.param(0), s.param(1)],
        "g": [s.grad(0), s.grad(1)],
        "v": [s.state("v", 0), s.state("v", 1)],
        "lr": s.scalar("lr", 0.25),
    }
    result = s.call(target, *(named.get(a, a) if isinstance(a, str) else a for a in args), **kwargs)
    outputs: list[fx.Node] = []
    if not target.__name__.endswith("_"):
        outputs = [s.call(operator.getitem, result, i) for i in range(2)]
    before = program(s.inplace(*outputs))
    after = assert_pure(expand_foreach, before)
    assert not any("_foreach_" in str(n.target) for n in only(after).calls)
    inputs = random_inputs(only(before), positive=["v"])
    assert_same(run(only(before), inputs), run(only(after), inputs), tolerance=1e-6)


def test_a_step_without_foreach_is_copied() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    s.call("add_", p, g, alpha=-0.1, at="sgd.py:1 p.add_(g, alpha=-lr)")
    before = program(s.inplace(s.call("mul", p, 2)))
    assert str(expand_foreach(before)) == str(before)
