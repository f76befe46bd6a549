"""From a quantized step graph to a kernel: one lowering per operator, listed in `LOWERINGS`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor import inductor_prims

from stq_compile.codegen import halves, measure
from stq_compile.codegen.expand import (
    CODE_STORES,
    Stored,
    code_kind,
    decode,
    decode_block,
    encode,
)
from stq_compile.codegen.ir import (
    STORES,
    Argument,
    Builder,
    Kernel,
    KernelOperand,
    OperandKind,
    Space,
    Value,
)
from stq_compile.codegen.verify import verify_kernel
from stq_compile.errors import DuplicateLoweringError
from stq_compile.formats import FORMATS
from stq_compile.halves import HALVES
from stq_compile.passes.compensate import PARAM_ERROR_OP, WITH_ERROR
from stq_compile.passes.partition import element_nodes
from stq_compile.passes.quantize import DEQUANTIZE, QUANTIZE
from stq_compile.passes.round_params import ROUND_PARAM
from stq_compile.step_graph import Role, StepGraph, location_of

Lowering = Callable[[Builder, tuple[Any, ...], dict[str, Any]], Any]
"""(builder, lowered arguments, keyword arguments) -> a value, or a number if it is constant."""

aten = torch.ops.aten
FACTORS = torch.ops.stq.factors.default
LOWERINGS: dict[Any, Lowering] = {}
RESIDENT_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
"""Of a scalar that a kernel reads where it lies."""


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Register the lowering of operators; a second one for the same operator is an error."""

    def register(lowering: Lowering) -> Lowering:
        for target in targets:
            if target in LOWERINGS:
                raise DuplicateLoweringError(operator=target)
            LOWERINGS[target] = lowering
        return lowering

    return register


def why_not(node: fx.Node) -> str:
    """Why ``node`` cannot be lowered; empty if it can."""
    if node.target is operator.getitem and node.all_input_nodes[0].target in (QUANTIZE, FACTORS):
        return ""
    if node.target not in (DEQUANTIZE, QUANTIZE, *LOWERINGS):
        return "it is not a pointwise operator that the kernel IR knows"
    for value in (node.meta.get("val"), *(a.meta.get("val") for a in node.all_input_nodes)):
        if isinstance(value, torch.Tensor) and value.dtype not in (
            torch.float32,
            torch.float64,
            torch.bool,
        ):
            return f"its values are {value.dtype}; only float32 is supported"
    return ""


def lower(unit: StepGraph, *, resident: bool = False) -> Kernel:
    """Lower a functional, quantized, partitioned unit to a verified kernel.

    ``resident``: hyperparameters that are tensors on the parameters' device are read by the kernel;
    otherwise the host reads them and passes numbers.
    """
    elements = element_nodes(unit)
    there = _resident(unit) if resident else set()
    operands = _operands(unit, elements, there)
    b = Builder(unit.name, operands)
    env: dict[fx.Node, Any] = {}
    states = _stored(unit)
    for node, operand, slot in zip(unit.placeholders, unit.operands, operands, strict=True):
        b.origin = f"{node.name}  {operand.role}"
        env[node] = _read(b, node, operand.role, slot.kind)
    for node in unit.calls:
        where = location_of(node)
        b.origin = f"{node.name}  {where}" if where else node.name
        env[node] = _lower_node(b, node, env, states)
        b.rename(env[node], node.name)
    roles = {o.name: o.role for o in unit.operands}
    for target, out in zip(unit.writes or (), unit.outputs, strict=True):
        b.origin = f"-> {target}"
        _write(b, target, roles[target], env[out])
    kernel = _without_dead_code(b.kernel)
    kernel.summary = _summary(unit, kernel)
    verify_kernel(kernel)
    return kernel


def _resident(unit: StepGraph) -> set[str]:
    """The scalars that are tensors beside the parameters, of one type in all instances."""
    found = set()
    columns = zip(*(instance.operands for instance in unit.instances), strict=True)
    for node, column in zip(unit.placeholders, columns, strict=True):
        tensors = all(o.role is Role.SCALAR and not o.number and o.value is None for o in column)
        there = all(o.shape == () and o.device == unit.device for o in column)
        dtypes = {o.dtype for o in column}
        if tensors and there and len(dtypes) == 1 and dtypes <= RESIDENT_DTYPES:
            found.add(node.name)
    return found


def _operands(unit: StepGraph, elements: set[fx.Node], resident: set[str]) -> list[KernelOperand]:
    kinds = {
        Role.SCALAR: OperandKind.NUMBER,
        Role.KEY: OperandKind.KEY,
        Role.SCALES: OperandKind.WORDS,
        Role.CODES: OperandKind.CODES,
        Role.SUMS: OperandKind.SUMS,
    }
    operands = []
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        default = OperandKind.FLOATS if node in elements else OperandKind.SCALAR
        if operand.role is Role.INTERMEDIATE and operand.number:
            default = OperandKind.NUMBER
        kind = default if node.name in resident else kinds.get(operand.role, default)
        width = 0
        if kind is OperandKind.CODES:
            width = unit.formats[node.name].width
            kind = code_kind(unit.formats[node.name])
        dtype = "float32"
        if kind is OperandKind.FLOATS or node.name in resident:
            dtype = operand.dtype_name
        written = node.name in (unit.writes or ())
        operands.append(KernelOperand(node.name, kind, written, width, dtype))
    return operands


def _stored(unit: StepGraph) -> dict[str, Stored]:
    """The packed state behind each codes placeholder."""
    names = {n.name for n in unit.placeholders}
    stored = {}
    for codes, format in unit.formats.items():
        stem = codes.removesuffix("_codes")
        key = f"{stem}_key" if f"{stem}_key" in names else None
        stored[codes] = Stored(codes, f"{stem}_scales", key, format)
    return stored


def _read(b: Builder, node: fx.Node, role: Role, kind: OperandKind) -> Value | None:
    if role in (Role.CODES, Role.SCALES, Role.KEY, Role.SUMS):
        return None
    if kind is OperandKind.NUMBER:
        return b.read("argument", node.name)
    return b.read("load" if kind is OperandKind.FLOATS else "load_scalar", node.name)


def _lower_node(
    b: Builder, node: fx.Node, env: dict[fx.Node, Any], states: dict[str, Stored]
) -> Any:
    args: Any = fx.map_arg(node.args, env.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, env.__getitem__)
    if node.target is DEQUANTIZE:
        b.prefix = f"{node.name}_"
        return _dequantize(b, node, args, states)
    if node.target is QUANTIZE:
        b.prefix = f"{node.name}_"
        value, normalizer, format = args[:3]
        _, _, _, key, *before = node.args
        stored = Stored("", "", key.name if isinstance(key, fx.Node) else None, FORMATS[format])
        words = [b.read("load_word", n.name, name="word") for n in before if isinstance(n, fx.Node)]
        return encode(b, value, stored, normalizer, *words)
    if node.target is ROUND_PARAM:
        b.prefix = f"{node.name}_"
        key = node.args[2].name if isinstance(node.args[2], fx.Node) else None
        return halves.rounded(b, args[0], HALVES[args[1]], key)
    b.prefix = ""
    if node.target is operator.getitem:
        return args[0][args[1]]
    return LOWERINGS[node.target](b, args, kwargs)


def _dequantize(
    b: Builder, node: fx.Node, args: tuple[Any, ...], states: dict[str, Stored]
) -> Value:
    codes, word, normalizer, format = args[:4]
    source = node.args[0]
    if isinstance(source, fx.Node) and source.name in states:
        return decode(b, states[source.name], normalizer)
    if FORMATS[format].kind == "bfloat16":
        return b.op("from_bits", b.op("shift_left", codes, 16))
    return decode_block(b, codes, word, FORMATS[format], normalizer)


def _write(b: Builder, target: str, role: Role, value: Any) -> None:
    operand = b.kernel.operand(target)
    if role is Role.SCALES:
        if value is not None:
            b.store("store_word", target, value)
    elif role is Role.SUMS:
        for slot, total in enumerate(value):
            b.store("accumulate", target, total, slot=slot)
    elif role is Role.CODES:
        b.store(CODE_STORES[operand.kind], target, value, width=operand.width)
    else:
        b.store("store_scalar" if operand.kind is OperandKind.SCALAR else "store", target, value)


def _without_dead_code(kernel: Kernel) -> Kernel:
    live: set[int] = set()
    for value in reversed(kernel.body):
        if value.opcode in STORES or id(value) in live:
            live.add(id(value))
            live.update(id(a) for a in value.args if isinstance(a, Value))
    kernel.body = [v for v in kernel.body if id(v) in live]
    return kernel


def bytes_per_element(kernel: Kernel) -> float:
    """Bytes that the kernel moves per element: reads, and writes as one pass each."""
    whole = (OperandKind.FLOATS, OperandKind.HALVES, OperandKind.BYTES)
    size = {OperandKind.WORDS: 2.0 / 128}
    loads = ("load", "load_half", "load_byte", "unpack", "load_word")
    reads = {v.operand for v in kernel.body if v.opcode in loads}
    total = 0.0
    for operand in kernel.operands:
        each = operand.bytes if operand.kind in whole else size.get(operand.kind, 0.0)
        each = operand.width / 8 if operand.kind is OperandKind.CODES else each
        total += each * ((operand.name in reads) + operand.written)
    return total


def _summary(unit: StepGraph, kernel: Kernel) -> str:
    formats = ", ".join(
        f"{codes.removesuffix('_codes')} {f.name}" for codes, f in unit.formats.items()
    )
    return (
        f"{unit.name}: {formats or 'float32 states'}; "
        f"{bytes_per_element(kernel):.2f} bytes per element"
    )


# The operators. -----------------------------------------------------------------------------


def _simple(opcode: str) -> Lowering:
    def lowering(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return b.op(opcode, *args)

    return lowering


for _opcode, _targets in {
    "mul": (aten.mul.Tensor, aten.mul.Scalar, operator.mul),
    "neg": (aten.neg.default, operator.neg),
    "abs": (aten.abs.default, operator.abs),
    "sqrt": (aten.sqrt.default, torch.sym_sqrt),
    "exp": (aten.exp.default,),
    "log": (aten.log.default,),
    "sign": (aten.sign.default, aten.sgn.default),
    "floor": (aten.floor.default,),
    "ceil": (aten.ceil.default,),
    "maximum": (aten.maximum.default, torch.sym_max),
    "minimum": (aten.minimum.default, torch.sym_min),
    "lt": (aten.lt.Tensor, aten.lt.Scalar),
    "le": (aten.le.Tensor, aten.le.Scalar),
    "gt": (aten.gt.Tensor, aten.gt.Scalar),
    "ge": (aten.ge.Tensor, aten.ge.Scalar),
    "eq": (aten.eq.Tensor, aten.eq.Scalar),
    "ne": (aten.ne.Tensor, aten.ne.Scalar),
    "and": (aten.logical_and.default, aten.bitwise_and.Tensor),
    "or": (aten.logical_or.default, aten.bitwise_or.Tensor),
    "not": (aten.logical_not.default, aten.bitwise_not.default),
    "select": (aten.where.self,),
}.items():
    lowers(*_targets)(_simple(_opcode))


def _alpha(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Argument:
    return kwargs.get("alpha", args[2] if len(args) > 2 else 1)  # type: ignore[no-any-return]


@lowers(aten.add.Tensor, aten.add.Scalar, operator.add)
def _add(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``a + alpha * b``, fused as in torch's CPU kernel."""
    alpha = _alpha(args, kwargs)
    if not isinstance(alpha, Value) and alpha == 1:
        return b.op("add", *args[:2])
    return b.op("fma", args[1], alpha, args[0])


@lowers(aten.sub.Tensor, aten.sub.Scalar, operator.sub)
def _sub(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    alpha = _alpha(args, kwargs)
    if not isinstance(alpha, Value) and alpha == 1:
        return b.op("sub", *args[:2])
    negative = b.op("neg", alpha) if isinstance(alpha, Value) else -alpha
    return b.op("fma", args[1], negative, args[0])


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _sub(b, (args[1], args[0], *args[2:]), kwargs)


@lowers(inductor_prims.fma)
def _fma(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``a * b + c`` rounded once.

    Dynamo writes ``c.addcmul(x, y, value=v)`` as ``fma(x * y, v, c)``, torch's CPU kernel computes
    ``fma(v * x, y, c)``. The latter is the eager result, and matters where ``c - x * y`` cancels.
    """
    product, factor, addend = args
    number = not isinstance(factor, Value) or factor.space is Space.TENSOR
    if number and isinstance(product, Value) and product.opcode == "mul":
        x, y = product.args
        return b.op("fma", b.op("mul", x, factor), y, addend)
    return b.op("fma", *args)


@lowers(aten.div.Tensor, aten.div.Scalar, operator.truediv)
def _div(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``a / b``; elements divided by a tensor's own scalar become a product.

    The reciprocal is taken in float64 once per tensor, so the product is within an ulp of the
    quotient, and a division per element is saved.
    """
    dividend, divisor = args
    per_element = isinstance(dividend, Value) and dividend.space is Space.ELEMENT
    if per_element and isinstance(divisor, Value) and divisor.space is Space.TENSOR:
        return b.op("mul", dividend, b.op("div", 1.0, divisor))
    return b.op("div", dividend, divisor)


@lowers(aten.reciprocal.default)
def _reciprocal(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.op("div", 1.0, args[0])


@lowers(aten.rsqrt.default)
def _rsqrt(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.op("div", 1.0, b.op("sqrt", args[0]))


@lowers(aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor, operator.pow)
def _pow(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, exponent = args
    if exponent == 2:
        return b.op("mul", base, base)
    if exponent == 0.5:
        return b.op("sqrt", base)
    return b.op("pow", base, exponent)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def _clamp(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    value: Argument = args[0]
    if low is not None:
        value = b.op("maximum", value, low)
    return value if high is None else b.op("minimum", value, high)


@lowers(aten.clone.default, aten.alias.default, aten.alias_copy.default, aten.expand.default)
@lowers(aten.detach.default, aten.detach_copy.default, aten.copy.default, torch.sym_float)
def _same(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value itself; of ``copy(target, source)``, the source."""
    return args[1] if len(args) > 1 and isinstance(args[1], Value) else args[0]


@lowers(aten._to_copy.default)
def _to_copy(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A conversion to a floating type; masks become 1 and 0."""
    return b.number(args[0])


@lowers(aten.full.default, aten.full_like.default)
def _full(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1]


@lowers(aten.scalar_tensor.default)
def _scalar_tensor(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


@lowers(aten.zeros_like.default)
def _zeros_like(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return 0.0


@lowers(aten.ones_like.default)
def _ones_like(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return 1.0


# Parameters of 16 bits. ----------------------------------------------------------------------


@lowers(WITH_ERROR)
def _with_error(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    param, error, dtype = args
    return halves.with_error(b, param, error, HALVES[dtype])


@lowers(PARAM_ERROR_OP)
def _param_error(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, rounded, dtype = args
    return halves.error_of(b, x, rounded, HALVES[dtype])


# What measuring graphs consist of. ---------------------------------------------------------


@lowers(torch.ops.stq.settled_error.default)
def _settled_error(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    old, new, normalizer, format, persistence, rounding = args
    return measure.settled_error(b, old, new, normalizer, FORMATS[format], persistence, rounding)


@lowers(torch.ops.stq.range_end.default)
def _range_end(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return measure.range_end(b, args[0])


@lowers(FACTORS)
def _factors(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return measure.factors(b, *args)


@lowers(torch.ops.stq.sums.default)
def _sums(b: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return measure.sums(b, args[0])


__all__ = ["LOWERINGS", "bytes_per_element", "lower", "lowers", "why_not"]
