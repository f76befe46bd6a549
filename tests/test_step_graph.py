"""`StepGraph`: what verification sees, and that the printed form is Python."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from graphs import Sketch, aten, only, program, random_inputs, run, with_sizes
from stq_compile.errors import InvalidGraphError
from stq_compile.formats import FORMATS
from stq_compile.passes.quantize import insert_quantize
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import (
    Instance,
    Operand,
    Role,
    Source,
    StepGraph,
    location_of,
    print_graph,
    verify,
)
from zoo import ADAM_FACTS, adam, sgd


def in_place() -> StepGraph:
    """An in-place step with methods, keywords, a scalar input and a created state."""
    s = Sketch()
    p, g, m, lr = s.param(), s.grad(), s.state("momentum_buffer"), s.scalar("group_0_lr", 0.1)
    s.call("mul_", m, 0.5, at="sgd.py:7 buf.mul_(momentum)")
    s.call("add_", m, g, alpha=1 - 0.25)
    rate = s.call(operator.neg, s.call("item", lr))
    s.call("add_", p, s.call("mul", m, rate), at="sgd.py:9 param.add_(buf, alpha=-lr)  # go")
    s.call("clamp_", p, min=-float("inf"), max=1e30)
    return s.inplace(s.call(torch.zeros_like, g, dtype=torch.float32, device=torch.device("cpu")))


# Printing. ------------------------------------------------------------------------------------


def execute(unit: StepGraph) -> Callable[..., Any]:
    """The printed graph as a function, in a scope that has ``torch`` and ``operator`` only."""
    scope: dict[str, Any] = {"torch": torch, "operator": operator}
    exec(compile(print_graph(unit), unit.name, "exec"), scope)  # that is what is tested
    return scope[unit.name]  # type: ignore[no-any-return]


def quantized_adam() -> StepGraph:
    formats = {"exp_avg": FORMATS["midrise3"], "exp_avg_sq": FORMATS["adaptive_log4"]}
    packed = insert_quantize(
        program(adam(ADAM_FACTS)), lambda o, _: formats[o.source.key], "nearest"
    )
    return only(packed)


@pytest.mark.parametrize("make", [in_place, sgd, adam])
def test_the_printed_graph_computes_what_the_graph_computes(
    make: Callable[[], StepGraph],
) -> None:
    unit = make()
    inputs = random_inputs(unit, positive=["exp_avg_sq"])
    after = run(unit, inputs)
    copies = {name: value.clone() for name, value in inputs.items()}
    results = execute(unit)(*copies.values())
    named = dict(zip(unit.writes or ["created_0"], results, strict=True))
    for name, value in after.items():
        assert torch.equal({**copies, **named}[name], value), name


def test_printed_quantize_nodes_run() -> None:
    unit = quantized_adam()
    codes = torch.randint(0, 256, (1, 48), dtype=torch.uint8)
    more = torch.randint(0, 256, (1, 64), dtype=torch.uint8)
    scales = torch.tensor([16000], dtype=torch.int16)
    row = (torch.randn(3, 5), torch.randn(3, 5), codes, scales, more, scales)
    for left, right in zip(unit.run(*row), execute(unit)(*row), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e-45, 3, True, None, [1.5, (2,)], "text"]
)
def test_literals_are_printed_as_python(value: Any) -> None:
    s = Sketch()
    node = s.call(aten.add.Tensor, s.param(), s.grad(), value)
    text = print_graph(s.functional({}))
    line = next(x for x in text.splitlines() if x.strip().startswith(f"{node.name} ="))
    found = eval(line.split("grad_0, ")[1].removesuffix(")"), {"torch": torch})
    assert found == value or (found != found and value != value)


def test_a_state_key_that_is_no_identifier_prints_as_python() -> None:
    s = Sketch()
    p, g, m = s.param(), s.grad(), s.state("buf")
    unit = s.functional({m: s.call(aten.add.Tensor, m, g), p: s.call(aten.sub.Tensor, p, g)})
    (instance,) = unit.instances
    key = replace(instance.operands[2].source, key="exp avg-1")
    odd = (*instance.operands[:2], replace(instance.operands[2], source=key))
    unit = unit.replace(instances=(replace(instance, operands=odd),))
    packed = insert_quantize(program(unit), lambda *_: FORMATS["softsign4"], "nearest")
    compile(str(packed), "packed", "exec")


def test_printed_in_place_graph(stq_golden: Golden) -> None:
    stq_golden(print_graph(in_place()))


def test_printed_template_with_regions(stq_golden: Golden) -> None:
    s = Sketch("template_0")
    step, p, g = s.counter(), s.param(), s.grad()
    new = s.call(aten.add.Tensor, step, 1, at="lib/adam.py:3 step_t += 1  # per tensor")
    unit = s.functional({step: new, p: s.call(aten.sub.Tensor, p, g, at="adam.py:5 p -= g")})
    stq_golden(print_graph(with_sizes(unit, (5, 6, 7)).replace(regions={"add_tensor": "scalar"})))


def test_programs_print_all_units_and_count_nodes() -> None:
    both = program(sgd(), adam())
    assert str(both) == f"{print_graph(sgd())}\n\n{print_graph(adam())}"
    assert both.nodes == len(sgd().calls) + len(adam().calls)


def test_sources_and_operands_describe_themselves() -> None:
    assert str(Source(3, "head.weight", "exp_avg")) == "head.weight:exp_avg"
    assert str(Source(3, "head.weight")) == "head.weight"
    assert str(Source(-1, "", "param_groups[0]['lr']")) == "param_groups[0]['lr']"
    source = Source(-1, "", "constant_0 of w")
    constant = Operand("c", Role.SCALAR, source, (), (), torch.float64, value=0.1)
    assert constant.describe() == "scalar float64[] constant_0 of w = 0.1"


def test_location_is_the_innermost_line() -> None:
    s = Sketch()
    node = s.call("neg", s.param(), at="a.py:1 first()")
    node.meta["stack_trace"] += '  File "/x/y/b.py", line 22, in g\n    z = -p  # note\n'
    assert location_of(node) == "b.py:22 z = -p"
    assert location_of(s.call("neg", node)) == ""


# Verification. --------------------------------------------------------------------------------


def test_good_graphs_pass() -> None:
    verify(program(sgd(), adam(), in_place(), quantized_adam(), with_sizes(sgd(), (1, 2))), "x")


def without_operand(unit: StepGraph) -> StepGraph:
    (instance,) = unit.instances
    return unit.replace(instances=(replace(instance, operands=instance.operands[:-1]),))


def operands_swapped(unit: StepGraph) -> StepGraph:
    first, second, *rest = unit.operands
    return unit.replace(instances=(Instance((second, first, *rest)),))


def roles_differ(unit: StepGraph) -> StepGraph:
    operands = tuple(replace(o, role=Role.STATE) for o in unit.operands)
    return unit.replace(instances=(*unit.instances, Instance(operands)))


def use_before_definition(unit: StepGraph) -> StepGraph:
    first, second = unit.calls[:2]
    second.append(first)
    return unit


def foreign_argument(unit: StepGraph) -> StepGraph:
    unit.calls[0].args = (sgd().placeholders[0], 0.5)
    return unit


def attribute(unit: StepGraph) -> StepGraph:
    with unit.graph.inserting_before(unit.calls[0]):
        unit.graph.get_attr("buffer")
    return unit


def mutation(unit: StepGraph) -> StepGraph:
    with unit.graph.inserting_before(unit.calls[-1]):
        unit.graph.call_function(aten.add_.Tensor, (unit.placeholders[0], 1.0))
    return unit


def mutating_method(unit: StepGraph) -> StepGraph:
    with unit.graph.inserting_before(unit.calls[-1]):
        unit.graph.call_method("add_", (unit.placeholders[0], 1.0))
    return unit


BREAKS: dict[str, tuple[Callable[[StepGraph], StepGraph], str]] = {
    "no instance": (lambda u: u.replace(instances=()), "no instance"),
    "an operand missing": (without_operand, "operands .* for placeholders"),
    "operands in another order": (operands_swapped, "operands .* for placeholders"),
    "instances of other roles": (roles_differ, "role"),
    "use before definition": (use_before_definition, "before"),
    "argument of another graph": (foreign_argument, "graph"),
    "an attribute": (attribute, "get_attr"),
    "too few writes": (lambda u: u.replace(writes=("param_0",)), "1 writes for 2 outputs"),
    "a write twice": (lambda u: u.replace(writes=("param_0", "param_0")), "not distinct"),
    "a write to nothing": (lambda u: u.replace(writes=("param_0", "new")), "not distinct"),
    "mutation": (mutation, "in-place node .* in a functional graph"),
    "mutation by a method": (mutating_method, "in-place node .* in a functional graph"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_verification_sees(name: str) -> None:
    change, message = BREAKS[name]
    with pytest.raises(InvalidGraphError, match=rf"after pass mine: .*{message}"):
        verify(program(adam(), change(sgd())), "mine")


def test_mutation_is_allowed_before_functionalization() -> None:
    verify(program(in_place()), "capture")
