"""`PackedState`: every operation gives what it would give on the dequantized tensor."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stq_compile import reference
from stq_compile.errors import FormatMismatchError, NegativeStateError, TracingError
from stq_compile.formats import CONSTANT, FLOAT32, FORMATS, Format
from stq_compile.packed_state import PackedState, is_dense, memory_order
from stq_compile.rounding import NEAREST
from stq_compile.storage import PackedStorage

CASES = settings(deadline=None, derandomize=True, database=None, max_examples=60)
SOFTSIGN8, LOG8 = FORMATS["softsign8"], FORMATS["adaptive_log8"]
ROWS, COLUMNS = 6, 50  # two full blocks and a tail

Op = Callable[[Any, Tensor], Any]


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pack(values: Tensor, format: Format = SOFTSIGN8) -> PackedState:
    return PackedState.pack(values, format, rounding="nearest")


# A state and the part of it that an operation gets, always [6, 50].
GEOMETRIES: dict[str, tuple[Callable[[], Tensor], Callable[[Any], Any]]] = {
    "contiguous": (lambda: random(ROWS, COLUMNS), lambda x: x),
    "column-major": (lambda: random(COLUMNS, ROWS).t(), lambda x: x),
    "rows of a larger state": (lambda: random(ROWS + 2, COLUMNS), lambda x: x[1:-1]),
    "transposed view": (lambda: random(COLUMNS, ROWS), lambda x: x.t()),
}
by_geometry = pytest.mark.parametrize("geometry", list(GEOMETRIES))


def outcome(op: Op, *args: Any) -> Any:
    """The result, or the type of the exception: a wrong call must fail on both sides."""
    torch.manual_seed(5)
    try:
        return op(*args)
    except (RuntimeError, IndexError) as error:
        return type(error)


def assert_same(found: Any, expected: Any) -> None:
    assert isinstance(found, (type(expected), Tensor))
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.size() == expected.size()
        assert found.stride() == expected.stride()
        dense = found.dequantize() if isinstance(found, PackedState) else found
        assert torch.equal(dense, expected)
    else:
        assert found == expected


# Reading ------------------------------------------------------------------------------------

READS: dict[str, Op] = {
    "add": lambda x, y: x + y,
    "rsub": lambda x, y: 2 - x,
    "mul from a dense tensor": lambda x, y: y * x,
    "div": lambda x, y: x / (y.abs() + 1),
    "addcmul": lambda x, y: torch.addcmul(x, y, x, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(y, x, y.abs() + 1, value=-0.1),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "abs, sqrt": lambda x, y: x.abs().sqrt(),
    "pow": lambda x, y: x**2,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "maximum": lambda x, y: torch.maximum(x, y),
    "softmax": lambda x, y: x.softmax(-1),
    "sum": lambda x, y: x.sum(),
    "mean of rows": lambda x, y: x.mean(dim=1, keepdim=True),
    "max with positions": lambda x, y: tuple(x.max(dim=0)),
    "norm": lambda x, y: torch.linalg.vector_norm(x),
    "var": lambda x, y: x.var(dim=0),
    "cumsum": lambda x, y: x.cumsum(1),
    "sort": lambda x, y: tuple(x.sort(dim=1)),
    "topk": lambda x, y: tuple(x.topk(3)),
    "argmax": lambda x, y: x.argmax(),
    "less": lambda x, y: x < y,
    "equal numbers": lambda x, y: x == x,
    "isfinite": lambda x, y: x.isfinite().all(),
    "torch.equal": lambda x, y: torch.equal(x, y),
    "allclose": lambda x, y: torch.allclose(x, x + 1e-9),
    "mm": lambda x, y: x @ y.t(),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
    "cat": lambda x, y: torch.cat([x, y, x]),
    "stack": lambda x, y: torch.stack([x, x]),
    "rows by index": lambda x, y: x[torch.tensor([3, 1, 1])],
    "mask": lambda x, y: x[x > 0],
    "gather": lambda x, y: x.gather(1, torch.zeros(2, 3, dtype=torch.int64)),
    "flip": lambda x, y: x.flip(0),
    "repeat": lambda x, y: x.repeat(2, 1),
    "reshape": lambda x, y: x.reshape(3, -1),
    "flatten": lambda x, y: x.flatten(),
    "flatten of a transpose": lambda x, y: x.t().flatten(),
    "contiguous": lambda x, y: x.contiguous(),
    "contiguous transpose": lambda x, y: x.t().contiguous(),
    "clone": lambda x, y: x.clone(),
    "clone into rows": lambda x, y: x.clone(memory_format=torch.contiguous_format),
    "clone of an expanded view": lambda x, y: x[:1].expand(4, COLUMNS).clone(),
    "float64": lambda x, y: x.to(torch.float64),
    "half": lambda x, y: x.half(),
    "int": lambda x, y: x.to(torch.int32),
    "float": lambda x, y: x.float(),
    "zeros_like": lambda x, y: torch.zeros_like(x),
    "new_full": lambda x, y: x.new_full((3,), 2.0),
    "foreach add": lambda x, y: torch._foreach_add([x, y], 1.0),
    "foreach norm": lambda x, y: torch._foreach_norm([x, x]),
    "vmap": lambda x, y: torch.func.vmap(lambda row: row * 2)(x),
    "numpy": lambda x, y: x.numpy().tolist(),
    "asarray": lambda x, y: np.asarray(x).sum().item(),
    "tolist": lambda x, y: x.tolist(),
    "item": lambda x, y: (x[2, 3].item(), float(x[2, 3]), bool(x[0, 0] > 9)),
    "iteration": lambda x, y: [row.sum() for row in x],
    "wrong shape": lambda x, y: x + torch.ones(7),
    "flat view": lambda x, y: x.view(-1),
}


@by_geometry
@pytest.mark.parametrize("op", READS.values(), ids=list(READS))
def test_reading_gives_what_the_dequantized_tensor_gives(op: Op, geometry: str) -> None:
    make, part = GEOMETRIES[geometry]
    base, y = pack(make()), random(ROWS, COLUMNS, seed=1)
    dense = base.dequantize()
    expected = outcome(op, part(dense), y)
    assert_same(outcome(op, part(base), y), expected)
    assert base.packed.version == 1, "reading must not write"


# Writing ------------------------------------------------------------------------------------

INDEX = torch.tensor([4, 0])
WRITES: dict[str, Op] = {
    "add_": lambda x, y: x.add_(y, alpha=2),
    "+=": lambda x, y: x.__iadd__(1.5),
    "mul_": lambda x, y: x.mul_(0.9),
    "div_": lambda x, y: x.div_(y.abs() + 1),
    "lerp_": lambda x, y: x.lerp_(y, 0.1),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.1),
    "addcdiv_ by itself": lambda x, y: x.addcdiv_(y, x.abs() + 1),
    "clamp_": lambda x, y: x.clamp_(-0.2, 0.4),
    "fill_": lambda x, y: x.fill_(0.75),
    "zero_": lambda x, y: x.zero_(),
    "normal_": lambda x, y: x.normal_(),
    "copy_": lambda x, y: x.copy_(y),
    "copy_ with broadcast and cast": lambda x, y: x.copy_(y[0].double()),
    "copy_ of its own rows": lambda x, y: x.copy_(x.flip(0)),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, 3.0),
    "mask assignment": lambda x, y: x.__setitem__(x > 0, 0.0),
    "row assignment": lambda x, y: x.__setitem__(2, y[0]),
    "strided assignment": lambda x, y: x.__setitem__((slice(1, 3), slice(0, None, 2)), 5.0),
    "index assignment": lambda x, y: x.__setitem__(INDEX, y[:2]),
    "index_add_": lambda x, y: x.index_add_(0, INDEX, y[:2]),
    "scatter_": lambda x, y: x.scatter_(0, INDEX[None, :], 9.0),
    "out=": lambda x, y: torch.add(y, y, out=x),
    "out= an input": lambda x, y: torch.maximum(x, y, out=x),
    "foreach mul_": lambda x, y: torch._foreach_mul_([x], 0.5),
    "foreach lerp_": lambda x, y: torch._foreach_lerp_([x], [y], 0.25),
    "foreach copy_": lambda x, y: torch._foreach_copy_([x], [y]),
    "foreach on two parts": lambda x, y: torch._foreach_add_([x[:2], x[4:]], 1.0),
    "transpose": lambda x, y: x.t().mul_(y.t()),
    "flat view": lambda x, y: x.view(-1)[7].fill_(9.0),
    "select": lambda x, y: x.select(0, 1).zero_(),
    "split": lambda x, y: x.split(2)[1].fill_(3.0),
    "chunk": lambda x, y: x.chunk(2, dim=1)[1].neg_(),
    "unbind": lambda x, y: x.unbind(1)[4].add_(1.0),
    "narrow": lambda x, y: x.narrow(1, 10, 5).sub_(1.0),
    "diagonal": lambda x, y: x.diagonal().zero_(),
    "unfold": lambda x, y: x.unfold(1, 5, 10)[0].fill_(0.1),
    "as_strided": lambda x, y: x.as_strided((3,), (2,)).fill_(0.2),
    "one row from another": lambda x, y: x[0].copy_(x[1]),
    "detach": lambda x, y: x.detach().add_(1.0),
    "data": lambda x, y: x.data.mul_(2.0),
}


@by_geometry
@pytest.mark.parametrize("format", [FLOAT32, SOFTSIGN8], ids=lambda f: f.name)
@pytest.mark.parametrize("op", WRITES.values(), ids=list(WRITES))
def test_writing_encodes_what_the_dequantized_tensor_becomes(
    op: Op, format: Format, geometry: str
) -> None:
    make, part = GEOMETRIES[geometry]
    base, y = pack(make(), format), random(ROWS, COLUMNS, seed=1)
    dense, old = base.dequantize(), base.packed.version
    target, dense_target = part(base), part(dense)
    expected, found = outcome(op, dense_target, y), outcome(op, target, y)
    codes, scales = reference.encode(memory_order(dense), format, NEAREST)
    assert torch.equal(base.packed.codes, codes)
    assert torch.equal(base.packed.scales, scales)
    assert base.packed.version == old + (not isinstance(expected, type)), "one write each"
    if isinstance(expected, Tensor):
        assert isinstance(found, PackedState)
        assert found.packed is base.packed
        assert found.size() == expected.size()
        assert (found is target) == (expected is dense_target)


METADATA: dict[str, Callable[[Any], Any]] = {
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "squeeze_": lambda x: x[:1].squeeze_(0),
    "resize_": lambda x: x.resize_(2, 3),
    "set_": lambda x: x.set_(torch.ones(3)),
}


@pytest.mark.parametrize("op", METADATA.values(), ids=list(METADATA))
def test_a_change_of_shape_in_place_is_done_or_refused(op: Callable[[Any], Any]) -> None:
    """Not answered with the old shape in silence."""
    state = pack(random(ROWS, COLUMNS))
    dense = state.dequantize()
    try:
        found = op(state)
    except (RuntimeError, NotImplementedError, FormatMismatchError):
        assert_same(state, dense)
    else:
        assert found.size() == op(dense).size()


@pytest.mark.parametrize("op", [lambda x: x.neg_(), lambda x: x[3].sub_(100.0)])
def test_a_negative_value_in_a_nonnegative_format_changes_nothing(op: Callable[[Any], Any]) -> None:
    state = pack(random(ROWS, COLUMNS).abs(), LOG8)
    before = state.dequantize()
    with pytest.raises(NegativeStateError):
        op(state)
    assert torch.equal(state.dequantize(), before)
    assert state.packed.version == 1


def test_a_failing_operation_changes_nothing() -> None:
    state = pack(random(ROWS, COLUMNS))
    with pytest.raises(RuntimeError):
        state.add_(torch.ones(7))
    assert state.packed.version == 1


def test_a_write_to_a_birth_constant_makes_it_float32() -> None:
    state = PackedState.zeros_like(random(ROWS, COLUMNS), CONSTANT)
    state[2].add_(1.0)
    assert state.format == FLOAT32
    assert state.sum() == COLUMNS


# Copies -------------------------------------------------------------------------------------


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}
by_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=list(COPIES))


@by_copy
@by_geometry
def test_a_copy_is_exact_and_independent(duplicate: Callable[[Any], Any], geometry: str) -> None:
    make, part = GEOMETRIES[geometry]
    state = part(pack(make()))
    other = duplicate(state)
    assert type(other) is PackedState
    assert other.format == state.format
    assert_same(other, state.dequantize())
    state.zero_()
    assert other.any()


@by_copy
def test_views_copied_together_go_on_sharing(duplicate: Callable[[Any], Any]) -> None:
    state = pack(random(ROWS, COLUMNS))
    whole, transposed = duplicate([state, state.t()])
    transposed.zero_()
    assert not whole.any()
    assert state.any()


def test_clone_is_independent_and_shallow_copies_share() -> None:
    state = pack(random(ROWS, COLUMNS))
    clone, shallow = state.clone(), copy.copy(state)
    shallow.zero_()
    assert not state.any()
    assert clone.any()
    assert isinstance(clone, PackedState)
    assert clone.format == SOFTSIGN8


@pytest.mark.parametrize("write_clone", [False, True])
def test_a_clone_keeps_its_values_when_the_normalizer_of_the_other_is_written(
    write_clone: bool,
) -> None:
    v = pack(random(ROWS, COLUMNS).square() + 0.5, LOG8)
    m = PackedState.pack(random(ROWS, COLUMNS), FORMATS["midrise3"], normalizer=v.packed)
    clone = m.clone()
    assert isinstance(clone, PackedState)
    before = m.dequantize()
    written = clone.packed.normalizer if write_clone else v.packed
    assert written is not None
    written.write(written.read() * 100)
    assert torch.equal((m if write_clone else clone).dequantize(), before)


# Geometry and appearance --------------------------------------------------------------------


@CASES
@given(data=st.data(), sizes=st.lists(st.integers(0, 5), max_size=4))
def test_any_dense_strides_are_kept(data: st.DataObject, sizes: list[int]) -> None:
    order = data.draw(st.permutations(range(len(sizes))))
    values = random(*sizes).permute(order)
    state = pack(values, FLOAT32)
    assert is_dense(values)
    assert_same(state, values)
    assert_same(pack(values).dequantize(), pack(values))


@pytest.mark.parametrize(
    "values",
    [
        random(6, 8)[:, ::2],
        random(6, 8)[:, :5],
        random(1, 8).expand(6, 8),
        random(8).unfold(0, 3, 1),
    ],
)
def test_tensors_with_gaps_or_overlap_are_refused(values: Tensor) -> None:
    assert not is_dense(values)
    with pytest.raises(FormatMismatchError, match="dense, non-overlapping"):
        pack(values)


def test_channels_last_is_kept() -> None:
    values = random(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = pack(values, FLOAT32)
    assert_same(state, values)
    assert state.is_contiguous(memory_format=torch.channels_last)
    assert_same(state.contiguous(), values.contiguous())
    assert_same(state.mul(2).clone(memory_format=torch.channels_last), values * 2)


def test_bytes_are_those_of_codes_and_scales() -> None:
    state = pack(random(ROWS, COLUMNS))
    assert state.packed.nbytes == 3 * (128 + 2)
    assert state.packed.codes.nbytes + state.packed.scales.nbytes == state.packed.nbytes
    assert (state.dtype, state.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_it_prints_its_values_and_its_format(format: Format) -> None:
    normalizer = PackedStorage(3, FLOAT32) if format.normalized else None
    state = PackedState.zeros_like(torch.empty(3), format, normalizer=normalizer)
    assert repr(state).removeprefix("PackedState([").removesuffix(f"], format={format.name})") in (
        "0., 0., 0.",
        "-0., -0., -0.",
    )
    assert str(state[0]).endswith(f"format={format.name})")


def test_a_state_without_storage_is_a_stand_in_for_tracing() -> None:
    stand_in = PackedState(None, (2, 3), (3, 1))
    assert repr(stand_in) == "PackedState(size=(2, 3), tracing)"
    assert stand_in.t().size() == (3, 2)
    with pytest.raises(TracingError, match=r"add\.Tensor"):
        _ = stand_in + 1  # no optimizer's step is being traced
    with pytest.raises(FormatMismatchError, match="stand-in"):
        _ = stand_in.packed


def test_it_cannot_be_viewed_as_another_dtype() -> None:
    with pytest.raises(FormatMismatchError, match="int32"):
        pack(random(4, 4)).view(torch.int32)


def test_what_reaches_for_the_memory_does_not_crash() -> None:
    """DLPack and shared memory ask a tensor for its storage, which a packed state has not."""
    state = PackedState.pack(torch.randn(40, 33), FORMATS["softsign8"])
    values = state.dequantize()
    assert torch.equal(torch.from_dlpack(state), values)
    assert torch.equal(state.share_memory_().dequantize(), values)
    assert f"{state[0, 0]:.3f}" == f"{values[0, 0]:.3f}"
