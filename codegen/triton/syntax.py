"""How the kernel IR reads in Triton: one template per opcode, names and literals.

Every operation is one IEEE operation: divisions and roots are the correctly rounded ones, and
nothing is contracted to a fused multiply-add but what the IR says (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import keyword
import math

import numpy as np

from stq_compile.codegen.ir import OperandKind, Type

_OPERATORS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "{0} == 0",
}

_SHARED: dict[str, str] = {
    **_OPERATORS,
    "fma": "tl.fma({0}, {1}, {2})",
    "select": "tl.where({0}, {1}, {2})",
    "abs": "tl.abs({0})",
    "floor": "tl.floor({0})",
    "fraction": "({0} - tl.floor({0}))",
    "ceil": "tl.ceil({0})",
    "min": "tl.minimum({0}, {1})",
    "max": "tl.maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "maximum": "maximum({0}, {1})",
    "copysign": "copysign({0}, {1})",
    "sign": "sign({0})",
}

TEMPLATES: dict[str, str] = {
    **_SHARED,
    "div": "{0} / {1}",
    "quotient": "quotient({0}, {1})",
    "sqrt": "tl.sqrt({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    "pow": "power({0}, {1}).to(tl.float32)",
    "int_select": "tl.where({0}, {1}, {2})",
    "int_add": "{0} + {1}",
    "int_sub": "{0} - {1}",
    "int_mul": "{0} * {1}",
    "int_and": "{0} & {1}",
    "int_or": "{0} | {1}",
    "int_min": "tl.minimum({0}, {1})",
    "int_max": "tl.maximum({0}, {1})",
    "int_lt": "{0} < {1}",
    "int_eq": "{0} == {1}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
    "bits_of": "{0}.to(tl.int32, bitcast=True)",
    "from_bits": "{0}.to(tl.float32, bitcast=True)",
    "to_float": "{0}.to(tl.float32)",
    "to_int": "{0}.to(tl.int32)",
}
"""The element space: float32, int32, masks. A quotient or root of the graph is within 2 ulps."""

BLOCK_TEMPLATES = {**TEMPLATES, "div": "tl.div_rn({0}, {1})", "sqrt": "tl.sqrt_rn({0})"}
"""The block space: correctly rounded, since scales decide on 128 codes."""

WIDE_TEMPLATES: dict[str, str] = {
    **_SHARED,
    "div": "{0} / {1}",
    "sqrt": "tl.sqrt({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "pow": "power({0}, {1})",
}
"""The tensor space: float64, one lane per tensor."""

LIBRARY_ARGUMENTS = ("minimum", "maximum", "copysign", "sign", "exp", "log", "pow")
"""Opcodes whose templates take tensors only, so that a literal must be made one."""

ELEMENT_TYPES = {
    "float32": "tl.float32",
    "bfloat16": "tl.bfloat16",
    "float16": "tl.float16",
}
"""The element types of operands in memory; kernels compute in float32."""

SCALAR_TYPES = {**ELEMENT_TYPES, "float64": "tl.float64"}
"""The types of scalars in memory."""

DTYPES = {Type.FLOAT: "tl.float32", Type.INT: "tl.int32", Type.BOOL: "tl.int1"}
"""The types of values."""

POINTEES = {
    OperandKind.HALVES: "tl.uint16",
    OperandKind.BYTES: "tl.int8",
    OperandKind.CODES: "tl.uint8",
    OperandKind.WORDS: "tl.uint16",
}

LIBRARY = (
    "block_key",
    "block_max",
    "block_squares",
    "block_sum",
    "copysign",
    "elements_left",
    "exp",
    "gather_codes",
    "load_codes",
    "load_word",
    "log",
    "maximum",
    "minimum",
    "plane",
    "planes_of",
    "pointer",
    "power",
    "quotient",
    "random",
    "random24",
    "sign",
    "slot_float",
    "step_key",
    "store_codes",
    "store_word",
    "unpack",
    "valid_count",
)
"""What generated code may import from `stq_compile.codegen.triton.library`."""

RESERVED = frozenset(
    (
        *keyword.kwlist,
        *keyword.softkwlist,
        *LIBRARY,
        *("tl", "triton", "range", "float", "int", "bool", "tuple", "print", "len", "min", "max"),
        *("abs", "tile", "update", "scalars", "table", "tiles", "slots", "slot", "row", "rows"),
        *("chunk", "stride", "element", "sums", "measure", "step"),
        *("first", "numel", "clock", "live", "local", "lane", "offset", "count", "block", "p", "i"),
        *(
            "present",
            "inside",
            "key",
            "index",
            "borders",
            "group",
            "program",
            "BLOCKS",
            "VECTOR",
            "ALIGNMENT",
            "ROWS",
            "CHUNKS",
        ),
    )
)


def python_name(name: str) -> str:
    """``name`` where the generated module lets it stand."""
    return f"{name}_value" if name in RESERVED else name


def float_literal(x: float) -> str:
    """The float32 nearest to ``x``; out of its range, infinity."""
    with np.errstate(over="ignore"):
        x = float(np.float32(x))
    return _literal(x, str(np.float32(x)))


def double_literal(x: float) -> str:
    return _literal(float(x), repr(float(x)))


def _literal(x: float, text: str) -> str:
    if math.isinf(x) or math.isnan(x):
        return f'float("{x}")'
    return text if "." in text or "e" in text else f"{text}.0"
