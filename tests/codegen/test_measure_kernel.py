"""The measuring kernel beside the measuring graph that it was made from, run eagerly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from graphs import only, program, with_sizes
from kernels import Rig, compiled, differing, kernel_of, quantized, torch_threads
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.ir import Builder, KernelOperand, OperandKind
from stq_compile.codegen.verify import verify_kernel
from stq_compile.compiler import Unit
from stq_compile.errors import InvalidKernelError
from stq_compile.formats import BLOCK, FORMATS, Format
from stq_compile.packed_state import PackedState
from stq_compile.passes.measure import RANGE_SUMS, measure, slots_of
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.planner.factors import rounded
from stq_compile.pytest_plugin import Golden
from stq_compile.runtime import SPOILED, MeasuringBucket
from stq_compile.step_graph import Operand, Role, StepGraph
from zoo import adam, sgd

SIZES = (1, 127, 128, 129, 1000, 4096 + 17)
Formats = Mapping[str, Format]
MOMENTUM = {"momentum_buffer": FORMATS["softsign4"]}
PAIRS = [("midrise4", "adaptive_log3"), ("midrise2", "adaptive_log8")]
SLOW_PAIRS = [
    (first, second)
    for first in (
        "midrise2",
        "midrise3",
        "midrise4",
        "midrise5",
        "midrise6",
        "midrise8",
        "bfloat16",
        "float32",
    )
    for second in (*(f"adaptive_log{w}" for w in (2, 3, 4, 5, 6, 8)), "bfloat16")
] + [
    (first, "float32")  # no packed unit
    for first in (*(f"softsign{w}" for w in (2, 3, 4, 5, 6, 8)), "bfloat16", "float32")
]


def moments(first: str, second: str) -> Formats:
    named = {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}
    return {k: f for k, f in named.items() if f.name != "float32"}


def measuring(unit: StepGraph, sizes: Sequence[int] = SIZES) -> StepGraph:
    """The measuring graph of float32 states, of one instance per size."""
    analysed = find_recurrences(find_normalizers(find_ranges(program(with_sizes(unit, sizes)))))
    return only(measure(analysed, "stochastic"))


class Looks:
    """Live tensors in the formats, and the measuring kernel on them."""

    def __init__(self, unit: StepGraph, formats: Formats, sizes: Sequence[int] = SIZES) -> None:
        keys = [o.source.key for o in unit.operands if o.role is Role.STATE and o.shape != ()]
        every = {**dict.fromkeys(keys, FORMATS["float32"]), **formats}
        first = every.get("exp_avg")
        normalizers = {"exp_avg": "exp_avg_sq"} if first is not None and first.normalized else {}
        self.rig = Rig.__new__(Rig)
        self.rig.formats, self.rig.rounding, self.rig.normalizers = every, "stochastic", normalizers
        self.rig.rows = [self.rig._row(i, n) for i, n in enumerate(sizes)]
        plain = measuring(unit, sizes)
        self.slots = slots_of(plain)
        self.graph = quantized(plain, formats, "nearest")
        self.kernel = kernel_of(self.graph)
        verify_kernel(self.kernel)
        self.bucket = MeasuringBucket(
            Unit(self.graph, self.kernel, compiled(self.kernel)), self._resolve
        )
        self.unit, self.sizes = unit, sizes

    def _resolve(self, operand: Operand) -> object:
        return None if operand.role is Role.SUMS else self.rig._resolve(operand)

    def looked_at(self) -> dict[int, dict[str, float]]:
        """The sums by parameter number, of those that are not left out."""
        self.bucket.strides = [1] * len(self.sizes)
        self.bucket.fill((), {})
        found = self.bucket.look(0)
        return {i: sums for i, sums in found.items() if not sums[SPOILED]}

    def look(self, stride: int = 1, offset: int = 0, threads: int = 1) -> list[dict[str, float]]:
        self.bucket.strides = [stride] * len(self.sizes)
        with torch_threads(threads):
            self.bucket.fill((), {})
            found = self.bucket.look(offset)
        rows = [found[i] for i in range(len(self.sizes))]
        return [{k: v for k, v in row.items() if k != SPOILED} for row in rows]

    def eager(self, i: int) -> dict[str, float]:
        """The float32 graph on the decoded states of tensor ``i``."""
        row = self.rig.rows[i]
        one = self.unit
        for node in one.placeholders:
            if node.meta["example"].dim():
                node.meta["example"] = torch.empty(self.sizes[i], device="meta")
        graph = measuring(one, [self.sizes[i]])
        values = {
            Role.PARAM: row.param, Role.GRAD: row.grad, Role.SUMS: torch.empty(0),
        }  # fmt: skip
        states = {
            k: s.dequantize() if isinstance(s, PackedState) else s for k, s in row.states.items()
        }
        args = [
            states[o.source.key] if o.role is Role.STATE else values[o.role] for o in graph.operands
        ]
        return dict(zip(self.slots, graph.run(*args)[0].tolist(), strict=True))


def assert_near(
    got: Mapping[str, float], expected: Mapping[str, float], relative: float = 1e-4
) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # A mean over a block's log2 may be near 0, and a flag may stand at its border.
        slack = 1e-4 * got["count"] if ":error_" not in name and ":" in name else 0.0
        assert got[name] == pytest.approx(value, rel=relative, abs=max(slack, 1e-30)), name


def total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(p[name] for p in parts) for name in parts[0]}


@pytest.fixture(scope="module")
def adam_looks() -> Looks:
    return Looks(adam(), moments(*PAIRS[0]))


@pytest.fixture(scope="module")
def sgd_looks() -> Looks:
    return Looks(sgd(), MOMENTUM, (*SIZES, 1024 * BLOCK + 77))


def test_the_kernel_equals_the_graph(adam_looks: Looks) -> None:
    for i, got in enumerate(adam_looks.look()):
        assert_near(got, adam_looks.eager(i))


@pytest.mark.parametrize("second", ["adaptive_log4", "bfloat16", "float32"])
def test_elements_below_the_range(second: str) -> None:
    """One giant in each block of a second moment: the others lie below its range, or at its end."""
    looks = Looks(adam(), moments("softsign4" if second == "float32" else "midrise4", second))
    for row in looks.rig.rows:
        squares = torch.rand(row.param.numel()) + 0.1
        squares[::BLOCK] = 1e9
        row.states["exp_avg_sq"].copy_(squares)
    for i, got in enumerate(looks.look()):
        expected = looks.eager(i)
        assert_near(got, expected)
        ends = {n: v for n, v in expected.items() if ":end_" in n}
        assert len(ends) == len(RANGE_SUMS)
        assert all(v > 0 for v in ends.values()) or looks.sizes[i] == 1
        for name, value in ends.items():
            assert got[name] == pytest.approx(value, rel=1e-4)


def test_softsign(sgd_looks: Looks) -> None:
    for i, got in enumerate(sgd_looks.look()):
        assert_near(got, sgd_looks.eager(i))


@pytest.mark.parametrize(("first", "second"), PAIRS[1:])
def test_clipped_states(first: str, second: str) -> None:
    looks = Looks(adam(), moments(first, second))
    for i, got in enumerate(looks.look()):
        assert_near(got, looks.eager(i))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), SLOW_PAIRS)
def test_every_pair_that_may_be_in_force(first: str, second: str) -> None:
    looks = Looks(adam(), moments(first, second), (129, 1000))
    for i, got in enumerate(looks.look()):
        assert_near(got, looks.eager(i))


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_all_offsets_of_a_stride_add_up_to_the_whole(sgd_looks: Looks, stride: int) -> None:
    whole = sgd_looks.look()
    parts = [sgd_looks.look(stride, offset) for offset in range(stride)]
    for i, expected in enumerate(whole):
        assert_near(total([p[i] for p in parts]), expected, 1e-9)
        blocks = -(-sgd_looks.sizes[i] // BLOCK)
        for offset, part in enumerate(parts):
            numbers = range(offset, blocks, stride)
            assert part[i]["count"] == sum(
                min(BLOCK, sgd_looks.sizes[i] - b * BLOCK) for b in numbers
            )


def test_two_threads_find_the_same(sgd_looks: Looks) -> None:
    one, two = sgd_looks.look(threads=1), sgd_looks.look(threads=2)
    for a, b in zip(one, two, strict=True):
        assert {k: rounded(v) for k, v in a.items()} == {k: rounded(v) for k, v in b.items()}


def test_it_writes_nothing_but_sums(adam_looks: Looks) -> None:
    before = adam_looks.rig.bits()
    grads = [row.grad.clone() for row in adam_looks.rig.rows]
    adam_looks.look()
    assert not differing(adam_looks.rig.bits(), before)
    for row, grad in zip(adam_looks.rig.rows, grads, strict=True):
        assert torch.equal(row.grad, grad)
    written = [o.kind for o in adam_looks.kernel.operands if o.written]
    assert written == [OperandKind.SUMS]


@pytest.mark.parametrize("stride", [1, 3])
def test_shards_add_up(sgd_looks: Looks, stride: int) -> None:
    """Four shards of the last tensor: a shard's first block has an index in the whole tensor."""
    bucket = sgd_looks.bucket
    whole = sgd_looks.look(stride, 1)[-1]
    row = bucket.table[-1].copy()
    columns = {k.name: i for i, k in enumerate(sgd_looks.kernel.operands)}
    blocks = -(-sgd_looks.sizes[-1] // BLOCK)
    cuts = [0, 200, 501, 777, blocks]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        shard = row.copy()
        for operand in sgd_looks.kernel.operands:
            size = {OperandKind.FLOATS: 4 * BLOCK, OperandKind.CODES: 16 * operand.width}
            size |= {OperandKind.WORDS: 2}
            shard[columns[operand.name]] += start * size.get(operand.kind, 0)
        sums = np.zeros(len(bucket.slots))
        shard[columns["sums"]] = sums.ctypes.data
        shard[len(columns)] = min(stop * BLOCK, sgd_looks.sizes[-1]) - start * BLOCK
        shard[len(columns) + 1] = start
        shard[-2], shard[-1] = stride, 1 % stride
        kernel = bucket.unit.compiled
        kernel.run(shard[None], 0, 1, kernel.scratch(1, 1))
        parts.append(dict(zip(bucket.slots, sums.tolist(), strict=True)))
    assert_near(total(parts), whole, 1e-9)


SPECIAL = [0.0, 1e-42, -1e-38, 1e19, -3e38, math.inf, -math.inf, math.nan]


def test_gradients_at_the_edge_of_float32_give_finite_sums_or_none(adam_looks: Looks) -> None:
    """A tensor whose sampled gradients, or their sum, are not finite is left out of the look."""
    kept = [row.grad.clone() for row in adam_looks.rig.rows]
    try:
        for special in SPECIAL:
            for row, grad in zip(adam_looks.rig.rows, kept, strict=True):
                row.grad.copy_(grad)
                row.grad[::5] = special
            found = adam_looks.looked_at()
            finite = {
                i for i, row in enumerate(adam_looks.rig.rows) if math.isfinite(row.grad.sum())
            }
            assert found.keys() == finite
            for sums in found.values():
                assert all(map(math.isfinite, sums.values())), special
    finally:
        for row, grad in zip(adam_looks.rig.rows, kept, strict=True):
            row.grad.copy_(grad)


# The intermediate representation. -------------------------------------------------------------


def accumulating(*, elements: bool = False, slots: tuple[int, ...] = (0, 1)) -> Builder:
    b = Builder("sums", [
        KernelOperand("x", OperandKind.FLOATS),
        KernelOperand("sums", OperandKind.SUMS, written=True),
    ])  # fmt: skip
    x = b.read("load", "x")
    value = x if elements else b.reduce("block_sum", x)
    for slot in slots:
        b.store("accumulate", "sums", value, slot=slot)
    return b


def test_the_verifier_accepts_sums_and_refuses_what_is_none() -> None:
    verify_kernel(accumulating().kernel)
    with pytest.raises(InvalidKernelError, match="stores a ELEMENT value in the BLOCK space"):
        verify_kernel(accumulating(elements=True).kernel)
    with pytest.raises(InvalidKernelError, match="second store to sums"):
        verify_kernel(accumulating(slots=(1, 1)).kernel)


def test_emission_is_deterministic_and_does_not_depend_on_the_tensors() -> None:
    few, many = (
        emit(kernel_of(quantized(measuring(sgd(), sizes), MOMENTUM, "nearest")))
        for sizes in ((7,), (5, 300, 20))
    )
    assert few == many


def test_sgd_measuring(stq_golden: Golden) -> None:
    stq_golden(emit(kernel_of(quantized(measuring(sgd(), (300,)), MOMENTUM, "nearest"))), ".cpp")
