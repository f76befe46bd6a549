"""`PackedStorage`: what is written comes back within the format's error, and nothing else does."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from stq_compile import reference
from stq_compile.errors import FormatMismatchError, NegativeStateError
from stq_compile.formats import BFLOAT16, CONSTANT, FLOAT32, FORMATS, ULP8, Format
from stq_compile.options import Rounding
from stq_compile.rounding import NEAREST, Noise, step_key
from stq_compile.storage import EAGER_CLOCK, PackedStorage

NUMEL = 300  # two full blocks and a tail
WRITABLE = [f for f in FORMATS.values() if f not in (CONSTANT, ULP8)]
"""Formats for values of any size; ``ulp8`` holds [-1/2, 1/2) alone (tests/test_halves.py)."""
SOFTSIGN4, SOFTSIGN8 = FORMATS["softsign4"], FORMATS["softsign8"]
LOG4, LOG8 = FORMATS["adaptive_log4"], FORMATS["adaptive_log8"]
MIDRISE2, MIDRISE3 = FORMATS["midrise2"], FORMATS["midrise3"]


def by_name(formats: list[Format], name: str = "format") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, formats, ids=lambda f: f.name)


def between_one_and_two(seed: int = 0) -> Tensor:
    return 1 + torch.rand(NUMEL, generator=torch.Generator().manual_seed(seed))


def unit_normalizer() -> PackedStorage:
    """A normalizer whose value, and so whose root, is one everywhere."""
    storage = PackedStorage(NUMEL, FLOAT32)
    storage.write(torch.ones(NUMEL))
    return storage


def filled(format: Format, rounding: Rounding = "stochastic") -> PackedStorage:
    normalizer = unit_normalizer() if format.normalized else None
    storage = PackedStorage(NUMEL, format, normalizer=normalizer, rounding=rounding)
    storage.write(between_one_and_two())
    return storage


def one_gap(format: Format) -> float:
    """An upper bound of the gap between neighbouring levels for values from 1 to 2."""
    if format.kind == "softsign":
        return 2.02 * 2 / (format.top_code // 2 + 1)
    if format.kind == "adaptive_log":  # a range of at most 4 steps of 14/32 octaves, from 2.25
        return float(2.25 * (1 - 2 ** (-4 * 14 / 32 / format.top_code)))
    if format.kind == "midrise":
        reach = {2: 1.6, 3: 2.6}.get(format.width, 1.26) * 1.6
        return 1.01 * reach / (format.top_code / 2)
    return 2.0**-7 if format == BFLOAT16 else 0.0


def facts(storage: PackedStorage) -> tuple[object, ...]:
    """Everything that must not change when an operation fails."""
    codes, scales = storage.codes.tolist(), storage.scales.tolist()
    return storage.format, storage.normalizer, storage.version, codes, scales


def fails_on_call(number: int) -> Callable[..., Any]:
    real, calls = reference.encode, itertools.count(1)

    def encode(*args: Any) -> Any:
        if next(calls) == number:
            raise RuntimeError("no memory")
        return real(*args)

    return encode


# Writing and reading ------------------------------------------------------------------------


@by_name(list(FORMATS.values()))
def test_a_new_storage_holds_zeros(format: Format) -> None:
    normalizer = unit_normalizer() if format.normalized else None
    values = PackedStorage(NUMEL, format, normalizer=normalizer).read()
    assert values.shape == (NUMEL,)
    assert values.dtype == torch.float32
    assert not values.any()


@by_name(WRITABLE)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_written_values_come_back_within_one_gap(format: Format, rounding: Rounding) -> None:
    storage = filled(format, rounding)
    read, written = torch.split(storage.read(), 128), torch.split(between_one_and_two(), 128)
    if format.kind == "adaptive_log":  # whose range leaves out the lowest
        written = tuple(x.clamp(min=y.min()) for x, y in zip(written, read, strict=True))
    error = (torch.cat(read) - torch.cat(written)).abs().max()
    assert error <= one_gap(format) * (0.51 if rounding == "nearest" else 1)
    if format != FLOAT32:
        assert error > 0


@by_name(WRITABLE)
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 5000])
def test_bytes_are_those_of_the_buffers_and_of_the_formula(format: Format, numel: int) -> None:
    normalizer = PackedStorage(numel, FLOAT32) if format.normalized else None
    storage = PackedStorage(numel, format, normalizer=normalizer)
    storage.write(torch.ones(numel))
    held = storage.codes.untyped_storage().nbytes() + storage.scales.untyped_storage().nbytes()
    assert storage.nbytes == held == format.nbytes(numel)


@by_name(WRITABLE)
def test_eager_writes_use_the_storage_s_own_stream_and_clock(format: Format) -> None:
    """Counters from 2^48 on, one a write: no compiled step reaches them."""
    normalizer = unit_normalizer() if format.normalized else None
    storage = PackedStorage(NUMEL, format, normalizer=normalizer, seed=7, stream=99)
    unit = torch.ones(NUMEL) if format.normalized else None
    for clock in range(3):
        storage.write(between_one_and_two())
        noise = Noise(step_key(7, (1 << 48) + clock, 99))
        codes, scales = reference.encode(between_one_and_two(), format, noise, unit)
        assert torch.equal(storage.codes, codes)
        assert torch.equal(storage.scales, scales)
    assert EAGER_CLOCK == 1 << 48


def test_rounding_is_as_asked() -> None:
    expected = reference.encode(between_one_and_two(), SOFTSIGN4, NEAREST)[0]
    assert torch.equal(filled(SOFTSIGN4, "nearest").codes, expected)
    assert not torch.equal(filled(SOFTSIGN4).codes, expected)


def test_read_gives_a_new_tensor_and_write_takes_a_copy() -> None:
    for format in (FLOAT32, BFLOAT16, SOFTSIGN8):
        storage = filled(format)
        before = storage.read()
        storage.read().zero_()
        assert torch.equal(storage.read(), before)
        values = torch.ones(NUMEL, dtype=torch.float64).view(3, 100)
        storage.write(values)
        values.zero_()
        assert storage.read().min() > 0.9


def test_a_constant_reads_as_its_value_and_becomes_float32_when_written() -> None:
    storage = PackedStorage(NUMEL, CONSTANT)
    storage.fill(0.25)
    assert storage.read().tolist() == [0.25] * NUMEL
    storage.write(between_one_and_two())
    assert storage.format == FLOAT32
    assert torch.equal(storage.read(), between_one_and_two())


def test_only_a_new_storage_is_a_constant() -> None:
    storage = filled(SOFTSIGN4)
    before = facts(storage)
    with pytest.raises(FormatMismatchError):
        storage.reencode(CONSTANT)
    with pytest.raises(FormatMismatchError):
        storage.fill(3.0)
    assert facts(storage) == before


@pytest.mark.parametrize("numel", [0, NUMEL - 1, NUMEL + 1, 1])
def test_a_wrong_number_of_values_is_refused(numel: int) -> None:
    storage = filled(SOFTSIGN4)
    before = facts(storage)
    with pytest.raises(FormatMismatchError, match=f"{numel} values; expected {NUMEL}"):
        storage.write(torch.ones(numel))
    assert facts(storage) == before


def test_a_negative_value_is_refused_by_a_nonnegative_format() -> None:
    storage = filled(LOG4)
    before = facts(storage)
    values = between_one_and_two()
    values[250] = -3.0
    with pytest.raises(NegativeStateError, match=r"-3\.0.*adaptive_log4"):
        storage.write(values)
    assert facts(storage) == before
    storage.write(torch.full((NUMEL,), -0.0))
    assert not storage.read().any()

    storage = PackedStorage(NUMEL, SOFTSIGN8)
    storage.write(-between_one_and_two())
    before = facts(storage)
    with pytest.raises(NegativeStateError):
        storage.reencode(LOG8)
    assert facts(storage) == before


# Changing the format ------------------------------------------------------------------------


@by_name(WRITABLE, "old")
def test_reencoding_is_one_encoding_of_the_values(old: Format) -> None:
    for new in WRITABLE:
        storage = filled(old)
        values, version = storage.read(), storage.version
        storage.reencode(new, unit_normalizer() if new.normalized else None)
        assert storage.format == new
        assert storage.nbytes == new.nbytes(NUMEL)
        if new == old and not new.normalized:
            assert torch.equal(storage.read(), values)
            assert storage.version == version
            continue
        unit = torch.ones(NUMEL) if new.normalized else None
        noise = Noise(step_key(0, EAGER_CLOCK + 1, 0))
        codes, scales = reference.encode(values, new, noise, unit)
        assert torch.equal(storage.codes, codes)
        assert torch.equal(storage.scales, scales)
        assert storage.version == version + 1


@by_name(WRITABLE)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_takes_any_format(format: Format, value: float) -> None:
    storage = PackedStorage(NUMEL, CONSTANT)
    storage.fill(value)
    storage.reencode(format, unit_normalizer() if format.normalized else None)
    assert storage.format == format
    assert (storage.read() - value).abs().max() <= value * one_gap(format)
    if value == 0.0:
        assert not storage.codes.any()
        assert not storage.scales.any()


@by_name([f for f in WRITABLE if f != SOFTSIGN8])
def test_a_failure_half_way_leaves_the_old_values(
    format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = filled(SOFTSIGN8)
    normalizer = unit_normalizer() if format.normalized else None
    before = facts(storage)
    monkeypatch.setattr(reference, "encode", fails_on_call(1))
    with pytest.raises(RuntimeError, match="no memory"):
        storage.reencode(format, normalizer)
    assert facts(storage) == before


# Normalized formats -------------------------------------------------------------------------


def momentum_pair(rounding: Rounding = "nearest") -> tuple[PackedStorage, PackedStorage]:
    """A momentum in units of the root of its second moment."""
    generator = torch.Generator().manual_seed(4)
    v = PackedStorage(NUMEL, LOG8, rounding=rounding)
    v.write(torch.rand(NUMEL, generator=generator) + 0.5)
    m = PackedStorage(NUMEL, MIDRISE3, normalizer=v, rounding=rounding)
    m.write(torch.randn(NUMEL, generator=generator))
    return m, v


def assert_kept(m: PackedStorage, before: Tensor) -> None:
    """Within one step between present levels."""
    assert m.normalizer is not None
    step = (m.scales.to(torch.int32) << 16).view(torch.float32).repeat_interleave(128)[:NUMEL]
    assert ((m.read() - before).abs() <= 1.0001 * step * m.normalizer.read().sqrt()).all()


CHANGES: dict[str, Callable[[PackedStorage], None]] = {
    "written": lambda v: v.write(v.read() * torch.linspace(8, 12, NUMEL)),
    "written by far smaller values": lambda v: v.write(v.read() * 1e-12),
    "re-encoded at 3 bits": lambda v: v.reencode(FORMATS["adaptive_log3"]),
    "left in float32": lambda v: v.reencode(FLOAT32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_values_stay_when_the_normalizer_changes(
    change: Callable[[PackedStorage], None], rounding: Rounding
) -> None:
    m, v = momentum_pair(rounding)
    before, codes = m.read(), m.codes
    change(v)
    assert m.codes is not codes
    assert_kept(m, before)


def test_a_state_that_left_its_normalizer_is_not_touched_again() -> None:
    m, v = momentum_pair()
    m.reencode(SOFTSIGN8)
    before = facts(m)
    v.write(v.read() * 100)
    assert facts(m) == before


def test_a_dropped_state_is_not_kept_alive_by_its_normalizer() -> None:
    m, v = momentum_pair()
    alive = weakref.ref(m)
    del m
    assert alive() is None
    v.write(v.read())


@pytest.mark.parametrize(
    ("format", "normalizer", "message"),
    [
        (MIDRISE2, lambda: None, "no normalizer; expected one"),
        (SOFTSIGN4, unit_normalizer, "a normalizer; expected none"),
        (
            MIDRISE3,
            lambda: PackedStorage(NUMEL + 1, FLOAT32),
            f"{NUMEL + 1} values; expected {NUMEL}",
        ),
        (MIDRISE3, lambda: filled(MIDRISE2), "normalized format midrise2"),
    ],
)
def test_a_wrong_normalizer_is_refused(
    format: Format, normalizer: Callable[[], PackedStorage | None], message: str
) -> None:
    with pytest.raises(FormatMismatchError, match=message):
        PackedStorage(NUMEL, format, normalizer=normalizer())
    storage = filled(BFLOAT16)
    before = facts(storage)
    with pytest.raises(FormatMismatchError, match=message):
        storage.reencode(format, normalizer())
    assert facts(storage) == before


def test_no_state_is_measured_in_units_of_itself() -> None:
    storage = filled(LOG8)
    with pytest.raises(FormatMismatchError):
        storage.reencode(MIDRISE3, storage)
    _m, v = momentum_pair()
    with pytest.raises(FormatMismatchError):
        v.reencode(MIDRISE3, unit_normalizer())


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("change", ["write", "reencode"])
def test_a_failure_half_way_leaves_the_dependent_values_too(
    change: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call encodes the normalizer, the second the state that depends on it."""
    m, v = momentum_pair()
    before = m.read(), v.read()
    monkeypatch.setattr(reference, "encode", fails_on_call(call))
    with pytest.raises(RuntimeError, match="no memory"):
        v.write(before[1] * 9) if change == "write" else v.reencode(FORMATS["adaptive_log2"])
    assert torch.equal(m.read(), before[0])
    assert torch.equal(v.read(), before[1])


# Copies -------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[PackedStorage], PackedStorage]] = {
    "clone": PackedStorage.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda storage: pickle.loads(pickle.dumps(storage)),
}
by_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=list(COPIES))


@by_copy
@by_name(list(FORMATS.values()))
def test_a_copy_is_exact_and_draws_the_same_bits_next(
    format: Format, duplicate: Callable[[PackedStorage], PackedStorage]
) -> None:
    storage = PackedStorage(NUMEL, CONSTANT) if format == CONSTANT else filled(format)
    other = duplicate(storage)
    assert (other.format, other.nbytes) == (format, storage.nbytes)
    assert torch.equal(other.codes, storage.codes)
    assert torch.equal(other.scales, storage.scales)
    assert other.codes.data_ptr() != storage.codes.data_ptr(), "kernels write in place"
    for each in (storage, other):
        each.write(between_one_and_two(5))
    assert torch.equal(other.codes, storage.codes)


@by_copy
def test_a_copy_is_independent(duplicate: Callable[[PackedStorage], PackedStorage]) -> None:
    """Of the original and of the original's normalizer, in both directions."""
    m, v = momentum_pair()
    other = duplicate(m)
    assert other.normalizer is not None
    for written, kept in ((v, other), (other.normalizer, m)):
        before = facts(kept)
        written.write(written.read() * 7)
        assert facts(kept) == before
    values = other.read()
    other.normalizer.write(other.normalizer.read() * 3)
    assert_kept(other, values)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_states_copied_together_stay_tied(name: str, order: tuple[int, int]) -> None:
    pair = tuple(itemgetter(*order)(momentum_pair()))
    both = pickle.loads(pickle.dumps(pair)) if name == "pickle" else copy.deepcopy(pair)
    m, v = (both[order.index(i)] for i in (0, 1))
    assert m.normalizer is v
    before = m.read()
    v.write(v.read() * 50)
    assert_kept(m, before)
