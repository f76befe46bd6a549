"""Packed states enter as codes and leave as codes.

A state ``s`` that is to be kept in a format becomes the inputs ``s_codes``, ``s_scales`` and (for
stochastic rounding) ``s_key``. The reads of ``s`` become one ``stq::dequantize`` and its write one
``stq::quantize``:

    s_new = f(s)   # -> s      =>      s = stq.dequantize(s_codes, s_scales, ...)
                                       s_new = f(s)
                                       q = stq.quantize(s_new, ...)   # -> s_codes, s_scales

What measures its range from the scale that a block had (``adaptive_log``) is given ``s_scales``.

A normalized format is decoded in units of another state as it *was* stored, and encoded in units
of that state as it *will be* stored, which fixes an order: the normalizer first.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from stq_compile import ops  # noqa: F401  (registers the operators)
from stq_compile.formats import FLOAT32, ULP8, Format
from stq_compile.halves import HALF_DTYPES
from stq_compile.options import Rounding
from stq_compile.step_graph import PARAM_ERROR, Instance, Operand, Program, Role, StepGraph

FormatOf = Callable[[Operand, StepGraph], Format | None]
"""The format of one instance's state; None (or float32) leaves it an ordinary tensor."""

DEQUANTIZE = torch.ops.stq.dequantize.default
QUANTIZE = torch.ops.stq.quantize.default


def insert_quantize(program: Program, format_of: FormatOf, rounding: Rounding) -> Program:
    """One unit per template and assignment of formats, with its reads and writes quantized.

    Regions stay as they are: their states are decoded before them and encoded after them. One that
    was cut is whole again where it has no packed state: it runs in the eager step's operators.
    """
    units = []
    for unit in program.units:
        if unit.unfused:
            units.append(unit)
            continue
        groups: dict[tuple[Format | None, ...], list[Instance]] = defaultdict(list)
        for instance in unit.instances:
            groups[_assignment(instance, unit, format_of)].append(instance)
        for formats, instances in groups.items():
            part = unit.of(instances)
            if part.whole is not None and not any(formats):
                units.append(part.whole)
            else:
                units.append(_insert(part, formats, rounding))
    return Program(program.optimizer, tuple(units))


def _assignment(
    instance: Instance, unit: StepGraph, format_of: FormatOf
) -> tuple[Format | None, ...]:
    """The format of each operand of an instance; None where it stays an ordinary tensor."""
    formats: list[Format | None] = []
    for operand in instance.operands:
        format = None
        if operand.role is Role.STATE:
            error = operand.source.key == PARAM_ERROR
            format = ULP8 if error else format_of(operand, unit)
        formats.append(None if format == FLOAT32 else format)
    return tuple(formats)


def _insert(unit: StepGraph, formats: tuple[Format | None, ...], rounding: Rounding) -> StepGraph:
    packed = {o.name: f for o, f in zip(unit.operands, formats, strict=True) if f is not None}
    key_of = {o.name: o.source.key for o in unit.operands}
    parts = [unit.name, *(f"{key_of[n]}_{f.name}" for n, f in packed.items())]
    name = re.sub(r"\W", "_", "_".join(parts))
    if unit.widened:
        unit = unit.replace(instances=tuple(_in_float32(i) for i in unit.instances))
    if not packed:
        return unit.replace(name=name)
    name_of = {o.source.key: o.name for o in unit.operands if o.role is Role.STATE}
    normalizer_of = {
        n: name_of[unit.facts.normalizers[key_of[n]]] for n, f in packed.items() if f.normalized
    }
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, dict[str, fx.Node]] = {}
    for node in unit.placeholders:
        if node.name in packed:
            inputs[node.name] = _placeholders(graph, node.name, rounding)
        else:
            env[node] = graph.node_copy(node)
    old = {n.name: n for n in unit.placeholders}
    results = dict(zip(unit.writes or (), unit.outputs, strict=True))
    normalizers_first = sorted(packed, key=lambda n: n in normalizer_of)

    for n in normalizers_first:
        divisor = old.get(normalizer_of.get(n, ""))
        env[old[n]] = _dequantize(
            graph, inputs[n], packed[n], None if divisor is None else env[divisor], old[n], n
        )
    for node in unit.calls:
        env[node] = graph.node_copy(node, env.__getitem__)

    stored = {n: env[value] for n, value in results.items()}
    stored |= {n: env[old[n]] for n in normalizer_of.values() if n not in results}
    outputs = {n: env[value] for n, value in results.items() if n not in packed}
    for n in normalizers_first:
        if n not in results:
            continue
        divisor_value = stored.get(normalizer_of.get(n, ""))
        codes, scales = _quantize(graph, env[results[n]], divisor_value, packed[n], inputs[n])
        outputs |= {inputs[n]["codes"].name: codes, inputs[n]["scales"].name: scales}
        if n in normalizer_of.values():
            new = {"codes": codes, "scales": scales}
            stored[n] = _dequantize(graph, new, packed[n], None, old[n], f"{n}_stored")
    graph.output(tuple(outputs.values()))
    graph.eliminate_dead_code()
    return unit.replace(
        name=name,
        graph=graph,
        instances=tuple(_expanded(i, inputs, packed) for i in unit.instances),
        writes=tuple(outputs),
        formats={inputs[n]["codes"].name: f for n, f in packed.items()},
    )


def _in_float32(instance: Instance) -> Instance:
    """The operands with the types that they have in memory: states of a widened graph that are not
    packed are packed states all the same, of format float32."""
    operands = tuple(
        replace(o, dtype=torch.float32)
        if o.role is Role.STATE and o.shape != () and o.dtype in HALF_DTYPES
        else o
        for o in instance.operands
    )
    return replace(instance, operands=operands)


def _placeholders(graph: fx.Graph, name: str, rounding: Rounding) -> dict[str, fx.Node]:
    parts = ("codes", "scales", "key") if rounding == "stochastic" else ("codes", "scales")
    return {part: graph.placeholder(f"{name}_{part}") for part in parts}


def _dequantize(
    graph: fx.Graph,
    pair: dict[str, fx.Node],
    format: Format,
    normalizer: fx.Node | None,
    state: fx.Node,
    name: str,
) -> fx.Node:
    example = state.meta["example"]
    size, stride = list(example.size()), list(example.stride())
    arguments: tuple[Any, ...] = (
        pair["codes"], pair["scales"], normalizer, format.name, size, stride,
    )  # fmt: skip
    node = graph.create_node("call_function", DEQUANTIZE, arguments, name=name)
    node.meta["val"] = state.meta.get("val")
    return node


def _quantize(
    graph: fx.Graph,
    value: fx.Node,
    normalizer: fx.Node | None,
    format: Format,
    inputs: dict[str, fx.Node],
) -> tuple[fx.Node, fx.Node]:
    before = (inputs["scales"],) if format.kind == "adaptive_log" else ()
    arguments = (value, normalizer, format.name, inputs.get("key"), *before)
    name = inputs["codes"].name.removesuffix("_codes") + "_new"
    pair = graph.create_node("call_function", QUANTIZE, arguments, name=name)
    pair.meta = {k: value.meta[k] for k in ("stack_trace",) if k in value.meta}
    return (
        graph.call_function(operator.getitem, (pair, 0)),
        graph.call_function(operator.getitem, (pair, 1)),
    )


def _expanded(
    instance: Instance, inputs: dict[str, dict[str, fx.Node]], packed: dict[str, Format]
) -> Instance:
    """The instance's operands with each packed state replaced by its codes, scales and key."""
    roles = {"codes": Role.CODES, "scales": Role.SCALES, "key": Role.KEY}
    operands: list[Operand] = []
    for operand in instance.operands:
        if operand.name not in packed:
            operands.append(operand)
            continue
        for part, node in inputs[operand.name].items():
            code = {"bfloat16": torch.int16, "ulp": torch.int8}.get(
                packed[operand.name].kind, torch.uint8
            )
            dtype = {"codes": code, "scales": torch.int16, "key": torch.int64}[part]
            shape = () if part == "key" else operand.shape
            operands.append(
                replace(operand, name=node.name, role=roles[part], dtype=dtype, shape=shape)
            )
    return replace(instance, operands=tuple(operands))
