"""Small step graphs written by hand, and what tests do with them: fill, run, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from stq_compile.step_graph import Facts, Instance, Operand, Program, Role, Source, StepGraph

aten = torch.ops.aten
Values = dict[str, Tensor]
"""Tensors by the name of their placeholder."""

SHAPE = (3, 5)


class Sketch:
    """Builds one step graph; inputs are named as capture names them."""

    def __init__(self, name: str = "step", shape: tuple[int, ...] = SHAPE) -> None:
        self.name = name
        self.shape = shape
        self.graph = fx.Graph()
        self.operands: list[Operand] = []

    def param(self, i: int = 0) -> fx.Node:
        return self._input(f"param_{i}", Role.PARAM, _owner(i), self._example())

    def grad(self, i: int = 0) -> fx.Node:
        return self._input(f"grad_{i}", Role.GRAD, _owner(i), self._example())

    def state(self, key: str, i: int = 0) -> fx.Node:
        return self._input(f"{key}_{i}", Role.STATE, _owner(i, key), self._example())

    def counter(self, key: str = "step", i: int = 0) -> fx.Node:
        """A 0-dim float32 state."""
        return self._input(f"{key}_{i}", Role.STATE, _owner(i, key), torch.tensor(1.0))

    def scalar(self, key: str, value: float) -> fx.Node:
        """A hyperparameter that is an input."""
        example = torch.tensor(value, dtype=torch.float64)
        return self._input(key, Role.SCALAR, Source(-1, "", key), example)

    def constant(self, key: str, value: float) -> fx.Node:
        """A hoisted constant."""
        example = torch.tensor(value, dtype=torch.float64)
        return self._input(key, Role.SCALAR, Source(-1, "", key), example, value)

    def _example(self) -> Tensor:
        return torch.empty(self.shape, device="meta")

    def _input(
        self, name: str, role: Role, source: Source, example: Tensor, value: float | None = None
    ) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example"] = example
        shape, stride = tuple(example.shape), tuple(example.stride())
        operand = Operand(node.name, role, source, shape, stride, example.dtype, value=value)
        self.operands.append(operand)
        return node

    def call(self, target: Any, *args: Any, at: str = "", **kwargs: Any) -> fx.Node:
        """A function, or a method if ``target`` is a string; ``at`` like ``"adam.py:7 x = y"``."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        if at:
            place, _, text = at.partition(" ")
            file, line = place.split(":")
            node.meta["stack_trace"] = f'  File "{file}", line {line}, in step\n    {text}\n'
        return node

    def inplace(self, *outputs: fx.Node) -> StepGraph:
        """A unit that updates its inputs; ``outputs`` are states that it creates."""
        self.graph.output(tuple(outputs))
        instance = Instance(tuple(self.operands), tuple(range(len(outputs))))
        return StepGraph(self.name, self.graph, (instance,))

    def functional(self, writes: Mapping[fx.Node, fx.Node], facts: Facts = Facts()) -> StepGraph:  # noqa: B008
        """A unit that returns new values: ``{placeholder: new value}``."""
        self.graph.output(tuple(writes.values()))
        instance = Instance(tuple(self.operands))
        names = tuple(node.name for node in writes)
        return StepGraph(self.name, self.graph, (instance,), writes=names, facts=facts)


def _owner(i: int, key: str = "") -> Source:
    return Source(i, f"p{i}", key)


def program(*units: StepGraph) -> Program:
    return Program("Sketched", units)


def only(result: Program) -> StepGraph:
    """The one unit of a program."""
    (unit,) = result.units
    return unit


def with_sizes(unit: StepGraph, sizes: Sequence[int]) -> StepGraph:
    """The unit with one instance per size, of one-dimensional parameters."""
    return unit.replace(instances=tuple(_instance(unit, i, n) for i, n in enumerate(sizes)))


def _instance(unit: StepGraph, i: int, numel: int) -> Instance:
    operands = []
    for operand in unit.operands:
        if operand.role is not Role.SCALAR:
            operand = replace(operand, source=_owner(i, operand.source.key))
        if operand.shape != ():
            operand = replace(operand, shape=(numel,), stride=(1,))
        operands.append(operand)
    return replace(unit.instances[0], operands=tuple(operands))


def random_inputs(unit: StepGraph, seed: int = 0, positive: Sequence[str] = ()) -> Values:
    """A random tensor per input, not negative for the state keys in ``positive``.

    Scalars keep their examples.
    """
    generator = torch.Generator().manual_seed(seed)
    values: Values = {}
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        if operand.shape == ():
            given = operand.value
            example = node.meta["example"]
            if example.is_meta:  # of a 0-dim parameter
                example = torch.randn((), generator=generator)
            values[node.name] = (
                example.clone() if given is None else torch.full_like(example, given)
            )
            continue
        x = torch.randn(operand.shape, generator=generator)
        values[node.name] = x.abs() if operand.source.key in positive else x
    return values


def run(unit: StepGraph, inputs: Values) -> Values:
    """All inputs as they are after the step, by name, and created states by ``created_<i>``."""
    after = {name: value.clone() for name, value in inputs.items()}
    # What the step creates is only written: an input of the functional graph, none before.
    row = [_as_argument(n, after) for n in unit.placeholders]
    results = unit.run(*row)
    if unit.writes is None:
        return after | {f"created_{i}": value for i, value in enumerate(results)}
    return after | dict(zip(unit.writes, results, strict=True))


def _as_argument(node: fx.Node, values: Values) -> Any:
    """A number where the graph takes a symbolic float, else a tensor."""
    value = values[node.name] if node.name in values else node.meta["example"]
    return float(value) if isinstance(node.meta.get("val"), torch.SymFloat) else value


def assert_same(left: Values, right: Values, tolerance: float = 0.0) -> None:
    """Equal tensors under equal names; ``tolerance`` is for other orders of operations."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=tolerance, atol=tolerance, msg=name)


def assert_pure(change: Callable[[Program], Program], before: Program) -> Program:
    """Run a pass, and check that it left its input as it was."""
    text = str(before)
    after = change(before)
    assert str(before) == text
    return after
