"""Which states are never negative, and which are fragile: against hand derivations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphs import Sketch, assert_pure, aten, only, program, random_inputs, run
from stq_compile.passes.ranges import find_ranges
from stq_compile.step_graph import Facts, StepGraph
from zoo import adagrad, adam, adamax, amsgrad, lion, rmsprop, sgd

add, sub, mul = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor


def two_steps_of_doubt() -> StepGraph:
    """``a`` takes ``b``, ``b`` takes the gradient: neither is provable, one round after another."""
    s = Sketch()
    p, g, a, b = s.param(), s.grad(), s.state("a"), s.state("b")
    return s.functional({a: s.call(add, a, b), b: s.call(add, b, g), p: s.call(sub, p, a)})


def clamped() -> StepGraph:
    """Non-negative only because of a clamp; and a state that only falls."""
    s = Sketch()
    p, g, a, b = s.param(), s.grad(), s.state("a"), s.state("b")
    new_a = s.call(aten.clamp.default, s.call(add, a, g), 0.0)
    new_b = s.call(sub, b, 1.0)
    return s.functional({a: new_a, b: new_b, p: s.call(sub, p, s.call(mul, new_a, new_b))})


def read_only() -> StepGraph:
    """A state that the step never writes: nothing is known about its start."""
    s = Sketch()
    p, g, a = s.param(), s.grad(), s.state("anchor")
    return s.functional({p: s.call(sub, p, s.call(mul, g, a))})


DERIVED: dict[str, tuple[Callable[[], StepGraph], set[str]]] = {
    "adam": (adam, {"exp_avg_sq"}),
    "adamw amsgrad": (amsgrad, {"exp_avg_sq", "max_exp_avg_sq", "step"}),
    "rmsprop": (lambda: rmsprop(centered=False), {"square_avg"}),
    "centered rmsprop": (lambda: rmsprop(centered=True), {"square_avg"}),
    "adagrad": (adagrad, {"sum"}),
    "adamax": (adamax, {"exp_inf"}),
    "sgd": (sgd, set()),
    "lion": (lion, set()),
    "two steps of doubt": (two_steps_of_doubt, set()),
    "clamped": (clamped, {"a"}),
    "read only": (read_only, set()),
}


@pytest.mark.parametrize("name", DERIVED)
def test_nonnegative_states(name: str) -> None:
    make, expected = DERIVED[name]
    unit = only(assert_pure(find_ranges, program(make())))
    assert unit.facts.nonnegative == expected


@pytest.mark.parametrize("name", DERIVED)
def test_the_graph_itself_is_not_changed(name: str) -> None:
    make, _ = DERIVED[name]
    before = make()
    after = only(find_ranges(program(before)))
    assert after.graph is before.graph
    assert after.replace(facts=before.facts) == before


@pytest.mark.parametrize("name", DERIVED)
def test_claims_hold_over_steps(name: str) -> None:
    make, nonnegative = DERIVED[name]
    unit = make()
    values = random_inputs(unit, positive=sorted(nonnegative))
    keys = {o.name: o.source.key for o in unit.operands}
    for seed in range(50):
        values["grad_0"] = random_inputs(unit, seed)["grad_0"]
        values = run(unit, values)
        for placeholder, key in keys.items():
            assert key not in nonnegative or bool((values[placeholder] >= 0).all())


@pytest.mark.parametrize("name", [n for n in DERIVED if n != "centered rmsprop"])
def test_only_roots_of_differences_are_fragile(name: str) -> None:
    make, _ = DERIVED[name]
    assert only(find_ranges(program(make()))).facts.fragile == {}


def test_a_centered_variance_makes_both_its_states_fragile() -> None:
    fragile = only(find_ranges(program(rmsprop(centered=True)))).facts.fragile
    assert set(fragile) == {"square_avg", "grad_avg"}
    reason = "sqrt of a difference at rmsprop.py:10 avg.sqrt()"
    assert set(fragile.values()) == {reason}


@pytest.mark.parametrize("target", [aten.log.default, aten.log2.default, aten.rsqrt.default])
def test_a_state_under_a_root_counts_as_non_negative(target: object) -> None:
    """If it were not, the step would give NaN."""
    s = Sketch()
    p, g, m = s.param(), s.grad(), s.state("m")
    new = s.call(add, m, g)
    unit = s.functional({m: new, p: s.call(sub, p, s.call(target, new))})
    facts = only(find_ranges(program(unit))).facts
    assert facts.nonnegative == {"m"}
    assert not facts.fragile


def test_a_root_of_less_than_a_state_is_fragile() -> None:
    s = Sketch()
    p, g, m = s.param(), s.grad(), s.state("m")
    new = s.call(add, m, s.call(aten.mul.Tensor, g, g))
    less = s.call(sub, new, s.call(aten.mul.Tensor, g, g))
    unit = s.functional({m: new, p: s.call(sub, p, s.call(aten.sqrt.default, less))})
    assert set(only(find_ranges(program(unit))).facts.fragile) == {"m"}


def test_a_root_of_the_bias_correction_leaves_the_step_counter_alone() -> None:
    """The counter is never quantized; it can't be fragile."""
    assert "step" not in only(find_ranges(program(amsgrad()))).facts.fragile


def decaying(value: float, *more: float) -> StepGraph:
    """``v' = constant v + grad²``; one instance per value."""
    s = Sketch()
    c, p, g, v = s.constant("constant_0", value), s.param(), s.grad(), s.state("v")
    new = s.call(add, s.call(mul, v, c), s.call(mul, g, g))
    unit = s.functional({v: new, p: s.call(sub, p, new)})
    (first,) = unit.instances
    others = []
    for x in more:
        constant = first.operands[0].__class__(**{**first.operands[0].__dict__, "value": x})
        others.append(first.__class__((constant, *first.operands[1:])))
    return unit.replace(instances=(first, *others))


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.9,), {"v"}), ((0.9, 0.5), {"v"}), ((0.0,), {"v"}), ((0.9, -0.1), set()), ((-1.0,), set())],
)
def test_hoisted_constants_count_for_every_instance(
    values: tuple[float, ...], expected: set[str]
) -> None:
    assert only(find_ranges(program(decaying(*values)))).facts.nonnegative == expected


def test_a_hyperparameter_that_is_an_input_may_be_anything() -> None:
    """``v' = beta v + grad²`` is provable only where beta is a number."""
    s = Sketch()
    beta, p, g, v = s.scalar("beta", 0.9), s.param(), s.grad(), s.state("v")
    new = s.call(add, s.call(mul, v, beta), s.call(mul, g, g))
    unit = s.functional({v: new, p: s.call(sub, p, new)})
    assert only(find_ranges(program(unit))).facts.nonnegative == frozenset()


def test_other_facts_are_kept() -> None:
    facts = Facts(normalizers={"exp_avg": "exp_avg_sq"}, fragile={"other": "because"})
    found = only(find_ranges(program(adam(facts)))).facts
    assert found == Facts(frozenset({"exp_avg_sq"}), facts.normalizers, facts.fragile)


def test_every_unit_is_analysed() -> None:
    facts = [u.facts.nonnegative for u in find_ranges(program(sgd(), adam(), adagrad())).units]
    assert facts == [frozenset(), {"exp_avg_sq"}, {"sum"}]


def test_nan_claims_nothing() -> None:
    """A literal NaN must not pass as non-negative."""
    s = Sketch()
    p, g, a = s.param(), s.grad(), s.state("a")
    unit = s.functional({a: s.call(mul, g, float("nan")), p: s.call(sub, p, g)})
    assert only(find_ranges(program(unit))).facts.nonnegative == frozenset()
    assert torch.isnan(run(unit, random_inputs(unit))["a_0"]).all()
