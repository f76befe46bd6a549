"""In-place updates become values, and every operator becomes a core ATen one.

    buf.mul_(0.9).add_(grad)      ->    mul = aten.mul(buf, 0.9); add = aten.add(mul, grad)
    param.add_(buf, alpha=-0.1)         return (add, aten.add(param, aten.mul(add, -0.1)))
                                        # -> buf, param

torch does the work: ``make_fx`` over ``torch.func.functionalize`` on fake tensors. Hyperparameters
that are graph inputs enter as symbolic floats, so that no decomposition has to read one; where
one branches on such a value (``lerp`` picks a formula by its weight) it takes the branch of the
present value, and both branches are the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._dynamo.source import ConstantSource
from torch._inductor import inductor_prims
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, guard_or_true

from stq_compile.errors import UnsupportedOperatorError, UnsupportedOutputError
from stq_compile.passes.partition import (
    Supports,
    by_geometry,
    why_instance_unfused,
    why_unfused,
)
from stq_compile.step_graph import (
    Instance,
    Operand,
    Program,
    Role,
    Source,
    StepGraph,
    location_of,
)


def _fma(a: Tensor, b: Any, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once; ``prims.fma`` takes no symbolic float, ``add`` does."""
    if isinstance(b, torch.SymFloat):
        added: Any = torch.add
        summed: Tensor = added(c, a, alpha=b)  # torch's stub of it knows numbers only
        return summed
    fused: Tensor = inductor_prims.fma(a, b, c)
    return fused


def _times(a: Tensor, factor: Any) -> Tensor:
    """``a * factor``; a factor that may change is never dropped for being 1 just now."""
    return a if not isinstance(factor, torch.SymFloat) and factor == 1 else a.mul(factor)


def _in_float32(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Half-precision tensors are computed on in float32 and rounded once, as eager kernels do."""

    def compute(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.dtype not in (torch.bfloat16, torch.float16):
            return formula(first, *args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) else a for a in args]
        return formula(first.float(), *wide, **kwargs).to(first.dtype)

    return compute


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    if guard_or_true(abs(weight) < 0.5):  # of a weight that depends on data nothing is known
        return _fma(end - start, weight, start)
    return end - (end - start) * (1 - weight)  # type: ignore[no-any-return]


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return _fma(_times(a, value), b, x)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + _times(a, value) / b


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    value = source.to(target.dtype)
    return value if value.shape == target.shape else value.expand_as(target)


def _eye(
    rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None, **where: Any
) -> Tensor:
    """torch's counts rows in the narrowest type, ``uint16`` from 256 on, in which it cannot."""
    i, j = (torch.arange(n, **where) for n in (rows, rows if columns is None else columns))
    return (i.unsqueeze(-1) == j).to(dtype or torch.get_default_dtype())


DECOMPOSITIONS = {
    **core_aten_decompositions(),
    torch.ops.aten.lerp.Scalar: _in_float32(_lerp),
    torch.ops.aten.addcmul.default: _in_float32(_addcmul),
    torch.ops.aten.addcdiv.default: _in_float32(_addcdiv),
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.eye.default: _eye,
    torch.ops.aten.eye.m: _eye,
}
"""Core ATen, but for operators whose stock decomposition fails, leaves dead arithmetic behind or
rounds otherwise than the eager kernels do: these round as eager does, operation by operation."""

NOT_FUNCTIONALIZED = ("square_",)
"""Methods for which ``torch.func.functionalize`` has no rule."""

aten = torch.ops.aten
UNDEFINED = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
OVERWRITE = (
    *UNDEFINED,
    *(aten.full_like.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.fill.Scalar, aten.zero.default, aten.copy.default),
)
"""Factories of undefined values, and operators that ask them for nothing but their geometry."""

COPY = torch.ops.aten.copy_.default


def functionalize(
    program: Program, why_not: Supports = lambda node: "", exact: bool = False
) -> Program:
    """Functionalize and decompose every unit that still updates its inputs in place.

    Those that are no kernel are divided by shape, and traced for each (`partition`). With
    ``exact``, no unit is a kernel beside one whose operators are none: kernels may differ from the
    eager step in the last bit, and a product of matrices in bfloat16 makes much of a last bit.
    """

    def parts(supports: Supports) -> list[StepGraph]:
        return [p for unit in program.units for p in _parts(unit, program.optimizer, supports)]

    units = parts(why_not)
    beyond = any(why_unfused(unit, why_not) for unit in units)
    if exact and beyond and not all(unit.unfused for unit in units):
        units = parts(lambda node: "at 32 bits nothing is, beside what cannot be")
    return Program(program.optimizer, tuple(units))


def _parts(unit: StepGraph, optimizer: str, why_not: Supports) -> list[StepGraph]:
    if unit.writes is not None:
        return [unit]
    whole = _functionalize(unit, optimizer)
    misfits = {
        i for i, row in enumerate(whole.instances) if why_instance_unfused(row, whole.widened)
    }
    parts = []
    if why_unfused(whole, why_not):
        misfits = set(range(len(whole.instances)))
    elif len(misfits) < len(whole.instances):
        fitting = tuple(row for i, row in enumerate(whole.instances) if i not in misfits)
        parts.append(whole.replace(instances=fitting))
    if misfits:
        rows = tuple(row for i, row in enumerate(unit.instances) if i in misfits)
        for part in by_geometry(unit.replace(instances=rows)):
            traced = _functionalize(part, optimizer)
            row = traced.instances[0]
            reason = why_unfused(traced, why_not) or why_instance_unfused(row, traced.widened)
            plain = _functionalize(part, optimizer, {}) if reason else None
            parts.append(traced.replace(unfused=reason, plain=plain))
    return parts


def _functionalize(
    unit: StepGraph, optimizer: str, decompositions: Mapping[Any, Any] = DECOMPOSITIONS
) -> StepGraph:
    module = fx.GraphModule({}, unit.graph)
    inputs = fake_inputs(unit)

    def run(*args: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return _Interpreter(module, optimizer, unit).run(*args)

    # Without decompositions views stay: sums over a copy of one are added up in another order.
    remove = "mutations_and_views" if decompositions else "mutations"
    traced = make_fx(
        torch.func.functionalize(run, remove=remove),
        decomposition_table=decompositions,
        _allow_non_fake_inputs=True,
    )(*inputs)
    _check_sizes(traced.graph, optimizer)
    if not decompositions:
        _restore_fused(traced.graph)
    constants = fold_constants(traced)
    made = _collect_writes(unit, traced.graph, constants, numbers=bool(decompositions))
    for node in made.calls:
        if node.target in UNDEFINED and any(u.target not in OVERWRITE for u in node.users):
            raise UnsupportedOperatorError(
                optimizer=optimizer,
                source=unit.instances[0].param.source,
                operator=node.target,
                reason="what it leaves undefined is read before it is seen to be written",
                location=location_of(node),
            )
    return made


FUSED = {aten.mul.Tensor: aten.addcmul.default, aten.div.Tensor: aten.addcdiv.default}


def _restore_fused(graph: fx.Graph) -> None:
    """``fma(a / b, value, c)``, as Dynamo writes ``c.addcdiv(a, b, value=value)``, rounds otherwise
    than the operator does; the same for ``addcmul``."""
    for node in list(graph.nodes):
        inner = node.args[0] if node.target is inductor_prims.fma and node.args else None
        if not isinstance(inner, fx.Node) or inner.target not in FUSED or len(inner.users) > 1:
            continue
        _, value, addend = node.args
        tensors = (addend, *inner.args)
        if all(isinstance(t, fx.Node) for t in tensors) and not isinstance(value, fx.Node):
            node.target = FUSED[inner.target]
            node.args, node.kwargs = tensors, {"value": value}
            graph.erase_node(inner)


def _check_sizes(traced: fx.Graph, optimizer: str) -> None:
    """A value that the step stores has a size that is known before its values are."""
    for out in traced.output_node().all_input_nodes:
        shape = out.meta["val"].shape
        if not all(isinstance(size, int) for size in shape):
            raise UnsupportedOutputError(
                optimizer=optimizer,
                found="a tensor whose size depends on the values of others",
                location=location_of(out),
            )


class _Interpreter(fx.Interpreter):
    """Reading a hyperparameter (``lr.item()``) gives the symbolic float that stands for it.

    An in-place operator that torch does not functionalize (``square_``, and any with ``out=``)
    becomes the ordinary one and a copy. What cannot run here at all is refused with its line.
    """

    def __init__(self, module: fx.GraphModule, optimizer: str, unit: StepGraph) -> None:
        super().__init__(module)
        self.optimizer, self.unit = optimizer, unit

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except RuntimeError as error:  # what torch says of an operator that it cannot run here
            raise UnsupportedOperatorError(
                optimizer=self.optimizer,
                source=self.unit.instances[0].param.source,
                operator=n.target,
                reason=str(error).strip().split("\n")[0],
                location=location_of(n),
            ) from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = kwargs.get("out")
        if out is None:
            return super().call_function(target, args, kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "out"}
        value = super().call_function(target, args, rest)
        if isinstance(out, Tensor):
            return out.copy_(value)
        return type(value)(o.copy_(v) for o, v in zip(out, value, strict=True))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "item" and isinstance(args[0], torch.SymFloat):
            return args[0]
        if target in NOT_FUNCTIONALIZED:
            value = getattr(args[0], target.removesuffix("_"))(*args[1:], **kwargs)
            return args[0].copy_(value)
        return super().call_method(target, args, kwargs)


def fake_inputs(unit: StepGraph) -> list[Any]:
    """A fake tensor, or a symbolic float for a number that is read, for every placeholder."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    inputs: list[Any] = []
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        example = node.meta["example"]
        read = node.users and all(u.target == "item" for u in node.users)
        symbolic = isinstance(node.meta.get("val"), torch.SymFloat)
        if operand.number or symbolic or (example.ndim == 0 and read):
            source = ConstantSource(node.name)
            hint = float(example)
            symbol = shape_env.create_unspecified_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC
            )
            inputs.append(shape_env.create_symfloatnode(symbol, hint=hint, source=source))
            continue
        with mode:
            inputs.append(
                torch.empty_strided(example.size(), example.stride(), dtype=example.dtype)
            )
    return inputs


def fold_constants(module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Values of the nodes that depend on nothing but tensors made of numbers in the step's code."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function" and known.keys() >= set(node.all_input_nodes) != set():
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


def _literal(graph: fx.Graph, value: Any, numbers: bool) -> Any:
    """A constant as an argument; with ``numbers``, as a number if it has no dimension."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 and numbers:
        return value.item()
    return graph.call_function(torch.tensor, (value.tolist(),), {"dtype": value.dtype})


def _as_node(graph: fx.Graph, value: Any, traced: fx.Node) -> fx.Node:
    """What a step stores, of which `_literal` may have made a number."""
    node = value
    if not isinstance(value, fx.Node):
        options = {"dtype": traced.meta["val"].dtype}
        node = graph.call_function(aten.full.default, ([], value), options)
    node.meta.setdefault("val", traced.meta["val"])
    assert isinstance(node, fx.Node)
    return node


def _collect_writes(
    unit: StepGraph, traced: fx.Graph, constants: dict[fx.Node, Tensor], numbers: bool
) -> StepGraph:
    """Turn the trailing ``copy_`` into inputs, as functionalization leaves them, into outputs."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    written: dict[str, fx.Node] = {}
    returned: tuple[Any, ...] = ()
    names = iter(unit.placeholders)
    for node in traced.nodes:
        if node.op == "placeholder":
            original = next(names)
            env[node] = graph.placeholder(original.name)
            env[node].meta = {**node.meta, "example": original.meta["example"]}
        elif node in constants:
            env[node] = _literal(graph, constants[node], numbers)
        elif node.target is COPY and node.args[0].op == "placeholder":
            value = _as_node(graph, env[node.args[1]], node.args[1])
            written[env[node.args[0]].name] = env[node] = value
        elif node.op == "output":
            value = node.args[0]
            returned = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    created = _created_states(unit, graph, [_as_node(graph, env[r], r) for r in returned])
    written |= {operand.name: value for operand, value in created}
    graph.output(tuple(written.values()))
    graph.eliminate_dead_code()
    param, new = unit.instances[0].param, [operand for operand, _ in created]
    instances = tuple(_with_created(i, new, param) for i in unit.instances)
    return unit.replace(graph=graph, instances=instances, writes=tuple(written))


def _created_states(
    unit: StepGraph, graph: fx.Graph, values: list[fx.Node]
) -> list[tuple[Operand, fx.Node]]:
    """A write-only placeholder for every value that the step returns: a state that it creates."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    created = []
    for i, value in enumerate(values):
        fake = value.meta["val"]
        with graph.inserting_after(last):
            node = graph.placeholder(f"created_{i}")
        last = node
        node.meta = {"val": fake, "example": torch.empty((), dtype=fake.dtype).expand(fake.shape)}
        source = Source(unit.instances[0].param.source.param, "", f"created_{i}")
        dtype = fake.dtype
        if unit.widened:  # what the optimizer asked for
            dtype = getattr(unit.outputs[i].meta.get("example_value"), "dtype", dtype)
        operand = Operand(
            node.name, Role.STATE, source, tuple(fake.shape), tuple(fake.stride()), dtype
        )
        created.append((operand, value))
    return created


def _with_created(instance: Instance, created: list[Operand], traced: Operand) -> Instance:
    """``traced``: the parameter that the graph was traced with; other shapes are its own."""
    param = instance.param
    operands = []
    for operand, position in zip(created, instance.returns, strict=True):
        like_param = operand.shape != () and operand.shape == traced.whole_shape
        operands.append(
            replace(
                operand,
                source=Source(param.source.param, param.source.name, operand.source.key),
                shape=param.shape if like_param else operand.shape,
                stride=param.stride if like_param else operand.stride,
                returned=position,
                device=param.device,
                region=param.region if like_param else None,
            )
        )
    return Instance((*instance.operands, *operands))
