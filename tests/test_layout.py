"""The packed layout: exact bytes, checked against a packer written from the documentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stq_compile import formats
from stq_compile.layout import pack, unpack
from stq_compile.reference import block_sum

# Written out again here, so that a change of the package's table is seen.
FIELD_BITS = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8], 12: [8, 4]}
WIDTHS = sorted(FIELD_BITS)


def documented_bytes(codes: list[int], width: int) -> bytes:
    """One block, element by element: element ``e`` is lane ``e % 16`` of plane ``e // 16``.

    A field of ``b`` bits takes ``16 b`` bytes; its byte ``16 c + lane`` holds plane ``c`` in its
    low bits and planes ``c + b``, ``c + 2 b``, ... above it.
    """
    out = bytearray(16 * width)
    field_start = bits_below = 0
    for bits in FIELD_BITS[width]:
        for element, code in enumerate(codes):
            plane, lane = element // 16, element % 16
            field = (code // 2**bits_below) % 2**bits
            out[field_start + 16 * (plane % bits) + lane] += field * 2 ** (bits * (plane // bits))
        field_start += 16 * bits
        bits_below += bits
    return bytes(out)


def block_bytes(packed: Tensor) -> list[bytes]:
    return [bytes(row.tolist()) for row in packed]


def one_code_everywhere(width: int, background: int) -> Tensor:
    """Every code in every position, the other positions at ``background``: [codes * 128, 128]."""
    codes = torch.full((2**width, 128, 128), background, dtype=torch.int32)
    position = torch.arange(128)
    codes[:, position, position] = torch.arange(2**width, dtype=torch.int32)[:, None]
    return codes.view(-1, 128)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("full", [False, True])
def test_every_code_in_every_position_comes_back(width: int, full: bool) -> None:
    codes = one_code_everywhere(width, background=2**width - 1 if full else 0)
    assert torch.equal(unpack(pack(codes, width), width), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_block_takes_exactly_16_bytes_a_bit(width: int) -> None:
    packed = pack(torch.zeros(3, 128, dtype=torch.int32), width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 16 * width)
    assert packed.nbytes == 3 * 128 * width // 8


@pytest.mark.parametrize("width", WIDTHS)
def test_every_bit_of_a_code_has_a_place_of_its_own(width: int) -> None:
    """The 128 * width single-bit blocks set single, different bits: no bit of a byte is idle."""
    codes = torch.zeros(width, 128, 128, dtype=torch.int32)
    position = torch.arange(128)
    for bit in range(width):
        codes[bit, position, position] = 1 << bit
    bits = np.unpackbits(pack(codes.view(-1, 128), width).numpy(), axis=1)
    assert (bits.sum(axis=1) == 1).all()
    assert (bits.sum(axis=0) == 1).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_of_every_code_are_the_documented_ones(width: int) -> None:
    """Block k holds (position * 7 + k) mod 2^width, so each code passes through many positions."""
    codes = [[(7 * e + k) % 2**width for e in range(128)] for k in range(2**width)]
    packed = pack(torch.tensor(codes, dtype=torch.int32), width)
    assert block_bytes(packed) == [documented_bytes(block, width) for block in codes]


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(width=st.sampled_from(WIDTHS), blocks=st.integers(0, 4), data=st.data())
def test_bytes_of_random_blocks_are_the_documented_ones(
    width: int, blocks: int, data: st.DataObject
) -> None:
    block = st.lists(st.integers(0, 2**width - 1), min_size=128, max_size=128)
    codes = data.draw(st.lists(block, min_size=blocks, max_size=blocks))
    packed = pack(torch.tensor(codes, dtype=torch.int32).view(blocks, 128), width)
    assert block_bytes(packed) == [documented_bytes(block, width) for block in codes]
    assert unpack(packed, width).tolist() == codes


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_do_not_touch_each_other(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 2**width, (9, 128), generator=generator, dtype=torch.int32)
    packed = pack(codes, width)
    for block in range(9):
        assert torch.equal(pack(codes[block : block + 1], width), packed[block : block + 1])
        assert torch.equal(unpack(packed[block : block + 1], width), codes[block : block + 1])


@pytest.mark.parametrize("width", [3, 5, 6])
def test_the_byte_check_sees_fields_in_another_order(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round trip alone would not: pack and unpack agree on the wrong order."""
    monkeypatch.setitem(formats.FIELDS, width, tuple(reversed(FIELD_BITS[width])))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**width, (1, 128), generator=generator, dtype=torch.int32)
    packed = pack(codes, width)
    assert torch.equal(unpack(packed, width), codes)
    assert block_bytes(packed) != [documented_bytes(codes[0].tolist(), width)]


def test_block_sum_adds_planes_in_order_then_lanes_by_halves() -> None:
    x = np.random.default_rng(1).standard_normal((50, 128)).astype(np.float32)
    lanes = x[:, :16].copy()
    for plane in range(1, 8):
        lanes += x[:, 16 * plane : 16 * plane + 16]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    assert np.array_equal(block_sum(torch.from_numpy(x)).numpy(), lanes)
    assert not np.array_equal(x.sum(axis=1, keepdims=True), lanes), "the order must matter here"
