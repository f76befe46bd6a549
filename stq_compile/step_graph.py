"""`StepGraph`: the captured optimizer step, from the first pass to the last.

A `Program` is a tuple of step graphs. Right after capture it holds one, of the whole step;
splitting makes one per parameter, folding one per template. Each graph has placeholders only, one
`Operand` apiece, and any number of `instances`: rows of operands, one row per parameter that the
graph updates.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name, map_aggregate

from stq_compile.errors import InvalidGraphError
from stq_compile.formats import Format, MatrixKind
from stq_compile.shards import Region

CPU = torch.device("cpu")

PARAM_ERROR = "param_error"
"""Key of the error state of a compensated parameter; the optimizer itself does not have it."""
PARAM_ROUNDING = "param_rounding"
"""Key under which a parameter draws its random numbers."""


class Role(enum.StrEnum):
    """What a graph input is, found from the identity of the tensor and never from its name.

    ``INTERMEDIATE``: made in the step, between kernels and what runs by operators (`passes.cut`).
    """

    PARAM = "param"
    GRAD = "grad"
    STATE = "state"
    SCALAR = "scalar"
    CODES = "codes"
    SCALES = "scales"
    KEY = "key"
    SUMS = "sums"
    INTERMEDIATE = "intermediate"


@dataclass(frozen=True, order=True)
class Source:
    """Where an input lives: parameter number (over all groups), its name, and a key.

    ``key`` is the state's key, or for a scalar the expression that it came from; ``param`` is -1
    for a scalar that belongs to no single parameter.
    """

    param: int
    name: str
    key: str = ""

    def __str__(self) -> str:
        if self.param < 0:
            return self.key
        return f"{self.name}:{self.key}" if self.key else self.name


@dataclass(frozen=True)
class Operand:
    """One input of a step graph.

    ``value`` is set for a constant hoisted out of the graph. ``returned`` is set for a state that
    the step itself creates: its position in the step's outputs. Such a state is only written.
    ``number`` marks a Python number among the scalars, which are tensors otherwise. ``region`` is
    where the tensor lies in a sharded one: shape and strides are those of the local tensor.
    """

    name: str
    role: Role
    source: Source
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = CPU
    location: str = ""
    value: float | None = None
    returned: int = -1
    number: bool = False
    region: Region | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, of which a process may hold a part."""
        return self.shape if self.region is None else self.region.shape

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.whole_shape)

    @property
    def dtype_name(self) -> str:
        """``"float32"``."""
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> str:
        text = f"{self.role:<6} {self.dtype_name}{list(self.shape)} {self.source}"
        return text if self.value is None else f"{text} = {self.value!r}"


@dataclass(frozen=True)
class Instance:
    """One parameter's inputs, in placeholder order, and where its returned values go.

    ``returns`` holds, for each output that writes no input, its position in the step's outputs.
    """

    operands: tuple[Operand, ...]
    returns: tuple[int, ...] = ()

    @property
    def param(self) -> Operand:
        """The parameter, or what stands for it in a graph that leaves it alone."""
        for role in (Role.PARAM, Role.GRAD, Role.STATE):
            for operand in self.operands:
                if operand.role is role:
                    return operand
        raise InvalidGraphError(stage="instance", reason="no tensor of a parameter", graph=self)


@cache
def _function(formula: sympy.Expr, names: tuple[str, ...]) -> Callable[..., Tensor]:
    """A formula as a function of its symbols, in this order."""
    function: Callable[..., Tensor] = sympy.lambdify(names, formula, [{"sqrt": torch.sqrt}])
    return function


@dataclass(frozen=True)
class Recurrence:
    """How a state carries over: ``s' = decay * s + ...``.

    ``decay`` is an expression in the step's scalars and ``value`` what it was at the capture; both
    are None where the state does not enter its own update in an affine way.
    """

    kind: Literal["average", "sum", "maximum", "replaced", "unknown"]
    decay: sympy.Expr | None = None
    value: float | None = None

    @property
    def scalars(self) -> list[str]:
        """The placeholders that the decay is an expression in, in order; none for a constant."""
        return [] if self.decay is None else sorted(s.name for s in self.decay.free_symbols)

    def decay_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """The decay, 0-dim, at other values of its `scalars`."""
        names = tuple(self.scalars)
        return _function(self.decay, names)(*(values[name] for name in names))

    @property
    def amplification(self) -> float:
        """Variance at which noise of variance 1 a step settles: 1 / (1 - a^2); inf for a sum."""
        if self.value is None or abs(self.value) >= 1:
            return math.inf
        return 1 / (1 - self.value**2)


@dataclass(frozen=True)
class Facts:
    """What the graph proves about its states, by state key.

    ``nonnegative``: never below zero. ``normalizers``: the update divides the state by the root of
    another. ``fragile``: why an error in the state could break the step (root of a difference).
    ``recurrences``: how the state carries over from step to step. ``copies``: states that the step
    creates as copies of its parameter. ``matrices``: states whose new values are orthogonal, or
    symmetric and positive semidefinite if they were so before (`passes.matrices`). ``mixed``:
    states whose errors products mix and then something makes large (`passes.mixed`).
    """

    nonnegative: frozenset[str] = frozenset()
    normalizers: Mapping[str, str] = field(default_factory=dict)
    fragile: Mapping[str, str] = field(default_factory=dict)
    recurrences: Mapping[str, Recurrence] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    matrices: Mapping[str, MatrixKind] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StepGraph:
    """A graph over the operands of one instance, and all instances that it serves.

    ``writes`` is None while the graph updates its inputs in place; a functional graph returns a
    tuple, and ``writes[i]`` names the placeholder that output ``i`` replaces. ``formats`` holds the
    format behind each codes placeholder, ``regions`` the region of each node. ``unfused`` says why
    the graph is no kernel (`passes.partition`); it is empty for one that is. ``plain`` is then what
    runs: the same function in the eager step's own operators, which round as eager does, while
    ``graph`` is decomposed for the passes to look at. ``widened``: the graph is traced in float32,
    although the parameter has 16 bits (`passes.widen`).

    A region may be *cut* (`passes.cut`). The unit is then its kernel, ``rest`` is what remains to
    be run by operators, and ``whole`` the region as it was; both have the same parameters.
    ``feeds`` are further kernels, which make what the rest reads (`passes.feed`).
    """

    name: str
    graph: fx.Graph
    instances: tuple[Instance, ...]
    writes: tuple[str, ...] | None = None
    facts: Facts = Facts()
    formats: Mapping[str, Format] = field(default_factory=dict)
    regions: Mapping[str, str] = field(default_factory=dict)
    unfused: str = ""
    plain: StepGraph | None = None
    widened: bool = False
    rest: StepGraph | None = None
    whole: StepGraph | None = None
    feeds: tuple[StepGraph, ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands of the first instance, which stands for all."""
        return self.instances[0].operands if self.instances else ()

    @property
    def device(self) -> torch.device:
        """Where its parameters are; components of several devices are several templates."""
        return self.instances[0].param.device

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op.startswith("call")]

    @property
    def outputs(self) -> tuple[Any, ...]:
        (out,) = (n for n in self.graph.nodes if n.op == "output")
        value = out.args[0]
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    @cached_property
    def _operands_by_name(self) -> dict[str, Operand]:
        return {operand.name: operand for operand in self.operands}

    def operand_of(self, node: fx.Node) -> Operand:
        """The first instance's operand of a placeholder."""
        return self._operands_by_name[node.name]

    def run(self, *inputs: Any) -> Any:
        """Run the graph eagerly, inputs in placeholder order."""
        return fx.Interpreter(torch.nn.Module(), graph=self.graph).run(*inputs)

    def replace(self, **changes: Any) -> StepGraph:
        return dataclasses.replace(self, **changes)

    def of(self, instances: Collection[Instance]) -> StepGraph:
        """The unit for some of its parameters, with what belongs to it."""
        params = {instance.param.source for instance in instances}

        def kept(part: StepGraph | None) -> StepGraph | None:
            if part is None:
                return None
            return part.of([i for i in part.instances if i.param.source in params])

        return self.replace(
            instances=tuple(instances),
            plain=kept(self.plain),
            rest=kept(self.rest),
            whole=kept(self.whole),
        )

    @property
    def region(self) -> StepGraph | None:
        """The region that the unit is, or was before it was cut; None for a kernel."""
        return self if self.unfused else self.whole

    @property
    def parts(self) -> tuple[StepGraph, ...]:
        """All graphs that run in a step for its parameters: kernels, and what is none."""
        return (*self.feeds, *(() if self.rest is None else (self.rest,)), self)

    def rows(self) -> Iterator[tuple[StepGraph, Operand]]:
        """Every operand of every instance that is none of the step's own, with its graph.

        What the rest shares with the kernel is the kernel's.
        """
        own = [o for i in self.instances for o in i.operands if o.role is not Role.INTERMEDIATE]
        yield from ((self, operand) for operand in own)
        if self.rest is not None:
            known = {(o.role, o.source) for o in own}
            for operand in (o for instance in self.rest.instances for o in instance.operands):
                if (
                    operand.role is not Role.INTERMEDIATE
                    and (operand.role, operand.source) not in known
                ):
                    yield self.rest, operand

    def __str__(self) -> str:
        return "\n\n".join(print_graph(part) for part in self.parts)


@dataclass(frozen=True)
class Program:
    """The whole step at one stage of the pipeline."""

    optimizer: str
    units: tuple[StepGraph, ...]

    def __str__(self) -> str:
        return "\n\n".join(str(unit) for unit in self.units)

    def operands(self) -> Iterator[tuple[StepGraph, Operand]]:
        """Every operand of every instance, with its unit."""
        for unit in self.units:
            yield from unit.rows()

    def map(self, function: Callable[[StepGraph], StepGraph]) -> Program:
        """The function's result for every unit, and for the region that a cut one was."""
        units = (
            unit if unit.whole is None else unit.replace(whole=function(unit.whole))
            for unit in self.units
        )
        return Program(self.optimizer, tuple(map(function, units)))

    @property
    def nodes(self) -> int:
        return sum(len(part.calls) for unit in self.units for part in unit.parts)


def set_device(node: fx.Node, device: torch.device) -> None:
    """Let a node that names a device make its tensors on this one."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    node.args = map_aggregate(node.args, moved)
    named = {"device": device} if node.kwargs.get("device") is not None else {}
    node.kwargs = {**map_aggregate(node.kwargs, moved), **named}


def location_of(node: fx.Node) -> str:
    """``"adam.py:414 step_t += 1"``: the innermost line of the optimizer that made the node."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n([^\n]*)', node.stack_trace or "")
    if not frames:
        return ""
    file, line, text = frames[-1]
    return f"{Path(file).name}:{line} {text.split('  # ')[0].strip()}".strip()


def verify(program: Program, stage: str) -> None:
    """Check what every stage must keep; raises `InvalidGraphError` with the graph printed."""
    for part in (part for unit in program.units for part in unit.parts):
        reason = _defect(part)
        if reason:
            raise InvalidGraphError(stage=stage, reason=reason, graph=print_graph(part))


def _defect(unit: StepGraph) -> str:
    try:
        unit.graph.lint()
    except RuntimeError as error:
        return str(error)
    names = [n.name for n in unit.placeholders]
    if not unit.instances:
        return "no instance"
    for instance in unit.instances:
        if [o.name for o in instance.operands] != names:
            return f"operands {[o.name for o in instance.operands]} for placeholders {names}"
        if any(a.role is not b.role for a, b in zip(instance.operands, unit.operands, strict=True)):
            return "instances differ in the role of an operand"
    if any(n.op == "get_attr" for n in unit.graph.nodes):
        return "a get_attr node; inputs must be placeholders"
    if unit.writes is None:
        return ""
    if len(unit.writes) != len(unit.outputs):
        return f"{len(unit.writes)} writes for {len(unit.outputs)} outputs"
    if len(set(unit.writes)) != len(unit.writes) or not set(unit.writes) <= set(names):
        return f"writes {unit.writes} are not distinct placeholders"
    for node in unit.calls:
        schema = getattr(node.target, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        if mutable or (node.op == "call_method" and str(node.target).endswith("_")):
            return f"in-place node {node.name} in a functional graph"
    return ""


def print_graph(unit: StepGraph) -> str:
    """The graph as a Python function; runs where ``torch`` and ``operator`` are imported."""
    lines = [f"def {unit.name}("]
    many = f" (and {len(unit.instances) - 1} more)" if len(unit.instances) > 1 else ""
    described = {o.name: o.describe() for o in unit.operands}
    for node in unit.placeholders:
        lines.append(f"    {node.name},  # {described.get(node.name, 'no operand')}{many}")
    lines.append("):")
    for node in unit.calls:
        where = location_of(node)
        region = unit.regions.get(node.name)
        notes = "  ".join(part for part in (where, f"[{region}]" if region else "") if part)
        lines.append(f"    {node.name} = {_call(node)}" + (f"  # {notes}" if notes else ""))
    outputs = ", ".join(_literal(o) for o in unit.outputs)
    targets = "" if unit.writes is None else f"  # -> {', '.join(unit.writes)}"
    lines.append(f"    return ({outputs}{',' if len(unit.outputs) == 1 else ''}){targets}")
    return "\n".join(lines)


def _call(node: fx.Node) -> str:
    args = [_literal(a) for a in node.args]
    args += [f"{k}={_literal(v)}" for k, v in node.kwargs.items()]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    target: Any = node.target
    if node.op == "call_module":
        return f"{target}({', '.join(args)})"
    name = str(target) if isinstance(target, torch._ops.OpOverload) else _get_qualified_name(target)
    if isinstance(target, torch._ops.OpOverload):
        name = f"torch.ops.{name}"
    return f"{name.replace('_operator.', 'operator.')}({', '.join(args)})"


def _literal(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_literal(v) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not -1e308 < value < 1e308:
        return f"float({str(value)!r})"
    return repr(value)
