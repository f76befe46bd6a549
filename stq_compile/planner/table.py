"""The states of a decision as arrays, and which of their widths are allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, compress, pairwise

import numpy as np

from stq_compile.planner.costs import Choice, Decision, Rules, StateCosts
from stq_compile.planner.hull import Bools, Floats, Ints


class Table:
    """Arrays of shape (states, candidates), padded, in the order of the states' keys.

    That order makes a decision independent of the order in which states are given.

    Attributes:
        error: predicted error, infinite at a forbidden width and in the padding; 0 throughout for
            a state with no finite error at all, about which errors say nothing.
        switching: the switching cost, 0 at the width in force.
        cost: both together.
        now: the candidate in force; 0 where there is none, see `may_stay`.
    """

    def __init__(self, states: Sequence[StateCosts], rules: Rules) -> None:
        self._order = sorted(range(len(states)), key=lambda i: states[i].key)
        self.states = [states[i] for i in self._order]
        _check_lengths(self.states)
        counts = np.array([len(s.widths) for s in self.states], np.int64)
        columns = np.arange(counts.max(initial=1))
        self._exists: Bools = columns < counts[:, None]
        widths: Ints = self._exists * 0 + (columns + (1 << 30))
        widths[self._exists] = list(chain.from_iterable(s.widths for s in self.states))
        self.nbytes: Ints = np.zeros(self._exists.shape, np.int64)
        self.nbytes[self._exists] = list(chain.from_iterable(s.nbytes for s in self.states))
        self.error: Floats = np.full(self._exists.shape, np.inf)
        self.error[self._exists] = list(chain.from_iterable(s.error for s in self.states))
        _check_values(self.states, widths, self.nbytes, self.error)
        self._blind = ~np.isfinite(self.error).any(axis=1)
        self.error[self._blind] = 0
        self._set_rules(widths, rules)

    def _set_rules(self, widths: Ints, rules: Rules) -> None:
        """The candidates that each level of `allowed` admits, and the switching costs."""
        in_force = np.array([s.current or 0 for s in self.states], np.int64)[:, None]
        alarm = np.array([s.alarm for s in self.states], bool)[:, None]
        waits = np.array([s.waited < rules.dwell for s in self.states], bool)[:, None]
        self._stay: Bools = widths == in_force
        self._stays = self._stay.any(axis=1)
        self.now: Ints = self._stay.argmax(axis=1)
        # A width in force that is no candidate (a pin that changed) lies between two rungs.
        position = (widths < in_force).sum(axis=1) - 0.5 * ~self._stays
        distance = np.abs(np.arange(widths.shape[1]) - position[:, None])
        above = alarm & (widths > in_force)
        fresh = in_force == 0
        near: Bools = self._exists & ((distance <= rules.rungs) | above | fresh)
        held: Bools = near & (self._stay | ~waits | above | fresh)
        self._levels = (held, near, self._exists)
        known = self.error[np.arange(len(self.states)), self.now]
        pays = self._stays & np.isfinite(known) & ~alarm[:, 0]
        margin = rules.hysteresis * np.where(pays, known, 0)
        self.switching: Floats = margin[:, None] * ~self._stay
        self.cost: Floats = self.error + self.switching

    def allowed(self, level: int) -> Bools:
        """The candidates that may be chosen.

        Level 0: those within the rules. 1: dwell is waived. 2: any number of rungs. 3: also widths
        that an infinite error forbids. Below 3, a state that has only forbidden widths on a level
        gets the next one, as if by an alarm; one with no finite error at all keeps its width.
        """
        if level == 3:
            return self._exists
        finite = np.isfinite(self.error)
        allowed = self._levels[level] & finite
        for wider in self._levels[level + 1 :]:
            allowed = np.where(allowed.any(axis=1, keepdims=True), allowed, wider & finite)
        return np.where((self._blind & self._stays)[:, None], self._stay, allowed) & self._exists

    def may_stay(self, allowed: Bools) -> bool:
        """Whether every state has a width in force and may keep it."""
        rows = np.arange(len(self.states))
        usable = self._stays.all() and allowed[rows, self.now].all()
        return bool(usable and np.isfinite(self.error[rows, self.now]).all())

    def total(self, values: Floats, chosen: Ints) -> float:
        """The sum of the chosen candidates' ``values``, correctly rounded."""
        return math.fsum(values[np.arange(len(chosen)), chosen].tolist())

    def total_bytes(self, chosen: Ints) -> int:
        return int(self.nbytes[np.arange(len(chosen)), chosen].sum())

    def decision(self, chosen: Ints, allowed: Bools, price: float) -> Decision:
        """Says it in terms of the states, in the order in which they were given."""
        choices: list[Choice | None] = [None] * len(self.states)
        rows = zip(self._order, self.states, chosen.tolist(), allowed.tolist(), strict=True)
        for place, s, at, admitted in rows:
            width = s.widths[at]
            choices[place] = Choice(
                key=s.key,
                width=width,
                error=s.error[at],
                nbytes=s.nbytes[at],
                moved=s.current is not None and width != s.current,
                alternatives=tuple(
                    compress(zip(s.widths, s.error, s.nbytes, strict=True), admitted)
                ),
            )
        made = tuple(c for c in choices if c is not None)
        total = math.fsum(c.error for c in made)
        return Decision(made, price, total, sum(c.nbytes for c in made))


def _check_lengths(states: Sequence[StateCosts]) -> None:
    for s in states:
        if not len(s.widths) == len(s.nbytes) == len(s.error) != 0:
            raise ValueError(f"state {s.key}: needs bytes and error of each of {s.widths}")
    for one, other in pairwise(states):
        if one.key == other.key:
            raise ValueError(f"two states have the key {one.key}")


def _check_values(states: Sequence[StateCosts], widths: Ints, nbytes: Ints, error: Floats) -> None:
    """``widths`` are padded with ever larger numbers."""
    ascend = (np.diff(widths, axis=1, prepend=0) > 0).all(axis=1)
    for wrong, what in (
        (~ascend, "widths {0.widths} do not ascend"),
        ((nbytes < 0).any(axis=1), "bytes {0.nbytes} are negative"),
        (~(error >= 0).all(axis=1), "error {0.error} at {0.widths} is not >= 0"),  # NaN too
    ):
        if wrong.any():
            state = states[int(wrong.argmax())]
            raise ValueError(f"state {state.key}: {what.format(state)}")
