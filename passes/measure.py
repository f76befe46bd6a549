"""From the templates to graphs that measure: sums from which a planner predicts errors.

A measuring graph reads what a step reads and writes nothing but sums. For every state ``s`` and
every width it could have, it sums the square of what that width's settled error does to the update,

    sum of (du/ds * error_w(s))^2          error_w: `stq_compile.error_law`

beside the update's own square and the factors of `error_law`. Nothing in it knows an optimizer:
``du/ds`` is forward-mode AD of the template (``torch.func.jvp``), which is exact for an update that
is smooth in ``s``.

Where it is not (``sign`` and comparisons have a derivative of zero almost everywhere, and yet an
error flips them), the square is a finite difference at the settled error itself,

    ((u(s + error) - u(s))^2 + (u(s - error) - u(s))^2) / 2

which for a smooth update is the same to first order, and for ``sign`` counts the elements within
reach of a flip: sqrt(pi/2) = 1.25 times what Gaussian noise of that size flips, on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from stq_compile import ops  # noqa: F401  (registers the operators)
from stq_compile.error_law import FACTORS, persistence
from stq_compile.formats import FLOAT32, WIDTHS, Format, choose_format
from stq_compile.halves import HALF_DTYPES
from stq_compile.options import Rounding
from stq_compile.passes.functionalize import DECOMPOSITIONS, fake_inputs
from stq_compile.passes.normalizers import Differentiable
from stq_compile.passes.ranges import base_name
from stq_compile.step_graph import Instance, Operand, Program, Recurrence, Role, Source, StepGraph

LADDER = tuple(width for width in WIDTHS if width < FLOAT32.width)
"""Widths whose error is measured; at 32 there is none."""

Scalars = Mapping[str, Tensor]
"""The scalars of a step, 0-dim, by placeholder."""

HORIZON = 50.0
"""Persistence of an error in a state whose recurrence is not known, in steps."""
LONGEST = 1e4
"""And at most, where a decay depends on scalars that may bring it to 1 for a while."""

ROUGH = frozenset(
    (
        *("sign", "sgn", "floor", "ceil", "round", "trunc"),
        *("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not"),
    )
)
"""Operators whose derivative is zero almost everywhere and whose result still depends on errors."""

NARROWEST_SUM = 8
"""Fewest bits, in blocks, of a state that is a sum over all steps. What it gains is added at every
step and never decays. If the largest element of a block stands at the top level, as one of 128
that are rounded at random does where levels are coarser than scales, the next step raises the scale
by one of its steps, for ever: exponential growth (design/0008)."""

RANGE_SUMS = ("end_update", "end_effect", "end_stored", "end_old", "end_fed")
"""Of a non-negative average, sums over the elements at the end of their block's range, or below,
that have a gradient (of a row that no example touched, the mean says nothing about the state):
squares of the update, and of what a relative error of 1 does to it; what they are stored as at 8
bits or fewer, what they are, and what they are averages of."""

SUMS = "sums"


def measured_states(unit: StepGraph) -> list[Operand]:
    """The states of a unit that a planner may choose a width for; none of a region."""
    if unit.unfused:
        return []
    written = set(unit.writes or ())
    users = {n.name: bool(n.users) for n in unit.placeholders}
    return [
        o
        for o in unit.operands
        if o.role is Role.STATE
        and o.shape != ()
        and o.name in written
        and users[o.name]
        and o.source.key not in unit.facts.fragile
        and (o.dtype == torch.float32 or (unit.widened and o.dtype in HALF_DTYPES))
    ]


def with_packed_normalizers(program: Program, is_wide: Callable[[str, str], bool]) -> Program:
    """The templates as a planner is to see them: normalizers that stay in float32 are none.

    A normalized format needs a packed unit. Where ``is_wide`` (of a parameter's name and a state's
    key) says that the unit is pinned at 32 bits, the states that it would divide are raw; a
    template is divided if that is so for some of its parameters only.
    """
    units = []
    for unit in program.units:
        groups: dict[frozenset[str], list[Instance]] = {}
        for instance in unit.instances:
            name = instance.param.source.name
            raw = {k for k, other in unit.facts.normalizers.items() if is_wide(name, other)}
            groups.setdefault(frozenset(raw), []).append(instance)
        for raw_keys, instances in groups.items():
            kept = {k: n for k, n in unit.facts.normalizers.items() if k not in raw_keys}
            facts = replace(unit.facts, normalizers=kept)
            name = f"{unit.name}_raw" if raw_keys else unit.name
            units.append(unit.replace(name=name, facts=facts, instances=tuple(instances)))
    return Program(program.optimizer, tuple(units))


def formats_of(unit: StepGraph, key: str) -> dict[int, Format]:
    """The format that a state has at each width."""
    normalizer = unit.facts.normalizers.get(key)
    return {
        width: choose_format(
            width,
            nonnegative=key in unit.facts.nonnegative,
            normalizable=normalizer is not None and normalizer not in unit.facts.fragile,
        )
        for width in LADDER
    }


def sustained(unit: StepGraph, key: str, format: Format) -> bool:
    """Whether a state can be kept in a format for ever: sums run away at few bits."""
    recurrence = unit.facts.recurrences.get(key)
    adds_up = recurrence is not None and recurrence.kind == "sum"
    return not (adds_up and format.blocked and format.width < NARROWEST_SUM)


def is_smooth(unit: StepGraph, state: str) -> bool:
    """Whether no rough operator lies between a state and the new parameter."""
    param = next(o.name for o in unit.operands if o.role is Role.PARAM)
    reached = {n for n in unit.placeholders if n.name == state}
    for node in unit.calls:
        if any(a in reached for a in node.all_input_nodes):
            reached.add(node)
    results = dict(zip(unit.writes or (), unit.outputs, strict=True))
    needed: set[fx.Node] = set()
    stack = [results[param]] if param in results else []
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return not any(base_name(n) in ROUGH for n in reached & needed)


def amplification(recurrence: Recurrence | None, scalars: Scalars) -> float | Tensor:
    """How long an error persists; infinite for a sum, whose law knows what to do.

    0-dim where the decay depends on ``scalars``, the present ones: a schedule may move them, and
    what was captured before it did is to see the same as what is captured after.
    """
    if recurrence is None or recurrence.kind in ("unknown", "maximum"):
        return HORIZON
    if not recurrence.scalars:
        return recurrence.amplification
    decay = recurrence.decay_at(scalars)
    return 1 / (1 - decay * decay).clamp_min(1 / LONGEST)


def forgotten(recurrence: Recurrence | None, scalars: Scalars) -> float:
    """The share of an error's square that a step leaves; 0 for a sum, whose law sees it shrink."""
    persistent = float(amplification(recurrence, scalars))
    return 0.0 if math.isinf(persistent) else 1 - 1 / persistent


def forgetting(program: Program, live: Callable[[Operand], Any]) -> dict[tuple[int, str], float]:
    """What `forgotten` is now for the states, by parameter and key, for which it may change.

    ``live`` finds the number or the tensor that an operand stands for.
    """
    found = {}
    for unit in program.units:
        varying = {k: r for k, r in unit.facts.recurrences.items() if r.scalars}
        needed = {name for recurrence in varying.values() for name in recurrence.scalars}
        for instance in unit.instances if varying else ():
            scalars = {}
            for node, operand in zip(unit.placeholders, instance.operands, strict=True):
                if node.name in needed:
                    number = live(operand) if operand.value is None else operand.value
                    scalars[node.name] = torch.tensor(float(number), dtype=torch.float64)
            for key, recurrence in varying.items():
                found[(instance.param.source.param, key)] = forgotten(recurrence, scalars)
    return found


def scalars_of(unit: StepGraph, values: Sequence[Any]) -> dict[str, Tensor]:
    """The scalars of a step as 0-dim tensors, by placeholder, among what it is called with."""
    found = {}
    for node, value in zip(unit.placeholders, values, strict=True):
        if not isinstance(value, Tensor):  # a product keeps a symbolic number what it is
            found[node.name] = torch.ones((), dtype=torch.float64) * value
        elif value.ndim == 0:
            found[node.name] = value
    return found


def measure(program: Program, rounding: Rounding) -> Program:
    """The measuring graph of every unit that has a state to measure and moves its parameter."""
    units = []
    for unit in program.units:
        param = unit.instances[0].param.name
        if measured_states(unit) and param in (unit.writes or ()):
            units.append(_measuring(unit, rounding))
    return Program(program.optimizer, tuple(units))


def _measuring(unit: StepGraph, rounding: Rounding) -> StepGraph:
    tracer = _Tracer(unit, rounding)
    traced = make_fx(
        torch.func.functionalize(tracer.run, remove="mutations_and_views"),
        decomposition_table=DECOMPOSITIONS,
        _allow_non_fake_inputs=True,
    )(*fake_inputs(unit))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for original, node in zip(unit.placeholders, traced.graph.nodes, strict=False):
        env[node] = graph.placeholder(original.name)
        env[node].meta = {**node.meta, "example": original.meta["example"]}
    out = graph.placeholder(SUMS)
    out.meta = {"example": torch.empty(0, device="meta")}
    for node in traced.graph.nodes:
        if node.op == "output":
            graph.output((env[node.args[0]],))
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.eliminate_dead_code()
    return unit.replace(
        name=f"{unit.name}_measure",
        graph=graph,
        instances=tuple(_with_sums(i) for i in unit.instances),
        writes=(SUMS,),
    )


def _with_sums(instance: Instance) -> Instance:
    param = instance.param.source
    source = Source(param.param, param.name, SUMS)
    operand = Operand(SUMS, Role.SUMS, source, (0,), (1,), torch.float64)
    return replace(instance, operands=(*instance.operands, operand))


def slots_of(unit: StepGraph) -> tuple[str, ...]:
    """What each sum of a measuring graph is: ``count``, ``update``, ``param``, or
    ``state:error_w`` and ``state:factor``."""
    (out,) = unit.outputs
    return tuple(str(out.args[1]).split())


@dataclass(frozen=True)
class _State:
    position: int
    key: str
    output: int


class _Tracer:
    """Runs the template on fake tensors and calls the measuring operators on what it sees."""

    def __init__(self, unit: StepGraph, rounding: Rounding) -> None:
        self.unit = unit
        self.rounding = rounding
        self.module = Differentiable(unit.graph)
        names = [n.name for n in unit.placeholders]
        writes = unit.writes or ()
        param = unit.instances[0].param.name
        self.param, self.moved = names.index(param), writes.index(param)
        grads = [o.name for o in unit.operands if o.role is Role.GRAD]
        self.grad = names.index(grads[0]) if grads else self.param
        self.states = {
            o.source.key: _State(names.index(o.name), o.source.key, writes.index(o.name))
            for o in measured_states(unit)
        }

    def run(self, *args: Any) -> Tensor:
        results = self.module.run(*args)
        update: Tensor = results[self.moved] - args[self.param]
        named: dict[str, Tensor] = {
            "count": torch.ones_like(update),
            "update": update * update,
            "param": args[self.param] * args[self.param],
        }
        scalars = scalars_of(self.unit, args)
        for state in self.states.values():
            named |= self._state(args, results, update, scalars, state)
        total: Tensor = torch.ops.stq.sums(list(named.values()), " ".join(named))
        return total

    def _state(
        self,
        args: tuple[Any, ...],
        results: Any,
        update: Tensor,
        scalars: Scalars,
        state: _State,
    ) -> dict[str, Tensor]:
        old, new = args[state.position], results[state.output]
        squared = self._effect(args, update, state)
        normalizer = self.unit.facts.normalizers.get(state.key)
        named: dict[str, Tensor] = {}
        recurrence = self.unit.facts.recurrences.get(state.key)
        kept = persistence(amplification(recurrence, scalars), self.rounding)
        if not isinstance(kept, Tensor):
            kept = torch.scalar_tensor(kept, dtype=torch.float64)
        for width, format in formats_of(self.unit, state.key).items():
            divisor = None
            if format.normalized and normalizer is not None:
                divisor = results[self._output(normalizer)]
            error = torch.ops.stq.settled_error(
                old, new, divisor, format.name, kept, self.rounding
            )  # fmt: skip
            named[f"{state.key}:error_{width}"] = squared(error)
        averages = recurrence is not None and recurrence.kind == "average"
        if averages and state.key in self.unit.facts.nonnegative:
            named |= self._at_the_end(state.key, args, new, update, squared, scalars)
        values = torch.ops.stq.factors(old, new, args[self.grad])
        named |= {f"{state.key}:{n}": v for n, v in zip(FACTORS, values, strict=True)}
        return named

    def _at_the_end(
        self,
        key: str,
        args: tuple[Any, ...],
        new: Tensor,
        update: Tensor,
        squared: Callable[[Tensor], Tensor],
        scalars: Scalars,
    ) -> dict[str, Tensor]:
        """`RANGE_SUMS`."""
        old = args[self.states[key].position]
        nothing = torch.zeros_like(old)
        end = torch.where(args[self.grad] != 0, torch.ops.stq.range_end(old), nothing)
        there = end > 0
        recurrence = self.unit.facts.recurrences[key]
        decay: float | Tensor = recurrence.value or 0.0
        fresh: float | Tensor = 1 - decay
        if recurrence.scalars:
            decay = recurrence.decay_at(scalars)
            fresh = (1 - decay).clamp_min(1 / LONGEST)
        values = (
            torch.where(there, update * update, nothing),
            squared(torch.where(there, old, nothing)),
            end,
            torch.where(there, old, nothing),
            torch.where(there, (new - decay * old) / fresh, nothing),
        )
        return {f"{key}:{name}": v for name, v in zip(RANGE_SUMS, values, strict=True)}

    def _output(self, key: str) -> int:
        name = next(o.name for o in self.unit.operands if o.source.key == key)
        return (self.unit.writes or ()).index(name)

    def _effect(
        self, args: tuple[Any, ...], update: Tensor, state: _State
    ) -> Callable[[Tensor], Tensor]:
        """The square of what an error of the state does to the update, per element."""

        def updated(x: Tensor) -> Tensor:
            row = [*args[: state.position], x, *args[state.position + 1 :]]
            moved: Tensor = self.module.run(*row)[self.moved] - args[self.param]
            return moved

        old = args[state.position]
        if is_smooth(self.unit, self.unit.placeholders[state.position].name):
            slope = torch.func.jvp(updated, (old,), (torch.ones_like(old),))[1]

            def squared(error: Tensor) -> Tensor:
                effect: Tensor = slope * error
                return effect * effect

            return squared
        nonnegative = state.key in self.unit.facts.nonnegative

        def difference(error: Tensor) -> Tensor:
            below = old - error
            low = updated(below.clamp_min(0.0) if nonnegative else below) - update
            high = updated(old + error) - update
            return (low * low + high * high) * 0.5

        return difference
