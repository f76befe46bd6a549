"""Chooses the widths: a prior at birth, then a look every `interval` steps and a decision after it.

For a state ``s`` of tensor ``i`` at width ``b``, a look gives the relative perturbation of the
tensor's own update, ``D = sum (du/ds * error_b)^2 / sum u^2`` (`passes.measure`). A calibration
from direct measurements corrects it by the factors that explain where the law is off. The total
that is kept below the tolerance, or made least under a budget, is the mean over all elements,

    sum over i of (elements of i / elements of all) * sum over s of D_is(b_is).

Numbers of a planner are Python floats and a decision is a function of them alone, so equal sums
give equal plans.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from stq_compile.errors import InfeasibleBudgetError
from stq_compile.options import Options
from stq_compile.planner.costs import Choice, Decision, Rules, StateCosts
from stq_compile.planner.decision import decide_budget, decide_tolerance
from stq_compile.planner.factors import FACTOR_NAMES, Measured, interpret
from stq_compile.planner.history import Change, Comparison, History, Record
from stq_compile.planner.selection import IDENTITY, REACH, Calibration, calibrate

StateKey = tuple[int, str]
"""A state: (number of its parameter over all groups, its key)."""

FIRST_LOOKS = (20, 50)
"""Steps of the first looks, before those of the interval: states change fast at the beginning."""
CALIBRATIONS = 3
"""Looks with direct measurements."""
COMPARISONS = 4000
"""Comparisons that are kept; the oldest go first."""
DRIFT = 1.0
"""Octaves by which the scales of a tensor's states may move between two looks; beyond that its
gradients changed character, and errors that fall are not believed before the next look."""


@dataclass(frozen=True)
class Managed:
    """A state whose width the planner chooses."""

    key: StateKey
    param: str
    state: str
    numel: int
    nbytes: Mapping[int, int]  # all bytes at each width
    prior: Mapping[int, float]  # error at each width before the first look
    forgetting: float = 0.0  # share of an error's square that is left after a step
    weights: Mapping[int, float] = field(default_factory=dict)  # what errors count for, 1 if unsaid


@dataclass(frozen=True)
class Observation:
    """A direct measurement beside the prediction: factors, and log of the ratio."""

    factors: dict[str, float]
    log_ratio: float


class Planner:
    """The widths of one optimizer's states."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rules = Rules(options.hysteresis, options.dwell, options.rungs)
        self.managed: dict[StateKey, Managed] = {}
        self.widths: dict[StateKey, int] = {}
        self.waited: dict[StateKey, int] = {}
        self.measured: dict[StateKey, Measured] = {}
        self.alarms: set[StateKey] = set()
        self.calibration: Calibration = IDENTITY
        self.observations: list[Observation] = []
        self.comparisons: deque[Comparison] = deque(maxlen=COMPARISONS)
        self.looks = 0
        self._corrected: dict[StateKey, dict[int, float]] | None = None
        self._total = 0
        self.history = History()

    @property
    def mode(self) -> str:
        return "tolerance" if self.options.target_bits is None else "budget"

    def enroll(
        self, states: Iterable[Managed], fixed_bytes: int, elements: int, step: int
    ) -> dict[StateKey, int]:
        """Take over new states and give them a first width; returns the widths that change.

        Args:
            states: all that are to be managed, known ones included.
            fixed_bytes: bytes of all states that are not managed.
            elements: elements of all states, in float32 training.
            step: steps made so far.
        """
        self.managed |= {s.key: s for s in states if s.key not in self.managed}
        self._total = sum({k[0]: s.numel for k, s in self.managed.items()}.values())
        if not self.widths.keys() >= self.managed.keys():
            return self._change_widths("prior", step, fixed_bytes, elements)
        if self._in_order(fixed_bytes, elements):
            return {}
        return self._change_widths(self.mode, step, fixed_bytes, elements)

    def _in_order(self, fixed_bytes: int, elements: int) -> bool:
        """Whether the widths in force are on the ladder and within the budget.

        They may not be after a checkpoint of other options, or when states were added that are
        not managed.
        """
        total = fixed_bytes
        for key, state in self.managed.items():
            width = self.widths[key]
            if width not in self.options.ladder or width not in state.nbytes:
                return False
            total += state.nbytes[width]
        target = self.options.target_bits
        return target is None or total <= _budget(target, elements)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Everything is as before if the block fails."""
        before = {name: copy(value) for name, value in vars(self).items()}
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def due(self, step: int) -> bool:
        """Whether a look follows step number ``step`` (from 1)."""
        if not self.managed:
            return False
        interval = self.options.interval
        return step % interval == 0 or (step in FIRST_LOOKS and step < interval)

    @property
    def calibrating(self) -> bool:
        """Whether the next look wants direct measurements too."""
        return self.looks < CALIBRATIONS

    def look(
        self,
        sums: Mapping[int, Mapping[str, float]],
        forgetting: Mapping[StateKey, float] = MappingProxyType({}),
    ) -> None:
        """Take the sums of a look, by parameter number, and what `Managed.forgetting` is now where
        it changes from step to step."""
        self.looks += 1
        self.alarms.clear()
        self._corrected = None
        looked = {}
        for key in self.managed:
            if key[0] not in sums or f"{key[1]}:scale" not in sums[key[0]]:
                continue
            found = interpret(sums[key[0]], key[1], self.measured.get(key))
            if found is not None:
                looked[key] = found
        drifted = {k[0] for k, m in looked.items() if abs(m.factors["scale_drift"]) > DRIFT}
        for key, found in looked.items():
            before = self.measured.get(key)
            self.measured[key] = found
            width = self.widths[key]
            error = found.errors.get(width, 0.0)
            grown = before is not None and error > self.options.alarm * before.errors.get(width, 0)
            if error > 1 or grown or found.loses(width):
                self.alarms.add(key)
            elif before is not None and self.looks > CALIBRATIONS:
                a_step = forgetting.get(key, self.managed[key].forgetting)
                kept = 1.0 if key[0] in drifted else a_step**self.options.interval
                self.measured[key] = found.after(before, kept)

    def compare(self, direct: Mapping[StateKey, Mapping[int, float]], step: int) -> None:
        """Note direct measurements at the widths in force beside what is predicted now."""
        for key, errors in direct.items():
            width = self.widths.get(key)
            if width is not None and width in errors and key in self.measured:
                state, predicted = self.managed[key], self.error_of(key, width)
                self.comparisons.append(
                    Comparison(step, state.param, state.state, width, predicted, errors[width])
                )

    def observe(self, direct: Mapping[StateKey, Mapping[int, float]]) -> None:
        """Take direct measurements (relative perturbations by width), and calibrate on all."""
        self._corrected = None
        for key, errors in direct.items():
            measured = self.measured.get(key)
            if measured is None:
                continue
            for width, error in errors.items():
                predicted = measured.errors.get(width, 0.0)
                if error > 0 and predicted > 0:
                    ratio = math.log(error / predicted)
                    self.observations.append(Observation(measured.at(width), ratio))
        if self.observations:
            rows = [[o.factors[n] for n in FACTOR_NAMES] for o in self.observations]
            target = np.array([o.log_ratio for o in self.observations])
            self.calibration = calibrate(np.array(rows), target, FACTOR_NAMES)
        if not self.calibrating:
            self.observations.clear()  # the calibration is all that is needed from here on

    def decide(self, step: int, fixed_bytes: int, elements: int) -> dict[StateKey, int]:
        """Decide on all widths after a look; returns those that change."""
        return self._change_widths(self.mode, step, fixed_bytes, elements)

    def _change_widths(
        self, mode: str, step: int, fixed_bytes: int, elements: int
    ) -> dict[StateKey, int]:
        before = dict(self.widths)
        costs = [self._costs(state) for state in self.managed.values()]
        decision = self._decide(costs, fixed_bytes, elements)
        self._take(decision, mode, step, fixed_bytes, elements)
        self.alarms.clear()
        return {k: w for k, w in self.widths.items() if before.get(k) != w}

    def error_of(self, key: StateKey, width: int) -> float:
        """Predicted relative perturbation of its parameter's update by one state."""
        if width == 32:
            return 0.0
        return self._errors(self.managed[key])[width]

    def _errors(self, state: Managed) -> Mapping[int, float]:
        """Predicted errors of a state by width, below 32."""
        if state.key not in self.measured:
            return state.prior
        if self._corrected is None:
            self._corrected = corrected_errors(self.measured, self.calibration)
        return self._corrected[state.key]

    def _share(self, state: Managed) -> float:
        """The parameter's share of all elements."""
        return state.numel / self._total

    def _costs(self, state: Managed) -> StateCosts:
        share, nbytes, errors = self._share(state), state.nbytes, self._errors(state)
        widths = tuple([w for w in self.options.ladder if w in nbytes])
        measured = self.measured.get(state.key)

        def weighted(width: int) -> float:
            if width == 32:
                return 0.0
            lost = 0.0 if measured is None else measured.lost_at(width)
            return share * state.weights.get(width, 1.0) * (errors[width] + lost)

        return StateCosts(
            key=state.key,
            widths=widths,
            nbytes=tuple([nbytes[w] for w in widths]),
            error=tuple([weighted(w) for w in widths]),
            current=self.widths.get(state.key),
            waited=self.waited.get(state.key, 1 << 30),
            alarm=state.key in self.alarms,
        )

    def _decide(self, costs: Sequence[StateCosts], fixed_bytes: int, elements: int) -> Decision:
        target = self.options.target_bits
        if target is not None:
            budget = _budget(target, elements)
            try:
                return decide_budget(costs, budget - fixed_bytes, self.rules)
            except InfeasibleBudgetError as error:
                found = {**error.fields, "budget": budget, "fixed": fixed_bytes}
                raise InfeasibleBudgetError(**found) from error
        return decide_tolerance(costs, self.options.tolerance_or_default, self.rules)

    def _take(
        self, decision: Decision, mode: str, step: int, fixed_bytes: int, elements: int
    ) -> None:
        changes = []
        for choice in decision.choices:
            before = self.widths.get(choice.key)
            if before == choice.width:
                self.waited[choice.key] = self.waited.get(choice.key, 1 << 30) + 1
                continue
            changes.append(self._change(choice, before, decision.price))
            self.widths[choice.key] = choice.width
            self.waited[choice.key] = 0
        bits = 8 * (decision.nbytes + fixed_bytes) / elements if elements else 0.0
        self.history.add(
            Record(
                step, mode, decision.error, bits, decision.price,
                str(self.calibration.certificate or "not calibrated"), tuple(changes),
            )
        )  # fmt: skip

    def _change(self, choice: Choice, before: int | None, price: float) -> Change:
        state = self.managed[choice.key]
        share = self._share(state)
        measured = self.measured.get(choice.key)
        errors = {width: error / share for width, error, _ in choice.alternatives}
        if before is None or measured is None:
            reason = "first width, from the prior"
        else:
            now = errors.get(before, self.error_of(choice.key, before))
            alarm = "alarm: the error grew; " if choice.key in self.alarms else ""
            if measured.loses(before):
                alarm = f"alarm: elements below their block's range lose {measured.lost:.0%}; "
            worth = "error falls" if choice.width > before else "bytes are worth more"
            reason = f"{alarm}{worth}: {now:.3g} -> {errors[choice.width]:.3g}"
        return Change(
            param=state.param,
            state=state.state,
            before=before,
            after=choice.width,
            error=errors.get(choice.width, 0.0),
            reason=reason,
            alternatives=tuple((w, errors[w], n) for w, _, n in choice.alternatives),
            factors={} if measured is None else dict(measured.factors),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on, and the history, in plain types."""
        return {
            "looks": self.looks,
            "widths": [[p, k, w] for (p, k), w in self.widths.items()],
            "waited": [[p, k, min(n, 1 << 30)] for (p, k), n in self.waited.items()],
            "measured": [
                [p, k, {str(w): e for w, e in m.errors.items()}, dict(m.factors), m.level, m.lost]
                for (p, k), m in self.measured.items()
            ],
            "observations": [
                [[o.factors[name] for name in FACTOR_NAMES], o.log_ratio] for o in self.observations
            ],
            "calibration": self.calibration.to_dict(),
            "history": self.history.to_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; `saved_plan.check` says whether it is that."""
        self.looks = saved["looks"]
        self.widths = {(p, k): w for p, k, w in saved["widths"]}
        self.waited = {(p, k): n for p, k, n in saved["waited"]}
        self.measured = {
            (p, k): Measured({int(w): e for w, e in errors.items()}, dict(factors), *rest)
            for p, k, errors, factors, *rest in saved["measured"]
        }
        self.observations = [
            Observation(dict(zip(FACTOR_NAMES, factors, strict=True)), ratio)
            for factors, ratio in saved["observations"]
        ]
        self.calibration = Calibration.from_dict(saved["calibration"])
        self.history = History.from_dict(saved["history"])
        self.alarms.clear()
        self._corrected = None


def corrected_errors(
    measured: Mapping[StateKey, Measured], calibration: Calibration
) -> dict[StateKey, dict[int, float]]:
    """Errors of all states at all widths, times what the calibration corrects.

    `Calibration.correct` for all at once, bit for bit: the same operations in the same order.
    """
    states = list(measured.values())
    counts = [len(m.errors) for m in states]
    widths = [width for m in states for width in m.errors]
    errors = [error for m in states for error in m.errors.values()]
    total = np.full(len(errors), calibration.intercept)
    columns = zip(
        calibration.names, calibration.mean, calibration.scale, calibration.coefficients,
        strict=True,
    )  # fmt: skip
    for name, mean, scale, coefficient in columns:
        if name == "narrowness":
            values = np.array([2.0**-width for width in widths])
        elif name == "predicted":
            values = np.array([math.log(max(error, 1e-30)) for error in errors])
        else:
            values = np.repeat([m.factors[name] for m in states], counts)
        total += coefficient * np.clip((values - mean) / scale, -REACH, REACH)
    limited = np.clip(total, -calibration.limit, calibration.limit).tolist()
    flat = iter([error * math.exp(c) for error, c in zip(errors, limited, strict=True)])
    return {key: {w: next(flat) for w in m.errors} for key, m in measured.items()}


def _budget(target_bits: float, elements: int) -> int:
    return math.floor(target_bits * elements / 8)
