"""Decisions against an exhaustive search, and what the rules promise."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stq_compile.errors import InfeasibleBudgetError
from stq_compile.planner.decision import (
    LADDER,
    RULES,
    Decision,
    Rules,
    StateCosts,
    decide_budget,
    decide_tolerance,
    exhaustive,
)

many = settings(max_examples=150, deadline=None, derandomize=True)
FREE = Rules(hysteresis=0, dwell=0, rungs=len(LADDER))
FINITE = st.integers(0, 10**6).map(lambda k: k / 1000)
ERRORS = st.integers(0, 60).map(float) | st.floats(0, 1e3) | st.sampled_from([0.0, math.inf])


def nbytes(numel: int, width: int) -> int:
    return -(-numel // 128) * (16 * width + 2) if width < 16 else numel * width // 8


@st.composite
def any_states(draw: st.DrawFn, errors: st.SearchStrategy[float] = ERRORS) -> list[StateCosts]:
    """Up to five states with anything for bytes and errors, some with a width in force."""
    states = []
    for number in range(draw(st.integers(1, 5))):
        widths = tuple(sorted(draw(st.sets(st.sampled_from(LADDER), min_size=1, max_size=4))))
        listed = st.lists(errors, min_size=len(widths), max_size=len(widths))
        sizes = st.lists(st.integers(0, 40), min_size=len(widths), max_size=len(widths))
        states.append(
            StateCosts(
                key=(number, "s"),
                widths=widths,
                nbytes=tuple(draw(sizes)),
                error=tuple(draw(listed)),
                current=draw(st.none() | st.sampled_from(LADDER)),
                waited=draw(st.integers(0, 2)),
                alarm=draw(st.booleans()),
            )
        )
    return states


@st.composite
def equal_steps(draw: st.DrawFn) -> list[StateCosts]:
    """States that all pay 8 bytes for a rung, with convex errors: marginal analysis is exact."""
    states = []
    for number in range(draw(st.integers(1, 5))):
        drops = draw(st.lists(st.integers(0, 30), min_size=3, max_size=3))
        drops.sort(reverse=True)
        rest = draw(st.integers(0, 9))
        error = [float(rest + sum(drops[k:])) for k in range(4)]
        states.append(StateCosts((number, "s"), (2, 3, 4, 5), (8, 16, 24, 32), tuple(error)))
    return states


def fresh(states: Sequence[StateCosts]) -> list[StateCosts]:
    return [replace(s, current=None, waited=9, alarm=False) for s in states]


def smallest(states: Sequence[StateCosts]) -> int:
    return sum(min(s.nbytes) for s in states)


def network(count: int, seed: int = 0) -> list[StateCosts]:
    """Tensors of many sizes; one state falls about as 4^-b, one as 2^-b."""
    rng = np.random.default_rng(seed)
    states = []
    for number in range(count):
        numel, scale = int(2 ** rng.uniform(12, 20)), 10 ** rng.uniform(-4, 0)
        base = 4.0 if number % 2 else 2.0
        error = tuple(float(scale * base**-w * rng.uniform(0.8, 1.2)) for w in LADDER)
        size = tuple(nbytes(numel, w) for w in LADDER)
        states.append(StateCosts((number // 2, "mv"[number % 2]), LADDER, size, error))
    return states


def at(states: Sequence[StateCosts], decision: Decision, waited: int = 9) -> list[StateCosts]:
    """The same states with the widths of the decision in force."""
    pairs = zip(states, decision.choices, strict=True)
    return [replace(s, current=c.width, waited=waited) for s, c in pairs]


def widths(decision: Decision) -> list[int]:
    return [c.width for c in decision.choices]


def one(error: Sequence[float], **fields: object) -> StateCosts:
    """One state whose bytes are its widths."""
    ladder = LADDER[: len(error)]
    state = StateCosts((0, "s"), ladder, ladder, tuple(error))
    return replace(state, **fields)  # type: ignore[arg-type]


# Against the exhaustive search.


@many
@given(any_states(), st.integers(0, 150))
def test_the_budget_is_never_exceeded(states: list[StateCosts], budget: int) -> None:
    if smallest(states) > budget:
        with pytest.raises(InfeasibleBudgetError, match=f"take {smallest(states)} bytes"):
            decide_budget(states, budget)
        return
    decision = decide_budget(states, budget)
    assert decision.nbytes <= budget
    for state, choice in zip(states, decision.choices, strict=True):
        place = state.widths.index(choice.width)
        found = (choice.key, choice.error, choice.nbytes)
        assert found == (state.key, state.error[place], state.nbytes[place])
        assert (choice.width, choice.error, choice.nbytes) in choice.alternatives
        assert choice.moved == (state.current not in (None, choice.width))
    assert decision.nbytes == sum(c.nbytes for c in decision.choices)
    assert decision.error == math.fsum(c.error for c in decision.choices)


@many
@given(any_states(FINITE), st.integers(0, 150))
def test_the_gap_is_below_a_step(states: list[StateCosts], budget: int) -> None:
    states = fresh(states)
    budget = max(budget, smallest(states))
    decision, best = decide_budget(states, budget), exhaustive(states, budget)
    assert best.error <= decision.error * (1 + 1e-12)
    step = max(max(s.error) - min(s.error) for s in states)
    assert decision.error <= best.error + step + 1e-9
    # The dual bound: no choice within the budget beats this, and the gap is one step of a hull.
    at_price = sum(
        min(e + decision.price * b for e, b in zip(s.error, s.nbytes, strict=True)) for s in states
    )
    assert at_price - decision.price * budget <= best.error + 1e-6


@many
@given(any_states(FINITE), st.integers(0, 150))
def test_the_price_is_optimal_for_the_bytes_that_it_uses(
    states: list[StateCosts], budget: int
) -> None:
    states = fresh(states)
    budget = max(budget, smallest(states))
    price = decide_budget(states, budget).price * (1 + 1e-9)  # of equal ones the fewest bytes
    at_price = [
        min(zip(s.error, s.nbytes, strict=True), key=lambda c: c[0] + price * c[1]) for s in states
    ]
    used = sum(b for _, b in at_price)
    assert price == 0 or used <= budget
    best = exhaustive(states, used)
    assert sum(e for e, _ in at_price) == pytest.approx(best.error, rel=1e-9, abs=1e-9)


@many
@given(equal_steps(), st.integers(8, 170))
def test_with_equal_steps_and_convex_errors_it_is_the_optimum(
    states: list[StateCosts], budget: int
) -> None:
    budget = max(budget, smallest(states))
    decision, best = decide_budget(states, budget), exhaustive(states, budget)
    assert decision.error == best.error
    assert decision.nbytes == best.nbytes


@many
@given(equal_steps(), st.floats(0, 300) | st.integers(0, 300).map(float))
def test_tolerance_takes_the_fewest_bytes(states: list[StateCosts], tolerance: float) -> None:
    decision = decide_tolerance(states, tolerance)
    reachable = sum(min(s.error) for s in states)
    if reachable > tolerance:
        assert decision.error == reachable
        return
    assert decision.error <= tolerance
    if decision.nbytes > smallest(states):
        assert exhaustive(states, decision.nbytes - 1).error > tolerance


@many
@given(any_states(), st.floats(0, 2e3))
def test_tolerance_is_kept_where_it_is_reachable(
    states: list[StateCosts], tolerance: float
) -> None:
    decision = decide_tolerance(states, tolerance)
    reachable = math.fsum(min(e for _, e, _ in c.alternatives) for c in decision.choices)
    assert decision.error <= (tolerance if reachable <= tolerance else reachable)


@many
@given(any_states(FINITE), st.floats(0, 2e3))
def test_tolerance_is_within_a_step_of_the_fewest_bytes(
    states: list[StateCosts], tolerance: float
) -> None:
    states = fresh(states)
    decision = decide_tolerance(states, tolerance)
    step = max(max(s.nbytes) - min(s.nbytes) for s in states)
    if decision.nbytes - step > smallest(states):
        assert exhaustive(states, decision.nbytes - step - 1).error > tolerance


@many
@given(any_states(), st.integers(0, 150), st.randoms(use_true_random=False))
def test_the_order_of_states_does_not_matter(
    states: list[StateCosts], budget: int, shuffle: random.Random
) -> None:
    budget = max(budget, smallest(states))
    shuffled = shuffle.sample(states, len(states))
    for one_way, other in (
        (decide_budget(states, budget), decide_budget(shuffled, budget)),
        (decide_tolerance(states, budget), decide_tolerance(shuffled, budget)),
    ):
        assert [c.key for c in other.choices] == [s.key for s in shuffled]
        assert sorted(one_way.choices, key=lambda c: c.key) == sorted(
            other.choices, key=lambda c: c.key
        )
        assert (one_way.price, one_way.error) == (other.price, other.error)


@many
@given(any_states(FINITE), st.integers(0, 150))
def test_the_switching_cost_is_part_of_what_is_minimized(
    states: list[StateCosts], budget: int
) -> None:
    rules = Rules(hysteresis=0.3, dwell=0, rungs=len(LADDER))
    states = [replace(s, alarm=False) for s in states]
    with_costs = []
    for s in states:
        cost = 0.3 * s.error[s.widths.index(s.current)] if s.current in s.widths else 0.0
        paid = [e + cost * (w != s.current) for w, e in zip(s.widths, s.error, strict=True)]
        with_costs.append(replace(s, error=tuple(paid), current=None))
    budget = max(budget, smallest(states))
    found = decide_budget(states, budget, rules)
    total = sum(
        s.error[s.widths.index(c.width)] for s, c in zip(with_costs, found.choices, strict=True)
    )
    assert total <= decide_budget(with_costs, budget, FREE).error * (1 + 1e-12)
    assert total >= exhaustive(with_costs, budget).error * (1 - 1e-12)


def test_what_is_left_goes_to_candidates_off_the_hull_too() -> None:
    """3 bits save less per byte than 4, but 4 do not fit."""
    assert widths(decide_budget([one((3.0, 2.0, 0.0))], 3)) == [3]
    assert widths(decide_tolerance([one((3.0, 2.0, 0.0))], 2.5)) == [3]


def test_gains_too_small_for_a_slope_end() -> None:
    tiny = StateCosts((0, "s"), (2, 3), (2, 10), (5e-324, 0.0))
    assert widths(decide_budget([tiny], 10)) == [2]


def test_staying_is_preferred_to_a_worse_filling() -> None:
    """The small tensor's step is steeper, and the large one's then does not fit."""
    large = StateCosts((0, "s"), (2, 3), (2, 12), (10.0, 0.0))
    small = StateCosts((1, "s"), (2, 3), (2, 3), (3.0, 0.0))
    assert widths(decide_budget([large, small], 14)) == [2, 3]
    stay = [replace(large, current=3), replace(small, current=2)]
    assert widths(decide_budget(stay, 14)) == [3, 2]


def test_steps_that_a_large_one_makes_needless_are_given_back() -> None:
    small = [StateCosts((k, "s"), (2, 3), (0, 1), (11.0, 0.0)) for k in range(2)]
    large = StateCosts((9, "s"), (2, 3), (0, 10), (100.0, 0.0))
    assert widths(decide_tolerance([*small, large], 27)) == [2, 2, 3]


def test_many_states_come_near_the_budget() -> None:
    for seed in range(5):
        states = network(200, seed)
        for bits in (3, 4.2, 7, 20):
            budget = int(bits * sum(s.nbytes[-1] for s in states) / 32)
            assert 0.98 * budget <= decide_budget(states, budget).nbytes <= budget


def test_the_two_modes_agree() -> None:
    states = network(100)
    decision = decide_budget(states, sum(s.nbytes[2] for s in states))
    other = decide_tolerance(states, decision.error)
    assert other.error <= decision.error
    assert other.nbytes == pytest.approx(decision.nbytes, rel=1e-3)


# Rules.


def test_a_state_moves_one_rung_and_an_alarm_several() -> None:
    error = (50.0, 40.0, 30.0, 20.0, 10.0, 4.0, 2.0, 0.0)
    rules = Rules(hysteresis=0)
    assert widths(decide_budget([one(error, current=3)], 32, rules)) == [4]
    assert widths(decide_budget([one(error, current=3)], 32, replace(rules, rungs=2))) == [5]
    alarmed = decide_budget([one(error, current=3, alarm=True)], 32, rules)
    assert widths(alarmed) == [32]
    assert alarmed.choices[0].moved
    assert [w for w, _, _ in alarmed.choices[0].alternatives] == list(LADDER)
    down = decide_tolerance([one(error, current=8, alarm=True)], 100, rules)
    assert widths(down) == [6]


def test_rungs_are_those_of_the_state() -> None:
    state = StateCosts((0, "s"), (2, 8, 32), (2, 8, 32), (9.0, 5.0, 1.0), current=2)
    assert widths(decide_budget([state], 32)) == [8]
    # A width in force that is no candidate any more lies between two rungs.
    assert widths(decide_budget([replace(state, current=4)], 32)) == [8]
    assert widths(decide_budget([replace(state, current=16)], 8)) == [8]
    assert widths(decide_budget([replace(state, widths=(2, 4, 6), current=32)], 32)) == [6]


def test_a_change_waits_for_the_dwell_time() -> None:
    error = (50.0, 40.0, 30.0, 20.0)
    rules = Rules(hysteresis=0, dwell=3)
    assert widths(decide_budget([one(error, current=3, waited=2)], 32, rules)) == [3]
    assert widths(decide_budget([one(error, current=3, waited=3)], 32, rules)) == [4]
    assert widths(decide_budget([one(error, current=3, waited=0, alarm=True)], 32, rules)) == [5]


def test_a_change_must_pay() -> None:
    assert widths(decide_budget([one((9.0, 8.5, 8.0), current=2)], 32)) == [2]
    assert widths(decide_budget([one((9.0, 8.0, 8.0), current=2)], 32)) == [3]
    # An alarm asks for no margin.
    assert widths(decide_budget([one((9.0, 8.5, 8.3), current=2, alarm=True)], 32)) == [4]


def noisy(states: Sequence[StateCosts], look: int) -> list[StateCosts]:
    """Every error 5% up or down, and the other way at the next look."""
    rng = np.random.default_rng(len(states))
    up = [np.where(rng.random(len(s.error)) < 0.5, -0.05, 0.05) * (-1) ** look for s in states]
    return [
        replace(s, error=tuple((np.array(s.error) * (1 + n)).tolist()))
        for s, n in zip(states, up, strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_noise_moves_no_width(seed: int) -> None:
    """Noise of half the hysteresis, starting from a plan for the true errors."""
    states = network(200, seed)
    moves_without = 0
    for bits in (2.5, 4, 6):
        budget = int(bits * sum(s.nbytes[-1] for s in states) / 32)
        plan = at(states, decide_budget(states, budget))
        for look in range(50):
            assert not any(c.moved for c in decide_budget(noisy(plan, look), budget).choices)
        free = decide_budget(noisy(plan, 0), budget, FREE)
        moves_without += sum(c.moved for c in free.choices)
    assert moves_without > 0


@pytest.mark.parametrize("seed", range(10))
def test_noise_under_a_tolerance_settles(seed: int) -> None:
    """The sum swings too, so that there may be something to make up for, at first."""
    states = network(60 + seed, seed)
    tolerance = decide_budget(states, sum(s.nbytes[2] for s in states)).error * 1.01
    plan, moves = decide_tolerance(states, tolerance), []
    for look in range(50):
        plan = decide_tolerance(noisy(at(states, plan), look), tolerance)
        assert plan.error <= tolerance
        moves.append(sum(c.moved for c in plan.choices))
    assert not any(moves[6:]), moves


def test_a_common_swing_is_followed_once() -> None:
    """All errors 5% up, 5% down, and so on: the tolerance is kept, the slack is not spent."""
    states = network(60)
    tolerance = decide_budget(states, sum(s.nbytes[2] for s in states)).error
    plan = decide_tolerance(states, tolerance)
    moves = []
    for look in range(20):
        factor = 0.95 if look % 2 else 1.05
        swung = [replace(s, error=tuple(e * factor for e in s.error)) for s in at(states, plan)]
        plan = decide_tolerance(swung, tolerance)
        assert plan.error <= tolerance
        moves.append(sum(c.moved for c in plan.choices))
    assert moves[0] > 0
    assert not any(moves[1:])


def test_slack_beyond_the_hysteresis_is_spent() -> None:
    states = network(60)
    tolerance = decide_budget(states, sum(s.nbytes[2] for s in states)).error
    plan = at(states, decide_tolerance(states, tolerance))
    less = [replace(s, error=tuple(e * 0.5 for e in s.error)) for s in plan]
    decision = decide_tolerance(less, tolerance)
    assert decision.nbytes < 0.95 * sum(s.nbytes[s.widths.index(s.current or 0)] for s in plan)
    assert 0.9 * tolerance < decision.error <= tolerance


def test_hysteresis_yields_to_the_tolerance() -> None:
    """The step is too small to pay, but the tolerance can be reached with it."""
    assert widths(decide_tolerance([one((9.0, 8.5), current=2)], 8.7)) == [3]
    assert widths(decide_tolerance([one((9.0, 8.5), current=2)], 9.0)) == [2]
    # Of two such states only as many as it takes.
    twins = [one((9.0, 8.5), key=(k, "s"), current=2) for k in range(2)]
    assert widths(decide_tolerance(twins, 17.6)) == [3, 2]


def test_tolerance_out_of_reach_takes_the_least_error_that_is_allowed() -> None:
    error = (50.0, 40.0, 30.0, 30.0)
    assert widths(decide_tolerance([one(error, current=2)], 1)) == [3]
    assert widths(decide_tolerance([one(error)], 1)) == [4]  # 5 bits would not help


def test_an_alarm_widens_within_the_dwell_time_and_does_not_narrow() -> None:
    """Where bytes are worth more than all errors, and where errors are worth any bytes."""
    error = (4.0, 3.0, 2.0, 1.0, 0.0)
    for waited, expected in ((0, 4), (1, 3)):
        state = one(error, current=4, waited=waited, alarm=True)
        assert widths(decide_tolerance([state], 100.0, Rules(dwell=1))) == [expected]
        assert widths(decide_tolerance([state], 0.0, Rules(dwell=1))) == [6]


def test_the_budget_wins_over_the_rules_in_a_stated_order() -> None:
    error = (50.0, 40.0, 30.0, 20.0, 10.0)

    def width(budget: int, **fields: object) -> int:
        return widths(decide_budget([one(error, current=5, **fields)], budget))[0]

    assert width(5, waited=0) == 5
    assert width(4, waited=0) == 4  # dwell is waived, one rung
    assert width(3, waited=0) == 3  # then more rungs
    assert width(2) == 2
    with pytest.raises(InfeasibleBudgetError, match="the 1 others take 2 bytes"):
        width(1)


def test_rungs_are_kept_where_waiving_the_dwell_is_enough() -> None:
    steep, flat = (90.0, 60.0, 30.0, 1.0), (4.0, 3.0, 2.0, 1.0)
    states = [one(steep, current=5, waited=0), one(flat, key=(1, "s"), current=5, waited=0)]
    assert widths(decide_budget(states, 8)) == [4, 4]
    assert widths(decide_budget(states, 7)) == [5, 2]


def test_a_budget_that_shrinks_is_kept_at_once() -> None:
    states = network(40)
    plan = at(states, decide_budget(states, sum(s.nbytes[6] for s in states)), waited=0)
    budget = sum(s.nbytes[1] for s in states)
    decision = decide_budget(plan, budget)
    assert 0.98 * budget <= decision.nbytes <= budget
    assert decision.error == pytest.approx(decide_budget(states, budget).error)


# Pins, forbidden widths, odd input.


def test_a_pinned_state_keeps_its_width() -> None:
    pinned = StateCosts((9, "s"), (4,), (40,), (1e9,), current=4)
    assert widths(decide_budget([pinned, one((3.0, 2.0))], 43)) == [4, 3]
    assert widths(decide_tolerance([pinned, one((3.0, 2.0))], 1e9 + 2.5)) == [4, 3]
    changed = decide_budget([replace(pinned, current=8, waited=0)], 40)
    assert changed.choices[0].moved


def test_a_forbidden_width_is_avoided() -> None:
    forbidden = (math.inf, math.inf, 3.0, 2.0)
    assert widths(decide_budget([one(forbidden)], 4)) == [4]
    # Not even rungs and dwell hold a state at one; and there is no switching cost to pay.
    assert widths(decide_budget([one(forbidden, current=2, waited=0)], 4)) == [4]
    assert widths(decide_tolerance([one(forbidden, current=3, waited=0)], 9)) == [4]


def test_as_few_forbidden_widths_as_the_budget_permits() -> None:
    states = [
        StateCosts((i, "s"), (2, 4), (2, size), (math.inf, 1.0), current=2)
        for i, size in enumerate((26, 10, 20))
    ]
    decision = decide_budget(states, 32)
    assert widths(decision) == [2, 4, 4]
    assert decision.error == decision.price == math.inf
    assert widths(decide_budget(states, 56)) == [4, 4, 4]


def test_a_state_with_no_finite_error_keeps_its_width() -> None:
    """Its errors say nothing; the other states are decided as if it were not there."""
    lost = StateCosts((7, "s"), (2, 3, 4), (2, 3, 4), (math.inf,) * 3, current=3)
    assert widths(decide_budget([lost, one((3.0, 2.0, 1.0))], 6)) == [3, 3]
    tolerant = decide_tolerance([lost, one((3.0, 2.0, 1.0))], 2.5)
    assert widths(tolerant) == [3, 3]
    assert tolerant.error == math.inf
    far = one((3.0, 2.0, 1.0, 0.5), current=5)
    assert widths(decide_budget([lost, far], 6)) == [3, 3]  # rungs go first
    assert widths(decide_budget([lost], 2)) == [2]  # but the budget wins


def test_fewer_bytes_at_a_larger_width() -> None:
    """A block of codes that is mostly padding is larger than an element in fp32."""
    state = StateCosts((0, "s"), (4, 8, 32), (66, 130, 4), (3.0, 2.0, 0.0))
    assert widths(decide_budget([state], 130)) == [32]
    assert widths(decide_budget([state], 4)) == [32]
    assert widths(decide_tolerance([state], 5)) == [32]


def test_ties_go_to_fewer_bytes_and_to_the_first_key() -> None:
    assert widths(decide_budget([one((1.0, 1.0, 1.0))], 99)) == [2]
    a, b = one((2.0, 1.0), key=(0, "b")), one((2.0, 1.0), key=(0, "a"))
    assert widths(decide_budget([a, b], 5)) == [2, 3]


def test_no_states() -> None:
    assert decide_budget([], 0) == decide_tolerance([], 0) == Decision((), 0.0, 0.0, 0)
    assert exhaustive([], 0) == Decision((), 0.0, 0.0, 0)
    with pytest.raises(InfeasibleBudgetError):
        decide_budget([], -1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"error": (1.0, math.nan)}, r"\(0, 's'\): error \(1.0, nan\)"),
        ({"error": (1.0, -1.0)}, r"\(0, 's'\): error"),
        ({"error": (1.0,)}, r"\(0, 's'\): needs bytes and error"),
        ({"nbytes": (1, -1)}, r"\(0, 's'\): bytes"),
        ({"widths": (3, 2)}, r"\(0, 's'\): widths"),
        ({"widths": (), "nbytes": (), "error": ()}, r"\(0, 's'\): needs"),
    ],
)
def test_costs_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    states = [one((2.0, 1.0, 0.5), key=(5, "t")), replace(one((1.0, 0.0)), **fields)]  # type: ignore[arg-type]
    for decide in (decide_budget, decide_tolerance, exhaustive):
        with pytest.raises(ValueError, match=message):
            decide(states, 9)


def test_other_mistakes_are_refused() -> None:
    state = one((1.0, 0.0))
    with pytest.raises(ValueError, match="two states have the key"):
        decide_budget([state, state], 9)
    with pytest.raises(ValueError, match="tolerance"):
        decide_tolerance([state], -1)
    with pytest.raises(ValueError, match="tolerance"):
        decide_tolerance([state], math.nan)
    with pytest.raises(ValueError, match="at least 0"):
        replace(RULES, hysteresis=-0.1)


@pytest.mark.slow
def test_time_grows_about_linearly() -> None:
    def seconds(count: int) -> float:
        states = network(count)
        budget = sum(s.nbytes[2] for s in states)
        times = []
        for _ in range(5):
            start = time.process_time()
            decide_budget(states, budget)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(16_000) < 3 * 8 * seconds(2_000)
