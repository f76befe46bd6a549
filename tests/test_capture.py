"""What Dynamo hands over becomes a program: roles by identity, sources, names and lines."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from stq_compile.capture import Argument, Captured, capture, param_sources
from stq_compile.errors import StqError, UnknownInputError
from stq_compile.step_graph import Role, Source, location_of, verify

FOREIGN = torch.ones(3)


class Misleading(Optimizer):
    """Momentum whose states and hyperparameters are called what they are not."""

    def __init__(self, params: Any, *, foreign: bool = False) -> None:
        super().__init__(params, {"exp_avg": torch.tensor(0.1), "foreign": foreign})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "grad": torch.zeros_like(p),
                    "lr": torch.zeros(()),
                    "param": torch.ones_like(p),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                s["lr"].add_(1)
                s["grad"].mul_(0.9).add_(p.grad)  # the momentum
                if group["foreign"]:
                    s["grad"].mul_(FOREIGN)
                p.sub_(s["grad"] * s["param"] * group["exp_avg"] / s["lr"])


def parameters(*sizes: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(n)) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return params


def captured(optimizer: Optimizer) -> Captured:
    """Capture as Dynamo traces one step of ``optimizer``."""
    found: list[Captured | StqError] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Any:
        try:
            found.append(capture(gm, optimizer))
        except StqError as error:
            found.append(error)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(inspect.unwrap(type(optimizer).step), backend=backend)(optimizer)
    (result,) = found
    if isinstance(result, StqError):
        raise result
    return result


@pytest.fixture(scope="module")
def step() -> Iterator[Captured]:
    """Two parameters in two groups, the second one with names."""
    first, second = parameters(3, 4)
    yield captured(Misleading([{"params": [("head", first)]}, {"params": [("tail", second)]}]))
    torch._dynamo.reset()


# Traced by Dynamo. ----------------------------------------------------------------------------


def test_roles_come_from_identity(step: Captured) -> None:
    (unit,) = step.program.units
    found = {(o.role, str(o.source), o.shape) for o in unit.operands}
    expected = {
        (Role.SCALAR, "param_groups[0]['exp_avg']", ()),
        (Role.SCALAR, "param_groups[1]['exp_avg']", ()),
    }
    for name, size in (("head", 3), ("tail", 4)):
        expected |= {
            (Role.PARAM, name, (size,)),
            (Role.GRAD, name, (size,)),
            (Role.STATE, f"{name}:grad", (size,)),
            (Role.STATE, f"{name}:param", (size,)),
            (Role.STATE, f"{name}:lr", ()),
        }
    assert {f for f in found if f[0] is not Role.SCALAR} == {
        e for e in expected if e[0] is not Role.SCALAR
    }
    # Groups made from one default share its tensor.
    assert {f for f in found if f[0] is Role.SCALAR} <= expected


def test_every_operand_says_where_it_is_read(step: Captured) -> None:
    (unit,) = step.program.units
    line = {str(o.source): o.location for o in unit.operands}
    assert re.fullmatch(r"test_capture\.py:\d+ s\[\"lr\"\]\.add_\(1\)", line["head:lr"])
    momentum = r"test_capture\.py:\d+ s\[\"grad\"\]\.mul_\(0\.9\)\.add_\(p\.grad\)"
    assert re.fullmatch(momentum, line["tail:grad"])
    assert line["head:grad"] == line["tail:grad"]


def test_nodes_keep_their_lines(step: Captured) -> None:
    (unit,) = step.program.units
    assert all(location_of(node).startswith("test_capture.py:") for node in unit.calls)


def test_the_program_is_valid_and_named_after_the_optimizer(step: Captured) -> None:
    verify(step.program, "capture")
    assert step.program.optimizer == "Misleading"


def test_examples_keep_no_tensor_alive(step: Captured) -> None:
    """A state that was packed since must be free to go."""
    for node in step.program.units[0].placeholders:
        example = node.meta["example"]
        assert example.is_meta or example.ndim == 0


def test_a_tensor_of_nobody_is_refused_with_its_line() -> None:
    with pytest.raises(UnknownInputError) as error:
        captured(Misleading(parameters(3), foreign=True))
    for part in ("Misleading", "(3,)", "test_capture.py:", 's["grad"].mul_(FOREIGN)'):
        assert part in str(error.value)


# By hand. -------------------------------------------------------------------------------------


class Traced:
    """A graph module as Dynamo makes it, built by hand."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()

    def attribute(self, name: str, value: Tensor) -> fx.Node:
        if isinstance(value, nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            setattr(self.root, name, value)
        return self.graph.get_attr(name)

    def argument(self, name: str, example: Any, source: str = "") -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["grapharg"] = SimpleNamespace(
            example=example, source=SimpleNamespace(name=source)
        )
        return node

    def captured(self, optimizer: Optimizer, *outputs: fx.Node) -> Captured:
        self.graph.output(tuple(outputs))
        return capture(fx.GraphModule(self.root, self.graph), optimizer)


def sgd(*sizes: int) -> tuple[torch.optim.SGD, list[nn.Parameter]]:
    params = parameters(*sizes)
    return torch.optim.SGD(params, lr=0.1), params


def test_bindings_are_the_live_objects_and_the_positions_of_arguments() -> None:
    optimizer, (p, q) = sgd(3, 4)
    traced = Traced()
    first, second = traced.argument("a", q.grad), traced.attribute("q", q)
    third, fourth = traced.argument("b", p.grad), traced.attribute("p", p)
    for target, value in ((second, first), (fourth, third)):
        traced.graph.call_method("add_", (target, value))
    result = traced.captured(optimizer)
    names = ["group0.param0", "group0.param1"]
    zero, one = (Source(i, name) for i, name in enumerate(names))
    assert result.bindings[(Role.GRAD, one)] == Argument(0)
    assert result.bindings[(Role.GRAD, zero)] == Argument(1)
    assert result.bindings[(Role.PARAM, zero)] is p
    assert result.bindings[(Role.PARAM, one)] is q


def test_a_float_that_became_an_input_is_a_scalar_with_its_expression() -> None:
    optimizer, (p,) = sgd(3)
    traced = Traced()
    example = torch.tensor(0.1, dtype=torch.float64)
    lr = traced.argument("lr", example, "L['self'].param_groups[0]['lr']")
    item = traced.graph.call_method("item", (lr,))
    traced.graph.call_method("mul_", (traced.attribute("p", p), item))
    (unit,) = traced.captured(optimizer).program.units
    scalar = unit.operands[0]
    assert (scalar.role, str(scalar.source)) == (Role.SCALAR, "param_groups[0]['lr']")
    assert scalar.name == "group_0_lr"
    assert scalar.dtype is torch.float64


def test_one_tensor_under_two_names_is_one_operand() -> None:
    optimizer, (p,) = sgd(3)
    traced = Traced()
    nodes = [traced.attribute(name, p) for name in ("once", "again")]
    for node in nodes:
        traced.graph.call_method("mul_", (node, 2))
    (unit,) = traced.captured(optimizer).program.units
    assert [o.name for o in unit.operands] == ["param_0"]
    assert [n.args[0] for n in unit.calls] == [unit.placeholders[0]] * 2


def test_attributes_are_remembered_by_name() -> None:
    optimizer, (p,) = sgd(3)
    state = torch.zeros(3)
    optimizer.state[p]["momentum_buffer"] = state
    traced = Traced()
    traced.graph.call_method("mul_", (traced.attribute("inner", state), 2))
    result = traced.captured(optimizer)
    source = Source(0, "group0.param0", "momentum_buffer")
    assert result.attributes == {(Role.STATE, source): "inner"}


def test_outputs_keep_their_positions() -> None:
    optimizer, (p,) = sgd(3)
    traced = Traced()
    node = traced.attribute("p", p)
    made = [traced.graph.call_method("mul", (node, k)) for k in (2, 3)]
    (unit,) = traced.captured(optimizer, *reversed(made)).program.units
    assert [o.args[1] for o in unit.outputs] == [3, 2]
    assert unit.instances[0].returns == (0, 1)


@pytest.mark.parametrize(
    ("example", "reason"), [("3", "it is a str"), (torch.ones(2, 2), r"a tensor of shape \(2, 2\)")]
)
def test_an_unknown_argument_is_refused_with_the_reason(example: Any, reason: str) -> None:
    optimizer, (p,) = sgd(3)
    traced = Traced()
    argument = traced.argument("size", example)
    node = traced.graph.call_method("mul_", (traced.attribute("p", p), argument))
    node.meta["stack_trace"] = '  File "a/odd.py", line 5, in step\n    p.mul_(n)\n'
    with pytest.raises(
        UnknownInputError, match=rf"SGD: graph input size .*{reason}[\s\S]*odd.py:5"
    ):
        traced.captured(optimizer)


def test_the_state_of_a_parameter_that_is_gone_is_not_known() -> None:
    optimizer, (p,) = sgd(3)
    stranger = torch.zeros(3)
    optimizer.state[torch.zeros(3)]["momentum_buffer"] = stranger
    traced = Traced()
    traced.graph.call_method("add_", (traced.attribute("p", p), traced.attribute("m", stranger)))
    with pytest.raises(UnknownInputError, match="graph input m "):
        traced.captured(optimizer)


def test_parameters_are_numbered_over_all_groups() -> None:
    a, b, c = parameters(1, 2, 3)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b, c]}], lr=0.1)
    assert [param_sources(optimizer)[id(p)] for p in (a, b, c)] == [
        Source(0, "group0.param0"),
        Source(1, "group1.param0"),
        Source(2, "group1.param1"),
    ]


def test_names_are_those_that_the_optimizer_was_given() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    assert [s.name for s in param_sources(optimizer).values()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
