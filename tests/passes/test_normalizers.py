"""Which state divides which in the update, found from the graph alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphs import Sketch, assert_pure, aten, only, program
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.step_graph import Facts, StepGraph
from zoo import (
    EPS,
    adagrad,
    adam,
    adamax,
    amsgrad,
    averages,
    descend,
    div,
    lion,
    rmsprop,
    sgd,
    sqrt,
)

Update = Callable[[Sketch, fx.Node, fx.Node], fx.Node]
"""The update from the new m and the new v."""


def adam_with(update: Update, eps: float = EPS) -> StepGraph:
    s = Sketch()
    p, g, m, v = s.param(), s.grad(), s.state("m"), s.state("v")
    new_m, new_v = averages(s, g, m, v)
    return s.functional({m: new_m, v: new_v, p: descend(s, p, update(s, new_m, new_v))})


def by_root(s: Sketch, m: fx.Node, v: fx.Node) -> fx.Node:
    return s.call(div, m, s.call(aten.add.Tensor, s.call(sqrt, v), EPS))


def by_value(s: Sketch, m: fx.Node, v: fx.Node) -> fx.Node:
    return s.call(div, m, s.call(aten.add.Tensor, v, EPS))


def by_rsqrt(s: Sketch, m: fx.Node, v: fx.Node) -> fx.Node:
    return s.call(aten.mul.Tensor, m, s.call(aten.rsqrt.default, s.call(aten.add.Tensor, v, EPS)))


def by_power(exponent: float) -> Update:
    return lambda s, m, v: s.call(aten.mul.Tensor, m, s.call(aten.pow.Tensor_Scalar, v, exponent))


def with_fma(s: Sketch, m: fx.Node, v: fx.Node) -> fx.Node:
    """Inductor's fused multiply-add, which has no derivative of its own."""
    return s.call(torch.ops.prims.fma.default, by_root(s, m, v), 2.0, m)


def by_large_eps(s: Sketch, m: fx.Node, v: fx.Node) -> fx.Node:
    return s.call(div, m, s.call(aten.add.Tensor, s.call(sqrt, v), 10.0))


def beside(s: Sketch, m: fx.Node, v: fx.Node) -> fx.Node:
    """Only half of the update is normalized."""
    return s.call(aten.add.Tensor, by_root(s, m, v), m)


def radam() -> StepGraph:
    """Rectified: plain momentum in the first steps, divided by the root later."""
    s = Sketch()
    p, g, m, v = s.param(), s.grad(), s.state("exp_avg"), s.state("exp_avg_sq")
    step = s.counter()
    new_step = s.call(aten.add.Tensor, step, 1)
    new_m, new_v = averages(s, g, m, v)
    late = s.call(aten.gt.Scalar, new_step, 5.0)
    update = s.call(aten.where.self, late, by_root(s, new_m, new_v), new_m)
    return s.functional({step: new_step, m: new_m, v: new_v, p: descend(s, p, update)})


def with_lr_input(value: float = 0.01) -> StepGraph:
    """The learning rate is a symbolic float, as after functionalization."""
    s = Sketch()
    lr, p, g = s.scalar("lr", value), s.param(), s.grad()
    m, v = s.state("m"), s.state("v")
    new_m, new_v = averages(s, g, m, v)
    update = s.call(aten.mul.Tensor, by_root(s, new_m, new_v), lr)
    return s.functional({m: new_m, v: new_v, p: s.call(aten.sub.Tensor, p, update)})


def two_momenta() -> StepGraph:
    """AdEMAMix: a fast and a slow average, both divided by the same root."""
    s = Sketch()
    p, g, m, slow, v = (s.param(), s.grad(), s.state("m"), s.state("slow"), s.state("v"))
    new_m, new_v = averages(s, g, m, v)
    new_slow, _ = averages(s, g, slow, v)
    total = s.call(aten.add.Tensor, new_m, new_slow)
    update = by_root(s, total, new_v)
    return s.functional({m: new_m, slow: new_slow, v: new_v, p: descend(s, p, update)})


FOUND: dict[str, tuple[Callable[[], StepGraph], dict[str, str]]] = {
    "adam": (adam, {"exp_avg": "exp_avg_sq"}),
    # Neither state's root divides the update alone: that of the larger one does.
    "amsgrad": (amsgrad, {}),
    "radam": (radam, {"exp_avg": "exp_avg_sq"}),
    "adam with lr as an input": (with_lr_input, {"m": "v"}),
    "adam with an lr that is zero just now": (lambda: with_lr_input(0.0), {"m": "v"}),
    "two momenta": (two_momenta, {"m": "v", "slow": "v"}),
    "rsqrt": (lambda: adam_with(by_rsqrt), {"m": "v"}),
    "power -1/2": (lambda: adam_with(by_power(-0.5)), {"m": "v"}),
    "sgd": (sgd, {}),
    "lion": (lion, {}),
    "adagrad": (adagrad, {}),
    "adamax": (adamax, {}),
    "rmsprop": (lambda: rmsprop(centered=False), {}),
    "divided by v": (lambda: adam_with(by_value), {}),
    "power -1/4": (lambda: adam_with(by_power(-0.25)), {}),
    "multiplied by the root": (lambda: adam_with(by_power(0.5)), {}),
    "an epsilon larger than the root": (lambda: adam_with(by_large_eps), {}),
    "half normalized": (lambda: adam_with(beside), {}),
    "half normalized, fused": (lambda: adam_with(with_fma), {}),
}


@pytest.mark.parametrize("name", FOUND)
def test_normalizers(name: str) -> None:
    make, expected = FOUND[name]
    ranged = find_ranges(program(make()))
    after = only(assert_pure(find_normalizers, ranged))
    before = only(ranged)
    assert dict(after.facts.normalizers) == expected
    assert after.facts.nonnegative == before.facts.nonnegative
    assert after.facts.fragile == before.facts.fragile
    assert after.graph is before.graph


def test_a_state_that_may_be_negative_is_no_normalizer() -> None:
    """Without the proof that v is non-negative its root is no unit."""
    assert only(find_normalizers(program(adam(Facts())))).facts.normalizers == {}


def test_a_parameter_that_is_not_written_has_no_normalizers() -> None:
    s = Sketch()
    s.param()
    g, m, v = s.grad(), s.state("m"), s.state("v")
    new_m, new_v = averages(s, g, m, v)
    unit = s.functional({m: new_m, v: new_v}, Facts(frozenset({"v"})))
    assert only(find_normalizers(program(unit))).facts.normalizers == {}


def test_the_result_is_the_same_every_time() -> None:
    ranged = find_ranges(program(amsgrad()))
    state = torch.random.get_rng_state()
    first = only(find_normalizers(ranged)).facts
    assert torch.equal(torch.random.get_rng_state(), state)  # the user's randomness is untouched
    assert only(find_normalizers(ranged)).facts == first
