"""``stq::dequantize`` and ``stq::quantize``: the reference, as operators that a graph can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stq_compile import ops, reference
from stq_compile.errors import FormatMismatchError
from stq_compile.formats import CONSTANT, FORMATS, Format
from stq_compile.packed_state import memory_order
from stq_compile.rounding import NEAREST, Noise

SIZE = (5, 60)  # two full blocks and a tail
KEY = 0x9234_5678_9ABC_DEF0  # above 2^63, so negative as an int64
by_name = pytest.mark.parametrize(
    "format", [f for f in FORMATS.values() if f != CONSTANT], ids=lambda f: f.name
)
by_stride = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
by_rounding = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])


def values_of(format: Format, transposed: bool = False) -> tuple[Tensor, Tensor | None]:
    """Values and a normalizer, with the same strides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE[::-1] if transposed else SIZE, generator=generator)
    v = x.square() + 0.1 if format.normalized else None
    x = x if format.signed else x.abs()
    return (x.t(), v if v is None else v.t()) if transposed else (x, v)


def key_of(stochastic: bool) -> Tensor | None:
    return torch.tensor(KEY - 2**64) if stochastic else None


@by_name
@by_stride
@by_rounding
def test_quantize_is_the_reference_in_memory_order(
    format: Format, transposed: bool, stochastic: bool
) -> None:
    x, v = values_of(format, transposed)
    codes, scales = torch.ops.stq.quantize(x, v, format.name, key_of(stochastic))
    noise = Noise(KEY) if stochastic else NEAREST
    unit = None if v is None else memory_order(v)
    expected = reference.encode(memory_order(x), format, noise, unit)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


@by_name
@by_stride
def test_dequantize_gives_the_values_back_with_their_strides(
    format: Format, transposed: bool
) -> None:
    x, v = values_of(format, transposed)
    codes, scales = torch.ops.stq.quantize(x, v, format.name, None)
    y = torch.ops.stq.dequantize(codes, scales, v, format.name, x.size(), x.stride())
    assert (y.size(), y.stride(), y.dtype) == (x.size(), x.stride(), torch.float32)
    unit = None if v is None else memory_order(v)
    assert torch.equal(memory_order(y), reference.decode(codes, scales, format, x.numel(), unit))
    if format.width >= 8:
        x = x.clamp(-0.5, 127 / 256) if format.kind == "ulp" else x
        assert torch.allclose(y, x, rtol=0.03, atol=0.15)  # the lowest are raised


def test_a_constant_is_dequantized_to_its_value() -> None:
    codes, scales = reference.empty_buffers(CONSTANT, 300)
    y = torch.ops.stq.dequantize(codes + 0.5, scales, None, "constant", SIZE, (60, 1))
    assert torch.equal(y, torch.full(SIZE, 0.5))


def test_the_result_never_shares_memory_with_an_input() -> None:
    """What ``mutates_args=()`` promises: float32 states are copied."""
    x = torch.ones(SIZE)
    codes, scales = torch.ops.stq.quantize(x, None, "float32", None)
    y = torch.ops.stq.dequantize(codes, scales, None, "float32", SIZE, (60, 1))
    assert len({t.untyped_storage().data_ptr() for t in (x, codes, y)}) == 3
    y.zero_()
    assert codes.all()


@by_name
def test_the_fake_kernels_know_shapes_strides_and_dtypes(format: Format) -> None:
    """Which torch's own check compares with the real ones, on a graph of both operators too."""
    x, v = values_of(format, transposed=True)
    codes, scales = torch.ops.stq.quantize(x, v, format.name, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.quantize, (x, v, format.name, key_of(True)), test_utils=tests)
    arguments = (codes, scales, v, format.name, x.size(), x.stride())
    torch.library.opcheck(ops.dequantize, arguments, test_utils=tests)


@by_name
def test_a_graph_of_both_can_be_traced_without_data(format: Format) -> None:
    x, v = values_of(format)

    def round_trip(x: Tensor, v: Tensor | None) -> Any:
        codes, scales = torch.ops.stq.quantize(x, v, format.name, None)
        return torch.ops.stq.dequantize(codes, scales, v, format.name, list(SIZE), [60, 1])

    with FakeTensorMode() as mode:
        fake = round_trip(mode.from_tensor(x), v if v is None else mode.from_tensor(v))
    assert (fake.size(), fake.stride(), fake.dtype) == (x.size(), x.stride(), x.dtype)
    traced = torch.fx.experimental.proxy_tensor.make_fx(round_trip)(x, v)
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert {"stq.quantize.default", "stq.dequantize.default"} <= set(names)
    assert torch.equal(traced(x, v), round_trip(x, v))


def test_a_tensor_with_gaps_is_refused() -> None:
    with pytest.raises(FormatMismatchError, match="dense, non-overlapping"):
        torch.ops.stq.quantize(torch.ones(8, 8)[:, ::2], None, "softsign4", None)
