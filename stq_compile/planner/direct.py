"""Direct measurement: what quantizing a state at a width really does to the update, on a sample.

The law of `error_law` is an expectation under assumptions. Here, on a few blocks of every tensor,
each state is brought onto the grid of each width, moved by one step of the template and quantized
again, and the update is computed from the state before and after that; likewise for what the range
of the format cuts off, which is no noise and does not add up:

    q = Q(s);  s' = f(q, grad);    noise = u(Q(s')) - u(s');    cut = u(C(s)) - u(s)

The effect is ``noise^2`` times its persistence, as in the law, and ``cut^2``. All tensors with
equal scalars go through the template together, so a measurement costs some evaluations of it for
each state and width. Samples are small: they are measured on the CPU, wherever they come from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from stq_compile import reference
from stq_compile.error_law import TINY, persistence, range_ends
from stq_compile.formats import BLOCK, MIDRISE_CLIP, Format
from stq_compile.packed_state import PackedState, memory_order
from stq_compile.passes.measure import (
    amplification,
    formats_of,
    is_smooth,
    measured_states,
    scalars_of,
)
from stq_compile.passes.normalizers import Differentiable
from stq_compile.planner.factors import rounded
from stq_compile.rounding import NEAREST, Noise, step_key
from stq_compile.step_graph import Instance, Operand, Role, StepGraph

BLOCKS = 16
"""Blocks of a tensor that are measured for a calibration."""
FEW_BLOCKS = 2
"""And later, when predictions are only compared: a tenth of the work."""
WIDTHS = (2, 3, 4, 5, 6, 8)

Live = Callable[[Operand], Any]
"""The live object of an operand: a tensor, a packed state or a number."""


@dataclass
class _Sample:
    """The sampled elements of several tensors behind one another, and where each one's end.

    ``index`` numbers the sampled blocks as if all shards of the tensors were here, so that noise
    does not depend on the sharding.
    """

    instances: list[Instance]
    inputs: list[Any]
    counts: list[int]
    index: Tensor


Sums = dict[int, dict[str, float]]
"""By parameter number: ``direct``, the sum of the update's squares, and ``key:direct_w``, the sum
of the squares of what the error of state ``key`` at ``w`` bits does to it."""


def measure_directly(
    unit: StepGraph,
    live: Live,
    look: int,
    seed: int,
    rounding: str,
    widths: Sequence[int] = WIDTHS,
    blocks: int = BLOCKS,
) -> Sums:
    """Sums over the sampled blocks that are here; `perturbations` of the sums of all shards.

    Args:
        unit: a functional template.
        live: finds what an operand stands for; states as they are before the step.
        look: number of the look: another one takes other blocks.
        seed: of the rounding noise.
        rounding: ``"stochastic"`` or ``"nearest"``.
        widths: to quantize at.
        blocks: of every tensor, at most.
    """
    found: Sums = {}
    if not measured_states(unit) or unit.instances[0].param.name not in (unit.writes or ()):
        return found
    for sample in _samples(unit, live, look, blocks):
        template = _Template(unit, sample.inputs)
        params = [instance.param.source.param for instance in sample.instances]
        noises = _noises(sample, seed, look, rounding)
        per_tensor = _per_tensor(template.update().square(), sample.counts)
        for param, total in zip(params, per_tensor, strict=True):
            found[param] = {"direct": total}
        for operand in measured_states(unit):
            state = _StateOf(unit, operand, template, noises, rounding)
            for width in widths:
                effect = _per_tensor(state.effect(width), sample.counts)
                for param, total in zip(params, effect, strict=True):
                    found[param][f"{operand.source.key}:direct_{width}"] = total
    return found


def perturbations(
    sums: Mapping[int, Mapping[str, float]],
) -> dict[tuple[int, str], dict[int, float]]:
    """Relative perturbation of the update by state and width, from the sums of a whole tensor."""
    found: dict[tuple[int, str], dict[int, float]] = {}
    for param, totals in sums.items():
        update = rounded(totals.get("direct", 0.0))
        for name, effect in totals.items():
            key, _, width = name.partition(":direct_")
            if width and update > 0 and math.isfinite(effect):
                found.setdefault((param, key), {})[int(width)] = rounded(effect) / update
    return found


def _noises(sample: _Sample, seed: int, look: int, rounding: str) -> list[Noise]:
    if rounding == "nearest":
        return [NEAREST, NEAREST]
    return [Noise(step_key(seed, look, stream), sample.index) for stream in (0, 1)]


class _Template:
    """The step of a template on the sampled elements."""

    def __init__(self, unit: StepGraph, inputs: list[Any]) -> None:
        self.inputs = inputs
        self.scalars = scalars_of(unit, inputs)
        self.module = Differentiable(unit.graph)
        self.names = [n.name for n in unit.placeholders]
        self.writes = list(unit.writes or ())
        self.param = self.names.index(unit.instances[0].param.name)

    def run(self, **changed: Tensor) -> tuple[Any, ...]:
        row = [changed.get(n, x) for n, x in zip(self.names, self.inputs, strict=True)]
        results: tuple[Any, ...] = self.module.run(*row)
        return results

    def update(self, **changed: Tensor) -> Tensor:
        moved: Tensor = self.run(**changed)[self.writes.index(self.names[self.param])]
        moved = moved - self.inputs[self.param]
        return moved

    def value(self, name: str) -> Tensor:
        value: Tensor = self.inputs[self.names.index(name)]
        return value


class _StateOf:
    """One state of a template, quantized at each width in turn."""

    def __init__(
        self,
        unit: StepGraph,
        operand: Operand,
        template: _Template,
        noises: list[Noise],
        rounding: str,
    ) -> None:
        self.template = template
        self.name = operand.name
        self.noises = noises
        self.formats = formats_of(unit, operand.source.key)
        normalizer = unit.facts.normalizers.get(operand.source.key)
        by_key = {o.source.key: o.name for o in unit.operands}
        self.normalizer = None if normalizer is None else by_key[normalizer]
        self.nonnegative = operand.source.key in unit.facts.nonnegative
        self.smooth = is_smooth(unit, operand.name)
        recurrence = unit.facts.recurrences.get(operand.source.key)
        persistent = persistence(amplification(recurrence, template.scalars), rounding)
        self.persistence = float(persistent)

    def effect(self, width: int) -> Tensor:
        """The square of what the settled error does to the update, per element."""
        format, template = self.formats[width], self.template
        old = template.value(self.name)
        unit = None if self.normalizer is None else template.value(self.normalizer)
        on_grid = _quantized(old, format, self.noises[0], unit)
        results = template.run(**{self.name: on_grid})
        new = results[template.writes.index(self.name)]
        cut = template.update(**{self.name: _cut(old, format, unit)}) - template.update()
        if self.normalizer is not None and self.normalizer in template.writes:
            unit = results[template.writes.index(self.normalizer)]
        stored = _quantized(new, format, self.noises[1], unit)
        kept = self._kept(on_grid, new)
        if not self.smooth:  # the size of the error matters, and not only its square
            stored, kept = new + (stored - new) * kept.sqrt(), torch.ones_like(kept)
        if self.nonnegative:
            stored = stored.clamp_min(0.0)
        undisturbed = template.update(**{self.name: new})
        noise = (template.update(**{self.name: stored}) - undisturbed).square() * kept
        if self.nonnegative:  # an error in a divisor takes away an element's update at most
            noise = torch.minimum(noise, undisturbed.square())
        return noise + cut.square()

    def _kept(self, old: Tensor, new: Tensor) -> Tensor:
        if math.isfinite(self.persistence):
            return torch.full_like(new, self.persistence)
        several = 2 if self.noises[0].key is None else 4
        return new.abs() / (several * (new - old).abs()).clamp_min(TINY) + 1


def _quantized(x: Tensor, format: Format, noise: Noise, unit: Tensor | None) -> Tensor:
    unit = unit if format.normalized else None
    codes, scales = reference.encode(x, format, noise, unit)
    return reference.decode(codes, scales, format, x.numel(), unit)


def _cut(x: Tensor, format: Format, unit: Tensor | None) -> Tensor:
    """The values as far as the range of the format reaches, not rounded to its levels."""
    if format.kind == "adaptive_log":
        return torch.maximum(x, range_ends(x, format.width))
    if format.kind != "midrise" or format.width not in MIDRISE_CLIP:
        return x
    assert unit is not None
    root = unit.sqrt()
    value = torch.where(root > 0, x / root, 0.0).view(-1, BLOCK)
    limit = MIDRISE_CLIP[format.width] * value.square().mean(1, keepdim=True).sqrt()
    return torch.maximum(torch.minimum(value, limit), -limit).view(-1) * root


def _per_tensor(values: Tensor, counts: list[int]) -> list[float]:
    parts = torch.split(values.double(), counts)
    return [float(part.sum()) for part in parts]


def _samples(unit: StepGraph, live: Live, look: int, blocks: int) -> list[_Sample]:
    """Sampled elements, tensors of equal scalars together."""
    groups: dict[tuple[Any, ...], list[_Member]] = {}
    for instance in unit.instances:
        rows = _rows(instance.param.numel, look, blocks)
        if not len(rows):
            continue
        whole, (rows, places) = len(rows), _local_rows(instance.param, rows, look, blocks)
        inputs: list[Any] = []
        scalars: list[float] = []
        for operand, node in zip(instance.operands, unit.placeholders, strict=True):
            if operand.returned >= 0:  # what the step makes is not read
                inputs.append(0.0)
                continue
            value = live(operand) if operand.value is None else operand.value
            if operand.role is Role.SCALAR or operand.shape == ():
                inputs.append(_scalar(node, operand, value))
                scalars.append(float(value))
            else:
                inputs.append(_sampled(value, operand, instance.param, rows))
        groups.setdefault(tuple(scalars), []).append(_Member(instance, inputs, places, whole))
    return [_joined(members) for members in groups.values()]


@dataclass
class _Member:
    """One tensor's sample: ``places`` of its ``whole`` blocks that are sampled in all are here."""

    instance: Instance
    inputs: list[Any]
    places: Tensor
    whole: int


def _joined(members: list[_Member]) -> _Sample:
    columns = zip(*(m.inputs for m in members), strict=True)
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) and column[0].dim() else column[0]
        for column in columns
    ]
    starts = itertools.accumulate((m.whole for m in members), initial=0)
    index = torch.cat([m.places + start for m, start in zip(members, starts, strict=False)])
    counts = [len(m.places) * BLOCK for m in members]
    return _Sample([m.instance for m in members], joined, counts, index)


def _rows(numel: int, look: int, blocks: int) -> Tensor:
    """Whole blocks to be sampled, spread over the tensor."""
    whole = numel // BLOCK
    count = min(whole, blocks)
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    return (torch.arange(count) * whole // count + look) % whole


def _local_rows(param: Operand, rows: Tensor, look: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The blocks of a sample that lie in this process's shard, and their places in the sample.

    A shard whose blocks are its own samples those.
    """
    region = param.region
    if region is None:
        return rows, torch.arange(len(rows))
    numel = math.prod(param.shape)
    if not region.on_grid:
        rows = _rows(numel, look, blocks)
        return rows, torch.arange(len(rows))
    here = rows - region.first_block
    (places,) = torch.where((here >= 0) & (here < numel // BLOCK))
    return here[places], places


def _sampled(value: Any, operand: Operand, param: Operand, rows: Tensor) -> Tensor:
    if isinstance(value, PackedState):
        return _sampled_state(value, rows)
    tensor: Tensor = value.detach()
    if tensor.stride() != param.stride:
        tensor = torch.empty_strided(
            param.shape, param.stride, dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)
    flat = memory_order(tensor)
    return flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)[rows].reshape(-1).cpu()


def _sampled_state(state: PackedState, rows: Tensor) -> Tensor:
    """The values of some blocks, without decoding the others."""
    storage = state.packed
    numel = len(rows) * BLOCK
    if not storage.format.blocked:
        whole = storage.codes[: storage.numel // BLOCK * BLOCK].view(-1, BLOCK)
        flat, scales = whole[rows].reshape(-1).cpu(), storage.scales.cpu()
        return reference.decode(flat, scales, storage.format, numel)
    unit = None
    if storage.normalizer is not None:
        window = PackedState(storage.normalizer, state.size(), state.stride())
        unit = _sampled_state(window, rows)
    codes, scales = storage.codes[rows].cpu(), storage.scales[rows].cpu()
    return reference.decode(codes, scales, storage.format, numel, unit)


def _scalar(node: fx.Node, operand: Operand, value: Any) -> Any:
    """A number where the graph takes a symbolic float, else a 0-dim tensor of its type."""
    if isinstance(node.meta.get("val"), torch.SymFloat):
        return float(value)
    return torch.tensor(float(value), dtype=operand.dtype)
