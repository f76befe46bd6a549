"""How the kernel IR reads in C++: one template per opcode, names, types and literals."""

from __future__ import annotations

import math

import numpy as np

from stq_compile.codegen.ir import KernelOperand, OperandKind, Space, Type, Value

TEMPLATES: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "quotient": "{0} / {1}",
    "neg": "-({0})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "stq::logical_not({0})",
    "int_select": "stq::select({0}, {1}, {2})",
    "int_add": "{0} + {1}",
    "int_sub": "{0} - {1}",
    "int_mul": "{0} * {1}",
    "int_and": "{0} & {1}",
    "int_or": "{0} | {1}",
    "int_min": "stq::min({0}, {1})",
    "int_max": "stq::max({0}, {1})",
    "int_lt": "{0} < {1}",
    "int_eq": "{0} == {1}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
    **{name: f"stq::{name}({{0}}, {{1}}, {{2}})" for name in ("fma", "select")},
    **{
        name: f"stq::{name}({{0}}, {{1}})"
        for name in ("min", "max", "minimum", "maximum", "pow", "copysign", "lookup")
    },
    **{name: f"stq::{name}({{0}})" for name in ("abs", "sqrt", "exp", "log", "sign")},
    **{name: f"stq::{name}({{0}})" for name in ("floor", "fraction", "ceil", "to_float", "to_int")},
    **{name: f"stq::{name}({{0}})" for name in ("bits_of", "from_bits")},
}

POINTERS = {
    OperandKind.HALVES: "uint16_t*",
    OperandKind.BYTES: "int8_t*",
    OperandKind.CODES: "uint8_t*",
    OperandKind.WORDS: "uint16_t*",
    OperandKind.SCALAR: "float*",
    OperandKind.NUMBER: "double",
    OperandKind.KEY: "uint64_t",
    OperandKind.SUMS: "double*",
}

ELEMENTS = {"float32": "float", "bfloat16": "stq::bfloat16", "float16": "stq::float16"}
"""Element types of operands in memory; kernels compute in float32."""


def pointer(o: KernelOperand) -> str:
    """The type of an operand's field."""
    return f"{ELEMENTS[o.dtype]}*" if o.kind is OperandKind.FLOATS else POINTERS[o.kind]


# fmt: off
RESERVED = frozenset((
    # C++
    "alignas", "alignof", "and", "asm", "auto", "bitand", "bitor", "bool", "break", "case",
    "catch", "char", "class", "compl", "concept", "const", "constexpr", "continue", "default",
    "delete", "do", "double", "else", "enum", "explicit", "export", "extern", "false", "float",
    "for", "friend",
    "goto", "if", "inline", "int", "long", "mutable", "namespace", "new", "noexcept", "not",
    "nullptr", "operator", "or", "private", "protected", "public", "register", "requires", "return",
    "short", "signed", "sizeof", "static", "struct", "switch", "template", "this", "throw", "true",
    "try", "typedef", "typename", "union", "unsigned", "using", "virtual", "void", "volatile",
    "while", "xor",
    # names of the generated code
    "blocks", "count", "first", "first_block", "index", "j", "numel", "p", "row", "run", "s",
    "scalars", "size", "std", "step", "stq", "stride", "offset", "tail", "tile", "totals",
    "held", "before", "finish",
))
# fmt: on


def c_type(v: Value) -> str:
    """Type of a block, table or element value."""
    if v.space is Space.BLOCK:
        return "stq::f32b" if v.type is Type.FLOAT else "stq::i32b"
    return "stq::f32v" if v.type is Type.FLOAT else "stq::i32v"


def c_name(name: str) -> str:
    """``name`` where C++ lets it stand; without a small letter it may be a macro (NULL)."""
    return f"{name}_value" if name in RESERVED or name.upper() == name else name


def int_literal(x: float) -> str:
    return str(int(x))


def double_literal(x: float) -> str:
    x = float(x)
    if math.isinf(x) or math.isnan(x):
        return {"inf": "INFINITY", "-inf": "-INFINITY"}.get(str(x), "NAN")
    return repr(x)


def float_literal(x: float) -> str:
    """The float32 nearest to ``x``; out of its range, infinity."""
    with np.errstate(over="ignore"):
        x = float(np.float32(x))
    if math.isinf(x) or math.isnan(x):
        return {"inf": "INFINITY", "-inf": "-INFINITY"}.get(str(x), "NAN")
    text = str(np.float32(x))
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
