"""What a byte buys: the lower convex hull of error over bytes, cut into steps.

For a price per byte, a state that minimizes ``cost + price * bytes`` sits on a corner of the lower
convex hull of its (bytes, cost) points, whatever the price (Everett 1963, "Generalized Lagrange
multiplier method"). So only corners matter; between two neighbouring corners lies a *step*, with
its bytes, its gain and its slope, gain per byte. Along one state slopes fall. Sorted over all
states, the steps before a position are what a price equal to the slope there chooses, and so
every prefix has the least cost for its bytes: marginal allocation (Fox 1966, "Discrete
optimization via marginal analysis"), for all prices at once, by one sort.

Arrays of shape (states, candidates) are padded; ``allowed`` is false in the padding. A cost of
infinity is one that any number of bytes is worth avoiding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Steps:
    """The steps of all states, steepest first; those of one state in the order of its corners."""

    start: Ints  # of each state: its candidate before any step, the one with the fewest bytes
    state: Ints  # of each step: the state that it moves
    target: Ints  # the candidate that it leads to
    nbytes: Ints  # what it adds
    gain: Floats  # by how much it lowers the cost; infinite where it leaves an infinite cost
    slope: Floats  # gain per byte

    def __len__(self) -> int:
        return len(self.state)

    def chosen(self, taken: Ints) -> Ints:
        """The candidate of each state after the steps at the positions ``taken``, ascending."""
        at = self.start.copy()
        at[self.state[taken]] = self.target[taken]  # the last of several to one state stays
        return at


def build_steps(cost: Floats, nbytes: Ints, allowed: Bools) -> Steps:
    """The steps between the corners of every state's hull.

    All states walk along their hulls at once: from a corner, the next one is the candidate with
    the steepest descent (as in Jarvis 1973), and of several equally steep ones the nearest, so
    that points on a line stay reachable. Costs that do not fall with bytes are passed over, which
    makes the frontier decreasing and convex. At most as many rounds as candidates, each linear in
    the number of states.
    """
    states, candidates = cost.shape
    rows = np.arange(states)
    start = _fewest_bytes(cost, nbytes, allowed)
    shape = (states, max(candidates - 1, 0))
    target, extra = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    gain, slope = np.zeros(shape), np.zeros(shape)
    at, bound = start.copy(), np.full(states, np.inf)
    # From here on a row is a candidate: numpy reduces long columns faster than short rows.
    costs, sizes = np.ascontiguousarray(cost.T), np.ascontiguousarray(nbytes.T)
    usable = np.ascontiguousarray(allowed.T)
    for corner in range(shape[1]):
        added = sizes - sizes[at, rows]
        with np.errstate(invalid="ignore"):  # inf - inf is no gain
            lowered = costs - costs[at, rows]
            np.negative(lowered, out=lowered)
        descends = usable & (added > 0) & (lowered > 0)
        steepness = np.divide(lowered, added, out=np.zeros_like(lowered), where=descends)
        best = steepness.max(axis=0, initial=0)
        nearest = np.where(descends & (steepness == best), added, _NEVER).argmin(axis=0)
        kept = np.flatnonzero(best > 0)
        if not len(kept):
            break
        at[kept] = target[kept, corner] = nearest[kept]
        extra[kept, corner] = added[nearest[kept], kept]
        gain[kept, corner] = lowered[nearest[kept], kept]
        # Rounding must not let a later step of a state pass an earlier one.
        bound[kept] = slope[kept, corner] = np.minimum(best[kept], bound[kept])
    flat = np.flatnonzero(slope > 0)  # by state, then by corner: the order of equal slopes
    state, extra, slope = flat // max(shape[1], 1), extra.ravel()[flat], slope.ravel()[flat]
    # Where any number of bytes is worth it, the cheapest first, so that most states get theirs.
    order = np.lexsort((np.where(np.isinf(slope), extra, 0), -slope))
    return Steps(
        start,
        state[order],
        target.ravel()[flat][order],
        extra[order],
        gain.ravel()[flat][order],
        slope[order],
    )


def _fewest_bytes(cost: Floats, nbytes: Ints, allowed: Bools) -> Ints:
    """Of each state the allowed candidate with the fewest bytes, and of those the least cost."""
    size = np.where(allowed, nbytes, _NEVER)
    smallest = allowed & (size == size.min(axis=1, keepdims=True))
    least = np.where(smallest, cost, np.inf).min(axis=1, keepdims=True)
    start: Ints = (smallest & (cost == least)).argmax(axis=1)
    return start


def take_within(steps: Steps, room: int) -> tuple[Ints, float]:
    """The steps to take with ``room`` more bytes, and the price: the slope of the first one left.

    All steps up to the first that does not fit; then, in the same order, each that still fits, a
    state being done with once one of its steps does not. The first part is the solution at the
    price; no choice of candidates saves more than price × bytes left over beyond it.
    """
    prefix = int(np.searchsorted(np.cumsum(steps.nbytes), room, side="right"))
    taken = list(range(prefix))
    if prefix == len(steps):
        return np.array(taken, np.int64), 0.0
    room -= int(steps.nbytes[:prefix].sum())
    done: set[int] = set()
    rest = zip(steps.state[prefix:].tolist(), steps.nbytes[prefix:].tolist(), strict=True)
    for position, (state, size) in enumerate(rest, prefix):
        if size > room:
            done.add(state)
        elif state not in done:
            taken.append(position)
            room -= size
    return np.array(taken, np.int64), float(steps.slope[prefix])


def give_back(steps: Steps, taken: Ints, fall: Floats, slack: float, free: Bools) -> Ints:
    """``taken`` without the steps that are not needed: undoes the flattest first.

    Undoing a step raises the error by ``fall``, the sum of which must stay below ``slack``; only
    ``free`` steps are undone, and of each state its last ones.
    """
    kept = taken.tolist()
    fixed: set[int] = set()
    state, raised, may = steps.state.tolist(), fall.tolist(), free.tolist()
    undone: set[int] = set()
    for position in reversed(kept):
        if state[position] in fixed:
            continue
        if may[position] and raised[position] <= slack:
            slack -= raised[position]
            undone.add(position)
        else:
            fixed.add(state[position])
    return np.array([position for position in kept if position not in undone], np.int64)
