"""Changes of format by kernels: the bits of the reference, for every pair of formats."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stq_compile as stq
from kernels import torch_threads
from models import backward, make_model
from stq_compile import codec as codec_module
from stq_compile import errors, storage
from stq_compile.backend import session_of
from stq_compile.codec import CompiledCodec, Conversion
from stq_compile.formats import BLOCK, CONSTANT, FLOAT32, FORMATS, Format
from stq_compile.options import Rounding
from stq_compile.session import Session
from stq_compile.storage import REFERENCE, Codec, PackedStorage

WRITABLE = [f for f in FORMATS.values() if f != CONSTANT]
UNITS = [f for f in WRITABLE if not f.normalized]
SIGNED = [f for f in WRITABLE if f.signed]
NONNEGATIVE = [f for f in WRITABLE if not f.signed or not f.blocked]
PAIRS = {p: f for f in (SIGNED, NONNEGATIVE) for p in itertools.product(f, f)}
"""Pairs of formats of one family: the sign of a state never changes."""
SIZES = (1, 700)
SMALL_TILE = 3


@pytest.fixture(scope="module")
def codecs() -> Callable[[Rounding], CompiledCodec]:
    made: dict[str, CompiledCodec] = {}

    def codec(rounding: Rounding) -> CompiledCodec:
        if rounding not in made:
            made[rounding] = CompiledCodec(rounding)
            made[rounding].build(WRITABLE, WRITABLE)
        return made[rounding]

    return codec


def values(numel: int, *, positive: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + numel)
    x, octaves = torch.randn(2, numel, generator=generator)
    x = x * torch.exp2(octaves)
    x[::7] = 0
    return x * x if positive else x


def unit_of(numel: int, format: Format) -> PackedStorage:
    unit = PackedStorage(numel, format, seed=3, stream=9)
    unit.write(values(numel, positive=True, seed=1))
    return unit


def state(numel: int, format: Format, unit: PackedStorage | None, rounding: Rounding) -> Any:
    made = PackedStorage(numel, format, normalizer=unit, rounding=rounding, seed=3, stream=77)
    made.write(values(numel, positive=not format.signed))
    return made


def bits(*storages: PackedStorage) -> list[Tensor]:
    return [b.view(torch.uint8) for s in storages for b in (s.codes, s.scales)]


def both(act: Callable[[Codec], list[Tensor]], compiled: Codec) -> bool:
    """Whether the same is done with the same bits by kernels and by the reference."""
    pairs = zip(act(compiled), act(REFERENCE), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("rounding", "every"),
    [
        ("stochastic", 4),
        pytest.param("stochastic", 1, marks=pytest.mark.slow),
        pytest.param("nearest", 1, marks=pytest.mark.slow),
    ],
)
def test_every_pair_of_formats_bit_for_bit(
    rounding: Rounding,
    every: int,
    codecs: Callable[[Rounding], CompiledCodec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several tiles, the last of them partial. By default a quarter of the pairs: kernels must be
    built."""
    monkeypatch.setattr(storage, "TILE_BLOCKS", SMALL_TILE)
    compiled = codecs(rounding)
    wrong = []
    for (old, new), numel in itertools.product(list(PAIRS)[::every], SIZES):

        def change(codec: Codec, old: Format = old, new: Format = new, n: int = numel) -> Any:
            units = [unit_of(n, FORMATS[name]) for name in ("adaptive_log4", "adaptive_log3")]
            unit = units[0] if old.normalized else None
            made = PackedStorage(n, old, normalizer=unit, rounding=rounding, seed=3)
            made.write(values(n, positive=PAIRS[old, new] is NONNEGATIVE))
            made.reencode(new, units[1] if new.normalized else None, codec=codec)
            return bits(made)

        if not both(change, compiled):
            wrong.append((old.name, new.name, numel))
    assert not wrong


@pytest.mark.parametrize(
    "old",
    [pytest.param(f, marks=[pytest.mark.slow] if i % 3 else []) for i, f in enumerate(UNITS)],
    ids=lambda f: f.name,
)
def test_a_unit_that_changes_takes_those_that_depend_on_it_along(
    old: Format, codecs: Callable[[Rounding], CompiledCodec]
) -> None:
    """To every format of the unit; the other state keeps its format, takes another one, or one
    without a unit, each in the same go."""
    compiled = codecs("stochastic")
    after = [FORMATS[name] for name in ("midrise3", "midrise6", "softsign8")]
    for new, following in itertools.product([f for f in UNITS if f != old], after):

        def change(codec: Codec, new: Format = new, following: Format = following) -> Any:
            unit = unit_of(300, old)
            made = state(300, FORMATS["midrise3"], unit, "stochastic")
            unit.reencode(new, codec=codec, following={made: following})
            assert made.format == following
            assert made.normalizer is (unit if following.normalized else None)
            assert made.eager_writes == 2  # packed once, converted once
            before = made.codes
            unit.write(unit.read() * 2)
            assert (made.codes is before) == (not following.normalized)
            return bits(unit, made)

        assert both(change, compiled), new.name


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constants_and_zeros(value: float, codecs: Callable[[Rounding], CompiledCodec]) -> None:
    compiled = codecs("stochastic")
    for new in WRITABLE:

        def change(codec: Codec, new: Format = new) -> Any:
            made = PackedStorage(300, CONSTANT, seed=3, stream=77)
            made.fill(value)
            unit = unit_of(300, FORMATS["adaptive_log4"]) if new.normalized else None
            made.reencode(new, unit, codec=codec)
            assert made.eager_writes == (value > 0)
            return bits(made)

        assert both(change, compiled), new.name


def test_threads_and_tiles_change_nothing(
    codecs: Callable[[Rounding], CompiledCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With enough blocks that two threads share a tile."""
    numel, found = 3000 * BLOCK + 5, []
    for threads, tile in ((1, 1 << 12), (2, 1 << 12), (2, 1100)):
        monkeypatch.setattr(storage, "TILE_BLOCKS", tile)
        with torch_threads(threads):
            made = state(numel, FORMATS["softsign6"], None, "stochastic")
            made.reencode(FORMATS["softsign3"], codec=codecs("stochastic"))
        found.append(bits(made))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_negative_values_are_refused_by_kernels_too(
    codecs: Callable[[Rounding], CompiledCodec],
) -> None:
    made = PackedStorage(300, FORMATS["softsign8"])
    made.write(-values(300, positive=True) - 1)
    before = bits(made)
    with pytest.raises(errors.NegativeStateError):
        made.reencode(FORMATS["adaptive_log4"], codec=codecs("stochastic"))
    assert all(torch.equal(a, b) for a, b in zip(bits(made), before, strict=True))


# Of a whole optimizer ------------------------------------------------------------------------


def changes(elements: int, **formats: tuple[Format, Format]) -> list[Conversion]:
    return [Conversion(0, elements, old, new) for old, new in formats.values()]


def test_kernels_are_built_for_what_changes_and_only_where_it_is_worth_it() -> None:
    codec = CompiledCodec("stochastic")
    log4, log5 = FORMATS["adaptive_log4"], FORMATS["adaptive_log5"]
    midrise4 = FORMATS["midrise4"]
    moments = {"exp_avg": (midrise4, midrise4), "exp_avg_sq": (log4, log5)}
    assert codec.prepare(changes(1000, **moments)) is REFERENCE
    large = codec_module.WORTH_BUILDING
    assert codec.prepare(changes(large, exp_avg=(log4, log4))) is REFERENCE
    assert codec.prepare(changes(large, **moments)) is codec
    built = {(midrise4, FLOAT32), (log4, FLOAT32), (log5, FLOAT32)}
    ways = {way for way, _ in codec.kernels}
    assert ways == built | {(FLOAT32, midrise4), (FLOAT32, log5)}


def run(worth: int, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]) -> list[Tensor]:
    """An optimizer whose widths go through many changes, units first, units last, and together."""
    monkeypatch.setattr(codec_module, "WORTH_BUILDING", worth)
    model = make_model()
    optimizer = stq.compile(make(model.parameters()), precision=4, min_numel=64)
    for step in range(2):  # the first one may create the states
        backward(model, step)
        optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    keys = [k for k in session.info if session.info[k].format.width < 32]
    for step, widths in enumerate([(3, 3), (3, 32), (4, 3), (32, 3), (4, 3)], 2):
        plan = {k: widths[k[1] in ("exp_avg_sq", "sum")] for k in keys}
        session.change_widths(plan)
        assert {k: session.info[k].format.width for k in keys} == plan
        backward(model, step)
        optimizer.step()
    kernels = session.codec.kernels
    assert bool(kernels) == (worth == 0)
    dense = [s + 0 for state in optimizer.state.values() for s in state.values()]
    return [*dense, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1e-2),
        pytest.param(
            lambda ps: torch.optim.Adagrad(ps, initial_accumulator_value=0.1),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), marks=pytest.mark.slow),
    ],
    ids=["adamw", "adagrad", "sgd"],
)
def test_an_optimizer_ends_with_the_same_bits(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = zip(run(0, monkeypatch, make), run(1 << 40, monkeypatch, make), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("failing_call", [1, 2, 4])
def test_a_failure_in_the_midst_puts_everything_back(
    monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    monkeypatch.setattr(codec_module, "WORTH_BUILDING", 0)
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.parameters(), lr=1e-2), precision=4, min_numel=64
    )
    backward(model, 0)
    optimizer.step()
    session: Session | None = session_of(optimizer)
    assert session is not None
    packed = [v for s in optimizer.state.values() for v in s.values() if hasattr(v, "packed")]
    before = [b.clone() for b in bits(*(p.packed for p in packed))]
    rows, calls, encode = stq.report(optimizer).rows, itertools.count(1), CompiledCodec.encode

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == failing_call:
            raise MemoryError("simulated")
        return encode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledCodec, "encode", fail)
        with pytest.raises(MemoryError):
            session.change_widths({(0, "exp_avg"): 3, (0, "exp_avg_sq"): 3, (2, "exp_avg_sq"): 3})
    assert stq.report(optimizer).rows == rows
    after = bits(*(p.packed for p in packed))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    backward(model, 1)
    optimizer.step()
