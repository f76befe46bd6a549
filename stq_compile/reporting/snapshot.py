"""A `Run` of a live optimizer as it stands: references only, written out when it is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from stq_compile.codegen.lower import bytes_per_element
from stq_compile.compiled_step import CompiledStep, StateInfo
from stq_compile.formats import BLOCK, FLOAT32
from stq_compile.nonfinite import Watch, nonfinite_elements
from stq_compile.options import Options
from stq_compile.packed_state import PackedState
from stq_compile.planner.planner import Planner, StateKey
from stq_compile.reporting.graph_data import graph_data
from stq_compile.reporting.run_file import KernelInfo, Row, Run, Template
from stq_compile.shards import local, split_blocks
from stq_compile.step_graph import PARAM_ERROR, Source


class Live(Protocol):
    """What is read of a session."""

    options: Options
    steps: int
    info: dict[StateKey, StateInfo]
    weights: set[StateKey]
    planner: Planner | None
    watch: Watch

    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def compiled(self) -> Iterable[CompiledStep]: ...
    @property
    def losses(self) -> Iterable[tuple[int, float]]: ...
    def states(self) -> Iterator[tuple[Tensor, Source, str, Any]]: ...


def run_of(live: Live) -> Run:
    """Everything that is known of the run so far."""
    step = max(live.compiled, key=lambda s: s.number, default=None)
    return Run(
        optimizer=type(live.optimizer).__name__,
        options=_plain(live.options),
        versions={"stq_compile": version("stq-compile"), "torch": torch.__version__},
        steps=live.steps,
        rows=rows_of(live),
        decisions=() if live.planner is None else live.planner.history.records,
        losses=tuple(live.losses),
        incidents=tuple(live.watch.incidents),
        comparisons=() if live.planner is None else tuple(live.planner.comparisons),
        templates=() if step is None else tuple(_templates(step)),
        kernels=() if step is None else tuple(_kernels(step)),
    )


def rows_of(live: Live) -> tuple[Row, ...]:
    """What every state occupies now; one that is in its parameter's own memory, nothing."""
    rows = []
    for param, source, key, value in live.states():
        if isinstance(value, Tensor):
            row = _row(source.name, key, value, _reason(live, (source.param, key)))
            if _in_memory_of(param, value):
                row = dataclasses.replace(
                    row, bytes=0, fp32_bytes=0, reason="in its parameter's memory"
                )
            rows.append(row)
    return tuple(rows)


def _in_memory_of(param: Any, value: Tensor) -> bool:
    """Whether a state is a view of its parameter, or was made its data (``p.data = state``)."""
    if not isinstance(param, Tensor) or isinstance(local(value), PackedState):
        return False
    ours, theirs = (int(local(t).untyped_storage().data_ptr()) for t in (value, param))
    return ours == theirs != 0


def _reason(live: Live, key: StateKey) -> str:
    """Why a state is wider than was asked for."""
    if key in live.weights:
        return "a copy of the weights"
    info = live.info.get(key)
    if info is None:
        return ""
    asked = live.options.width_of(info.source.name, info.source.key)
    widened = asked is not None and asked < info.format.width
    if widened and info.source.key in info.facts.mixed:
        return "products mix its errors"
    return info.reason


def _row(param: str, key: str, value: Tensor, reason: str) -> Row:
    held = local(value)
    packed = held.packed if isinstance(held, PackedState) else None
    format = FLOAT32 if packed is None else packed.format
    nbytes, split = value.numel() * value.element_size(), 0
    if packed is not None:
        split = split_blocks(value) * (format.nbytes(BLOCK) if format.blocked else 0)
        nbytes = packed.nbytes if held is value else format.nbytes(value.numel()) + split
    dtype = str(value.dtype).removeprefix("torch.")
    return Row(
        param,
        key,
        tuple(value.shape),
        dtype if packed is None else format.name,
        8 * value.element_size() if packed is None else format.width,
        nbytes,
        0 if key == PARAM_ERROR else 4 * value.numel(),  # float32 training has no such state
        reason,
        split,
        nonfinite_elements(value),
    )


def _templates(step: CompiledStep) -> Iterator[Template]:
    for unit in step.program.units:
        yield Template(unit.name, len(unit.instances), str(unit), graph_data(unit))


def _kernels(step: CompiledStep) -> Iterator[KernelInfo]:
    templates = [unit.name for unit in step.program.units]
    cut = (bucket for region in step.cut_regions for bucket in region.buckets)
    for bucket in (*step.buckets, *cut):
        unit = bucket.unit
        yield KernelInfo(
            unit.kernel.name,
            max((t for t in templates if unit.graph.name.startswith(t)), key=len),
            len(bucket.instances),
            sum(torch.Size(p.shape).numel() for p in bucket.params),
            bytes_per_element(unit.kernel),
            unit.compiled.source,
            str(unit.graph),
            graph_data(unit.graph),
        )


def _plain(options: Options) -> dict[str, Any]:
    """Options that are not the defaults, in types that JSON has; the file's own name is none."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name != "record":
            value = dict(value) if isinstance(value, Mapping) else value
            found[field.name] = value if isinstance(value, (int, float, dict)) else str(value)
    return found
