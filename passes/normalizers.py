"""Which state divides which: ``d(update)/d(m) ~ 1/sqrt(v)``, found by differentiating the graph.

Forward-mode AD (``torch.func.jvp``) of the step gives the sensitivity of the update to a signed
state ``m`` at probe points. If multiplying a non-negative state ``v`` by 4 halves it, the update
sees ``m`` in units of ``sqrt(v)``, and so does a normalized format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import inductor_prims

from stq_compile.step_graph import Program, Role, StepGraph

PROBES = 16
PROBE_STEP = 1000.0
"""Value of step counters: past every warm-up that a step decides on by its number (RAdam's)."""
NOT_ZERO = 1e-3
"""Stands for a scalar that is zero just now: without an update there is nothing to see."""
TOLERANCE = 0.02
"""How far from a half the ratio of sensitivities may be: room for an epsilon beside the root."""


class Differentiable(fx.Interpreter):
    """Runs ``prims.fma``, which has no derivative in torch, as a product and a sum.

    By the graph alone: a `fx.GraphModule` makes Python code of it, which is kept for ever, and a
    planner runs a template at every look.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is inductor_prims.fma:
            return args[0] * args[1] + args[2]
        return super().call_function(target, args, kwargs)


def find_normalizers(program: Program) -> Program:
    """Add ``normalizers`` to every unit's facts."""
    return program.map(_find)


def _find(unit: StepGraph) -> StepGraph:
    if unit.unfused:
        return unit
    states = {
        o.source.key: o.name
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.role is Role.STATE and n.users and o.shape != ()
    }
    positive = [k for k in states if k in unit.facts.nonnegative]
    found: dict[str, str] = {}
    for key in states:
        if key in unit.facts.nonnegative or states[key] not in (unit.writes or ()):
            continue
        before = _sensitivity(unit, states[key], None)
        for candidate in positive:
            after = _sensitivity(unit, states[key], states[candidate])
            live = before.abs() > 0
            if live.any() and bool(((after[live] / before[live] - 0.5).abs() < TOLERANCE).all()):
                found[key] = candidate
    return unit.replace(facts=replace(unit.facts, normalizers=found))


def _sensitivity(unit: StepGraph, state: str, scaled: str | None) -> Tensor:
    """d(new parameter)/d(state) at fixed points; ``scaled`` names a state to multiply by 4."""
    inputs = _probe(unit)
    names = [n.name for n in unit.placeholders]
    if scaled is not None:
        inputs[names.index(scaled)] = inputs[names.index(scaled)] * 4.0
    position = names.index(state)
    param = next(o.name for o in unit.operands if o.role is Role.PARAM)
    if param not in (unit.writes or ()):
        return torch.zeros(PROBES)
    output = (unit.writes or ()).index(param)
    module = Differentiable(unit.graph)

    def update(x: Tensor) -> Tensor:
        row = [*inputs[:position], x, *inputs[position + 1 :]]
        result: Tensor = module.run(*row)[output]
        return result

    x = inputs[position]
    tangent: Tensor = torch.func.jvp(update, (x,), (torch.ones_like(x),))[1]
    return tangent.detach()


def _probe(unit: StepGraph) -> list[Any]:
    """Random states of order one and small gradients: far from an epsilon, near the state."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Any] = []
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        if operand.role is Role.SCALAR or operand.shape == ():
            example = node.meta["example"]
            if operand.role is Role.INTERMEDIATE:  # of which nothing is known
                inputs.append(1.0 if operand.number else torch.ones((), dtype=torch.float64))
                continue
            value = example.double() if operand.value is None else torch.tensor(operand.value)
            if operand.role is Role.SCALAR and value == 0:  # as a learning rate is in a warm-up
                value = torch.tensor(NOT_ZERO)
            inputs.append(_as_input(node, value.detach().clone()))
            continue
        x = torch.randn(PROBES, generator=generator, dtype=torch.float64)
        if operand.role is Role.GRAD:
            x = x * 1e-4
        if operand.source.key in unit.facts.nonnegative:
            x = x.abs() + 0.5
        inputs.append(x)
    return inputs


def _as_input(node: fx.Node, value: Tensor) -> Any:
    """A number where the graph takes a symbolic float, else a 0-dim tensor."""
    if isinstance(node.meta.get("val"), torch.SymFloat):
        return float(value)
    if node.meta["example"].dtype == torch.float32:
        return torch.full_like(value, PROBE_STEP)
    return value
