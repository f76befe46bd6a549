"""The transition decision: one width for each state, by a price per byte instead of a search.

All widths jointly are |B|^S combinations. With a cost that falls and is convex in bytes, states
only interact through the sum of their bytes, and a multiplier takes that apart (Everett 1963):
each state minimizes ``cost + price * bytes`` for itself. `hull` finds the solutions of all prices
with one sort, S states × |B| widths in O(S·|B|² + S·|B| log(S·|B|)).

The cost of a state at a width is its predicted error, plus, at every width but the one in force,
a switching cost of ``hysteresis`` × its error at the width in force. So what is minimized is
stated, and a change has to pay. It follows that noise does not move widths: let ``h`` be the
hysteresis and ``n <= h / 2`` the relative noise, and let the widths in force be the solution for
the true errors at price ``p``. Measured, a narrower width ``b`` adds at least
``(1-n) e(b) - (1-h)(1+n) e(now)`` to the cost and a wider one takes off at most
``(1-h)(1+n) e(now) - (1-n) e(b)``. Since ``(1-h)(1+n) <= 1-n``, these are bounded by ``1-n`` times
the true differences, so at the price ``(1-n) p`` staying is again the solution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from stq_compile.errors import InfeasibleBudgetError
from stq_compile.planner.costs import LADDER, RULES, Choice, Decision, Rules, StateCosts
from stq_compile.planner.hull import Bools, Floats, Ints, build_steps, give_back, take_within
from stq_compile.planner.table import Table

__all__ = [
    "LADDER",
    "RULES",
    "Choice",
    "Decision",
    "Rules",
    "StateCosts",
    "decide_budget",
    "decide_tolerance",
    "exhaustive",
]

_NEVER = np.iinfo(np.int64).max


def decide_budget(states: Sequence[StateCosts], budget: int, rules: Rules = RULES) -> Decision:
    """The widths with the least cost whose bytes are at most ``budget``.

    The solution at the price, filled up with the best steps that still fit. Its cost is above the
    least possible by less than price × bytes left over at the price, that is, by less than what
    one step of one state is worth. Staying is preferred where it fits and costs no more.

    The budget comes before the rules. Where they leave no widths that fit, dwell and hysteresis
    are dropped first, then rungs, then infinite errors no longer forbid a width (as few as
    possible get one).

    Raises:
        InfeasibleBudgetError: the smallest candidates of all states exceed the budget.
        ValueError: the costs of a state make no sense; NaN is such a case.
    """
    table = Table(states, rules)
    for level in range(4):
        allowed = table.allowed(level)
        cost = table.cost if level == 0 else table.error
        steps = build_steps(cost, table.nbytes, allowed)
        room = budget - table.total_bytes(steps.start)
        if room >= 0:
            break
    else:
        needed = table.total_bytes(steps.start)
        raise InfeasibleBudgetError(budget=budget, fixed=0, needed=needed, states=len(states))
    taken, price = take_within(steps, room)
    chosen = _filled(table, cost, allowed, steps.chosen(taken), budget)
    if (
        table.may_stay(allowed)
        and table.total_bytes(table.now) <= budget
        and table.total(cost, table.now) <= table.total(cost, chosen)
    ):
        chosen = table.now
    return table.decision(chosen, allowed, price)


def _filled(table: Table, cost: Floats, allowed: Bools, chosen: Ints, budget: int) -> Ints:
    """``chosen``, with what is left of the budget spent on candidates that are on no hull.

    Where a state's next corner does not fit, a candidate before it may. Those that fit have hulls
    of their own, whose steps are taken in the same way, until none is left.
    """
    chosen = chosen.copy()
    every = np.arange(len(chosen))
    while True:
        room = budget - table.total_bytes(chosen)
        extra = table.nbytes - table.nbytes[every, chosen, None]
        fits = allowed & (extra >= 0) & (extra <= room)
        better = fits & (extra > 0) & (cost < cost[every, chosen, None])
        rows = np.flatnonzero(better.any(axis=1))
        steps = build_steps(cost[rows], table.nbytes[rows], fits[rows])
        if not len(steps):  # also where all that is left to gain is too small for a slope
            return chosen
        chosen[rows] = steps.chosen(take_within(steps, room)[0])


def decide_tolerance(
    states: Sequence[StateCosts], tolerance: float, rules: Rules = RULES
) -> Decision:
    """The fewest bytes whose total error, without switching costs, is at most ``tolerance``.

    Takes the steepest steps until the error is low enough, then gives back what was not needed:
    above the least bytes by less than one step of one state. Where the widths in force are within
    the tolerance, but by less than the hysteresis, their error is the limit in its place, so that
    slack that noise opens is not spent; and they stay unless the bytes saved, at the price, are
    worth more than the switching costs. Hysteresis yields where it would miss the tolerance.
    Where no allowed widths reach it, each state goes to its allowed width with the least error.

    Raises:
        ValueError: the tolerance is negative or the costs of a state make no sense.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: it is at least 0")
    table = Table(states, rules)
    allowed = table.allowed(0)
    stays = table.may_stay(allowed)
    now = table.total(table.error, table.now) if stays else math.inf
    limit = now if (1 - rules.hysteresis) * tolerance <= now <= tolerance else tolerance
    for cost in (table.cost, table.error):
        reached = _reach(table, cost, allowed, limit)
        if reached is not None:
            chosen, price = reached
            break
    else:
        steps = build_steps(table.error, table.nbytes, allowed)
        return table.decision(steps.chosen(np.arange(len(steps))), allowed, 0.0)
    saved = price * (table.total_bytes(table.now) - table.total_bytes(chosen))
    switching = table.total(table.switching, chosen)
    if stays and now <= limit and saved <= switching:
        chosen = table.now
    return table.decision(chosen, allowed, price)


def _reach(table: Table, cost: Floats, allowed: Bools, limit: float) -> tuple[Ints, float] | None:
    """The candidates that bring the total error down to the limit, and the price."""
    steps = build_steps(cost, table.nbytes, allowed)
    everything = np.arange(len(steps))
    before = _before(steps.start, steps.state, steps.target)
    fall = table.error[steps.state, before] - table.error[steps.state, steps.target]
    # Summed from the far end, where errors are small, so that no large ones cancel.
    after_all = table.total(table.error, steps.chosen(everything))
    totals = np.append(fall, after_all)[::-1].cumsum()[::-1]
    low_enough = np.flatnonzero(totals <= limit * (1 + 1e-12))
    if not len(low_enough):
        return None
    count = int(low_enough[0])
    while (total := table.total(table.error, steps.chosen(everything[:count]))) > limit:
        if count == len(steps):
            return None
        count += 1
    if count == 0:
        return steps.start, float(steps.slope[0]) if len(steps) else 0.0
    price = float(steps.slope[count - 1])
    # A width in force is not left for slack that the last step happened to open.
    free = table.switching[steps.state, before] <= table.switching[steps.state, steps.target]
    slack = limit * (1 - 1e-12) - total
    chosen = steps.chosen(give_back(steps, everything[:count], fall, slack, free))
    return _cheaper(table, allowed, limit, steps.chosen(everything[: count - 1]), chosen), price


def _cheaper(table: Table, allowed: Bools, limit: float, short: Ints, chosen: Ints) -> Ints:
    """``short``, which misses the limit, with the one move that mends it with fewest bytes.

    Or ``chosen``, if that has no more bytes: it is a large tensor's step where a small one's does.
    """
    rows = np.arange(len(short))
    missing = table.total(table.error, short) - limit
    with np.errstate(invalid="ignore"):
        mends = allowed & (table.error[rows, short, None] - table.error >= missing)
    extra = np.where(mends, table.nbytes - table.nbytes[rows, short, None], _NEVER)
    state, target = np.unravel_index(int(extra.argmin()), extra.shape)
    mended = short.copy()
    mended[state] = target
    if (
        mends.any()
        and table.total_bytes(mended) < table.total_bytes(chosen)
        and table.total(table.error, mended) <= limit
    ):
        return mended
    return chosen


def _before(start: Ints, state: Ints, target: Ints) -> Ints:
    """The candidate that each step leaves: the target of the step before it of the same state."""
    by_state = np.argsort(state, kind="stable")
    before = np.empty_like(target)
    before[by_state[1:]] = target[by_state[:-1]]
    first = by_state[np.flatnonzero(np.diff(state[by_state], prepend=-1))]
    before[first] = start[state[first]]
    return before


def exhaustive(states: Sequence[StateCosts], budget: int) -> Decision:
    """The widths with the least total error within the budget, by trying all combinations.

    No rules, all candidates; of several the one with fewest bytes, then the first in order. The
    price is 0. Time and memory grow as |B|^S: a reference for tests, up to some 8 states.

    Raises:
        InfeasibleBudgetError: the smallest candidates of all states exceed the budget.
    """
    table = Table(states, RULES)
    error, nbytes = np.zeros(()), np.zeros((), np.int64)
    counts = [len(s.widths) for s in table.states]
    if states:
        error = reduce(np.add.outer, [e[:n] for e, n in zip(table.error, counts, strict=True)])
        nbytes = reduce(np.add.outer, [b[:n] for b, n in zip(table.nbytes, counts, strict=True)])
    if nbytes.min() > budget:
        needed = int(nbytes.min())
        raise InfeasibleBudgetError(budget=budget, fixed=0, needed=needed, states=len(states))
    fits = nbytes <= budget
    least = fits & (error == error[fits].min())
    first = np.flatnonzero(least & (nbytes == nbytes[least].min()))[0]
    chosen = np.array(np.unravel_index(first, tuple(counts)), np.int64)
    return table.decision(chosen, table.allowed(3), 0.0)
