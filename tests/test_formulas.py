"""Formulas, put in numbers, are what the graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from graphs import Sketch, aten
from stq_compile.formulas import Formulas, formulas_of, notation
from stq_compile.inspection import inspect_optimizer
from stq_compile.options import Options
from stq_compile.passes.normalizers import Differentiable
from stq_compile.step_graph import Role, StepGraph
from stq_compile.targets import make_optimizer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1, "lr": 0.02},
    "SGD": {"momentum": 0.9, "nesterov": True, "lr": 0.1},
    "RMSprop": {"momentum": 0.5},
    "Adagrad": {},
    "Adadelta": {},
    "NAdam": {},
    "Adamax": {},
}


def template(name: str) -> StepGraph:
    found = inspect_optimizer(make_optimizer(name, arguments=OPTIMIZERS[name]), Options())
    (unit,) = found.front.units
    return unit


def point(unit: StepGraph) -> dict[str, torch.Tensor]:
    """Inputs by the name of their symbol, in float64."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for o in unit.operands:
        name = str(o.role) if o.role in (Role.PARAM, Role.GRAD) else o.source.key
        shape = () if o.shape == () else (7,)
        values[name] = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        if name == "step":
            values[name] = torch.tensor(3.0, dtype=torch.float64)
    return values


def numbers(formulas: Formulas, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every new value, from the formulas alone."""
    found: dict[str, torch.Tensor] = {}

    def value(name: str) -> torch.Tensor:
        if not name.endswith("'"):
            return values[name]
        if name[:-1] not in found:
            found[name[:-1]] = number(formulas.new[name[:-1]])
        return found[name[:-1]]

    def number(expression: Any) -> torch.Tensor:
        symbols = sorted(expression.free_symbols, key=str)
        function = sympy.lambdify(symbols, expression, "numpy")
        arguments = [value(str(s)).numpy() for s in symbols]
        return torch.as_tensor(function(*arguments), dtype=torch.float64)

    for name in formulas.new:
        value(f"{name}'")
    return found


@pytest.mark.parametrize(
    "name",
    ["AdamW", "SGD", *(pytest.param(n, marks=pytest.mark.slow) for n in list(OPTIMIZERS)[2:])],
)
def test_new_values_and_sensitivities(name: str) -> None:
    unit = template(name)
    formulas = formulas_of(unit)
    values = point(unit)
    module = Differentiable(unit.graph)
    inputs = list(values.values())

    def outputs(*args: torch.Tensor) -> dict[str, torch.Tensor]:
        results = module.run(*args)
        names = {o.name: key for o, key in zip(unit.operands, values, strict=True)}
        return {names[n]: x for n, x in zip(unit.writes or (), results, strict=True)}

    expected = outputs(*inputs)
    found = numbers(formulas, values)
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].expand(value.shape), value, rtol=1e-9, atol=1e-12)

    for i, key in enumerate(values):
        if key not in unit.facts.recurrences:
            continue

        def moved(x: torch.Tensor, i: int = i) -> torch.Tensor:
            return outputs(*inputs[:i], x, *inputs[i + 1 :])["param"]

        slope = torch.func.jvp(moved, (inputs[i],), (torch.ones_like(inputs[i]),))[1]
        derivative = formulas._derivative("param", key)
        known = {**values, **{f"{n}'": v for n, v in found.items()}}
        symbols = sorted(derivative.free_symbols, key=str)
        function = sympy.lambdify(symbols, derivative, "numpy")
        result = torch.as_tensor(function(*(known[str(s)].numpy() for s in symbols)))
        torch.testing.assert_close(result.double().expand(slope.shape), slope, rtol=1e-6, atol=1e-9)


def test_notation() -> None:
    x, y = sympy.symbols("x y")
    assert notation(0.09999999999999998 * x + 1.0 * y**2) == "0.1·x + y^2"
    assert notation(sympy.sqrt(x) / 3) == "√(x)/3"


def test_what_has_no_closed_form_is_a_function() -> None:
    s = Sketch("product", shape=(3, 3))
    p, g, m = s.param(), s.grad(), s.state("momentum")
    new = s.call(aten.add.Tensor, m, g)
    unit = s.functional({m: new, p: s.call(aten.sub.Tensor, p, s.call(aten.mm.default, new, g))})
    formulas = formulas_of(unit)
    assert notation(formulas.new["param"]) == "param - mm(momentum', grad)"
    assert formulas.recurrence("momentum") == "momentum' = grad + momentum"
    assert formulas.sensitivity("momentum") == "no closed form"
