"""Capture two parameters of each class in place of all.

Dynamo's time grows with the number of parameters, and so do the guards that it checks at every
step, though the thousand parameters of a group are a handful of templates. So the step is captured
of a twin of the optimizer that holds the first two of each class of parameters that nothing but
their values tells apart. The two prove from the graph that the components of a class are equal and
touch nothing else; the templates then serve all members, and what Dynamo's guards would have
watched of the others is compared here.

What two exemplars cannot prove is that the step treats a third one alike: code may ask for a
parameter's place in its group, or look it up in a table. The optimizers of torch.optim do not
(tests/test_exemplars.py compares their templates with those of whole captures); all others are
captured whole.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from stq_compile.capture import Binding, Captured, Gradient, params_of
from stq_compile.step_graph import Instance, Operand, Program, Role, Source, StepGraph

EXEMPLARS = 2


class NotExemplaryError(Exception):
    """The exemplars do not show that their class is alike; the step must be captured whole."""


def may_have_exemplars(optimizer: type[Optimizer]) -> bool:
    """Whether a step is known to treat all parameters of a class alike: torch's own, as it came."""
    modules = (optimizer.__module__, inspect.unwrap(optimizer.step).__module__)
    return all(f"{module}.".startswith("torch.optim.") for module in modules)


class Exemplars:
    """The classes of an optimizer's parameters, and its twin that holds two of each.

    ``twin`` is None if it would be no smaller, if something is unusual, or if a capture of the twin
    proved too little: the whole optimizer is to be captured then.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.groups = list(optimizer.param_groups)
        self.params = params_of(optimizer)
        self.absent = [p.grad is None for p in self.params]
        self.present = [p for p in self.params if p.grad is not None]
        self.entries = _entries(optimizer, self.present)
        self.values: list[Any] = []
        self.known = len(_values(self.entries))
        self.classes = self._classes(optimizer)
        chosen = {n for members in self.classes for n in members[:EXEMPLARS]}
        smaller = 0 < len(chosen) < len(self.present)
        self.twin = self._twin(optimizer, chosen) if smaller else None

    def note_states(self, optimizer: Optimizer) -> bool:
        """Remember which states there are, now that they are packed: before that, what is
        remembered would stay in float32. False if the step made new ones, so that the next one is
        another."""
        self.entries = _entries(optimizer, self.present)
        self.values = _values(self.entries)
        return len(self.values) == self.known

    def serve(self, optimizer: Optimizer) -> bool:
        """Whether parameters, states and absent gradients are still those that were captured."""
        if not _same(optimizer.param_groups, self.groups) or not _same(
            params_of(optimizer), self.params
        ):
            return False
        if [p.grad is None for p in self.params] != self.absent:
            return False
        entries = _entries(optimizer, self.present)
        return _same(entries, self.entries) and _same(_values(entries), self.values)

    def update(self) -> None:
        """Give the twin the groups' present hyperparameters."""
        assert self.twin is not None
        for group, copied in zip(self.groups, self.twin.param_groups, strict=True):
            copied.update((k, v) for k, v in group.items() if k not in LISTS)

    def _classes(self, optimizer: Optimizer) -> list[list[int]]:
        """Numbers of parameters that have gradients; empty if something is unusual."""
        classes: dict[Any, list[int]] = defaultdict(list)
        if len(set(map(id, self.params))) < len(self.params):
            return []
        number = 0
        for g, group in enumerate(self.groups):
            for p in group["params"]:
                if not self.absent[number]:
                    kind = _kind(p, optimizer.state.get(p, NONE))
                    if kind is None:
                        return []
                    classes[g, kind].append(number)
                number += 1
        return list(classes.values())

    def _twin(self, optimizer: Optimizer, chosen: set[int]) -> Optimizer:
        twin: Optimizer = object.__new__(type(optimizer))
        vars(twin).update(vars(optimizer))
        vars(twin).pop("step", None)  # the compiled one
        numbers = iter(range(len(self.params)))
        twin.param_groups = []
        for group in self.groups:
            kept = [i for i, n in enumerate(group["params"]) if next(numbers) in chosen]
            lists = {k: [group[k][i] for i in kept] for k in LISTS if k in group}
            twin.param_groups.append({**group, **lists})
        twin.state = defaultdict(dict)
        for n in sorted(chosen):
            if self.params[n] in optimizer.state:
                twin.state[self.params[n]] = optimizer.state[self.params[n]]
        return twin


LISTS = ("params", "param_names")
"""What a parameter group holds for each parameter."""


NONE: dict[Any, Any] = {}
"""The states of a parameter that has none yet."""


def _entries(optimizer: Optimizer, params: Sequence[Tensor]) -> list[dict[Any, Any]]:
    state = optimizer.state
    return [state.get(p, NONE) for p in params]


def _values(entries: Sequence[dict[Any, Any]]) -> list[Any]:
    """All states, and how many each parameter has (small numbers are the same objects)."""
    return [*map(len, entries), *chain.from_iterable(map(dict.values, entries))]


def _same(found: Any, known: Any) -> bool:
    return len(found) == len(known) and all(map(is_, found, known))


def _kind(param: Tensor, entries: Mapping[Any, Any]) -> Any:
    """All that a step can ask of a parameter and its states but for their values; None if more."""
    if type(param) not in (Tensor, Parameter) or type(param.grad) is not Tensor:
        return None
    states = []
    for key, value in entries.items():
        if not isinstance(value, Tensor):
            return None
        states.append((key, *_geometry(value)))
    return *_geometry(param), param.requires_grad, _geometry(param.grad), tuple(states)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    stride = tensor.stride() if tensor.layout == torch.strided else ()
    return tensor.shape, stride, tensor.dtype, tensor.device, tensor.layout


def extend(
    program: Program,
    sources: Sequence[Source],
    classes: Sequence[Sequence[int]],
    exemplars: int = EXEMPLARS,
) -> Program:
    """Templates of exemplars as templates of all members of their classes.

    Args:
        program: folded, with one instance for each exemplar.
        sources: of all parameters, in order of their numbers.
        classes: numbers of parameters.
        exemplars: how many of each class were captured, the first ones. One proves nothing.

    Raises:
        NotExemplaryError: two exemplars of a class differ, or a component is not of one parameter.
    """

    def extended(unit: StepGraph | None) -> StepGraph | None:
        if unit is None:
            return None
        rows = {instance.param.source.param: instance for instance in unit.instances}
        found: dict[int, Instance] = {}
        for members in classes:
            captured = [rows[n] for n in members[:exemplars] if n in rows]
            if captured:
                _prove_alike(unit, captured, len(members[:exemplars]))
                found |= {n: rows.get(n) or _moved(captured[0], sources[n]) for n in members}
        return unit.replace(
            instances=tuple(found[n] for n in sorted(found)),
            plain=extended(unit.plain),
            rest=extended(unit.rest),
            whole=extended(unit.whole),
        )

    units = map(extended, program.units)
    return Program(program.optimizer, tuple(unit for unit in units if unit is not None))


def _prove_alike(unit: StepGraph, captured: Sequence[Instance], expected: int) -> None:
    """The instances of the exemplars of one class differ in nothing but the parameter."""
    forms = set()
    for instance in captured:
        number = instance.param.source.param
        if {o.source.param for o in instance.operands} - {-1, number}:
            raise NotExemplaryError(f"{unit.name} is of several parameters")
        if any(o.returned >= 0 for o in instance.operands):
            raise NotExemplaryError(f"{unit.name} makes states")
        forms.add(tuple(map(_form, instance.operands)))
    if len(forms) > 1 or len(captured) < expected:
        raise NotExemplaryError(f"{unit.name}: parameters of one class differ")


def _form(operand: Operand) -> tuple[Any, ...]:
    """An operand but for the parameter that it belongs to; a hoisted constant by its value."""
    key = operand.value if operand.value is not None else operand.source.key
    return operand.role, key, operand.shape, operand.stride, operand.dtype, operand.device


def _moved(instance: Instance, source: Source) -> Instance:
    """The same row for another parameter."""
    old = instance.param.source.param
    operands = tuple(
        replace(o, source=replace(source, key=o.source.key)) if o.source.param == old else o
        for o in instance.operands
    )
    return replace(instance, operands=operands)


def bind(
    captured: Captured,
    program: Program,
    params: Sequence[Tensor],
    states: Mapping[tuple[int, str], Tensor],
) -> Captured:
    """Bindings for the operands of all members; gradients are read from their parameters.

    Args:
        captured: of the exemplars.
        program: extended to all members.
        params: of the optimizer, by number.
        states: by number and key.
    """
    bindings: dict[tuple[Role, Source], Binding] = dict(captured.bindings)
    for _, operand in program.operands():
        place, number = (operand.role, operand.source), operand.source.param
        if operand.role is Role.GRAD:
            bindings[place] = Gradient(params[number])
        elif place not in bindings and number >= 0 and operand.value is None:
            found = operand.role is Role.PARAM
            bindings[place] = params[number] if found else states[number, operand.source.key]
    return replace(captured, bindings=bindings)
