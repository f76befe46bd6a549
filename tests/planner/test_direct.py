"""Direct measurement beside brute force: float64, levels found by trying all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphs import only, program, with_sizes
from stq_compile.error_law import persistence
from stq_compile.formats import BLOCK, FORMATS, TAIL_DEVIATIONS
from stq_compile.packed_state import PackedState
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.planner.direct import BLOCKS, WIDTHS, measure_directly, perturbations
from stq_compile.step_graph import Operand, Role, StepGraph
from zoo import BETAS, EPS, LR, adam, lion, sgd

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = NDArray[np.float64]
NUMEL = BLOCKS * BLOCK
"""So many that every block is sampled."""
Found = dict[tuple[int, str], dict[int, float]]


def analysed(unit: StepGraph, sizes: Sequence[int]) -> StepGraph:
    sized = with_sizes(unit, sizes)
    return only(find_recurrences(find_normalizers(find_ranges(program(sized)))))


class Live:
    """Parameters, gradients and states by parameter number, of elements of different sizes."""

    def __init__(self, unit: StepGraph, sizes: Sequence[int]) -> None:
        self.unit = analysed(unit, sizes)
        self.values: dict[tuple[int, str], Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for number, numel in enumerate(sizes):
            size = torch.exp2(0.7 * torch.randn(numel, generator=generator))
            self.values[number, "param"] = torch.randn(numel, generator=generator)
            self.values[number, "grad"] = size * torch.randn(numel, generator=generator)
            for key in ("momentum_buffer", "exp_avg"):
                self.values[number, key] = 0.3 * size * torch.randn(numel, generator=generator)
            noise = 1 + 0.2 * torch.randn(numel, generator=generator).clamp(-3, 3)
            self.values[number, "exp_avg_sq"] = size * size * noise

    def __call__(self, operand: Operand) -> Tensor:
        names = {Role.PARAM: "param", Role.GRAD: "grad"}
        return self.values[operand.source.param, names.get(operand.role, operand.source.key)]

    def measure(self, look: int = 0, seed: int = 0, rounding: str = "nearest") -> Found:
        return perturbations(measure_directly(self.unit, self, look, seed, rounding))

    def wide(self, name: str, number: int = 0) -> Floats:
        value = self.values[number, name]
        dense = value.dequantize() if isinstance(value, PackedState) else value
        return dense.double().numpy().reshape(-1, BLOCK)


# Levels, from the definitions in `stq_compile.formats`. -----------------------------------------


def rounded_up(x: Floats, bits: int) -> Floats:
    """To ``bits`` significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.ceil(mantissa * 2.0**bits) / 2.0**bits, exponent)


def softsign_levels(x: Floats, width: int) -> Floats:
    top = 2 ** (width - 1) - 1
    k = np.arange(-top, top + 1)
    scale = rounded_up(np.abs(x).max(1, keepdims=True), 8)
    return scale * (k / (2 * top - np.abs(k)))


def midrise_levels(x: Floats, width: int) -> Floats:
    half = (2**width - 1) / 2
    reach = np.abs(x).max(1, keepdims=True) * (1 - 2.0**-20)
    if width < 4:
        reach = np.sqrt((x**2).mean(1, keepdims=True)) * {2: 1.6, 3: 2.6}[width]
    step = rounded_up(reach / half, 8)
    return step * (np.arange(2**width) - half)


def linear(y: Floats) -> Floats:
    """Logarithms that are linear between powers of two, which is how a float's bits read."""
    mantissa, exponent = np.frexp(y)
    return np.asarray(exponent + 2 * mantissa)


def log_levels(x: Floats, width: int) -> Floats:
    """Octaves below the scale, by `linear`."""
    octaves = np.maximum(linear(x) - linear(rounded_up(x.max(1, keepdims=True), 4)), -15)
    wanted = TAIL_DEVIATIONS[width] * octaves.std(1, keepdims=True) - octaves.mean(1, keepdims=True)
    steps = np.clip(np.ceil(wanted / (14 / 32)), 1, 32)
    return -steps * 14 / 32 * (1 - np.arange(2**width) / (2**width - 1))


def nearest(x: Floats, levels: Floats) -> Floats:
    distance = np.abs(x[:, :, None] - levels[:, None, :])
    return np.take_along_axis(levels, distance.argmin(2), 1)


def signed(x: Floats, width: int, unit: Floats | None = None) -> Floats:
    if unit is None:
        return nearest(x, softsign_levels(x, width))
    if width == 8:
        unit = 2.0 ** np.floor(np.frexp(unit**2)[1] / 2)
    value = x / unit
    return unit * nearest(value, midrise_levels(value, width))


def positive(x: Floats, width: int) -> Floats:
    scale = linear(rounded_up(x.max(1, keepdims=True), 4))
    found = scale + nearest(linear(x) - scale, log_levels(x, width))
    whole = np.floor(found)
    return np.ldexp((1 + found - whole) / 2, whole.astype(int) - 1)


# Updates. ---------------------------------------------------------------------------------------


def adam_update(m: Floats, v: Floats, g: Floats) -> Floats:
    m, v = averaged(m, v, g)
    return -LR * m / (np.sqrt(v) + EPS)


def averaged(m: Floats, v: Floats, g: Floats) -> tuple[Floats, Floats]:
    return BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g


def kept(a: float, rounding: str = "nearest") -> float:
    return persistence(1 / (1 - a * a), rounding)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_momentum(width: int) -> None:
    live = Live(sgd(), [NUMEL])
    m, g = live.wide("momentum_buffer"), live.wide("grad")
    new = 0.9 * signed(m, width) + g
    noise = LR * 0.9 * (signed(new, width) - new)
    expected = (noise**2).sum() * kept(0.9) / ((LR * (0.9 * m + g)) ** 2).sum()
    found = live.measure()[0, "momentum_buffer"][width]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_momentum_in_units_of_a_root(width: int) -> None:
    """The unit moves too: the old one before the step, the new one after it."""
    live = Live(adam(), [NUMEL])
    m, v, g = (live.wide(n) for n in ("exp_avg", "exp_avg_sq", "grad"))
    on_grid = signed(m, width, np.sqrt(v))
    new, new_v = averaged(on_grid, v, g)
    stored = signed(new, width, np.sqrt(new_v))
    noise = (adam_update(stored, v, g) - adam_update(new, v, g)) ** 2 * kept(BETAS[0])
    cut = 0.0
    if width < 4:
        rms = np.sqrt((m**2 / v).mean(1, keepdims=True))
        reach = rms * {2: 1.6, 3: 2.6}[width]
        clipped = np.clip(m / np.sqrt(v), -reach, reach) * np.sqrt(v)
        cut = (adam_update(clipped, v, g) - adam_update(m, v, g)) ** 2
    expected = (noise + cut).sum() / (adam_update(m, v, g) ** 2).sum()
    assert live.measure()[0, "exp_avg"][width] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_second_moment(width: int) -> None:
    """Noise is bounded by the update itself; what lies below the range is cut."""
    live = Live(adam(), [NUMEL])
    m, v, g = (live.wide(n) for n in ("exp_avg", "exp_avg_sq", "grad"))
    _, new = averaged(m, positive(v, width), g)
    noise = (adam_update(m, positive(new, width), g) - adam_update(m, new, g)) ** 2
    noise = np.minimum(noise * kept(BETAS[1]), adam_update(m, new, g) ** 2)
    cut = (adam_update(m, positive(v, 8), g) - adam_update(m, v, g)) ** 2
    expected = (noise + cut).sum() / (adam_update(m, v, g) ** 2).sum()
    # A few elements lie on the border between two levels, or a range on the border of its steps.
    assert live.measure()[0, "exp_avg_sq"][width] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_sign(width: int) -> None:
    """The error counts at its settled size: what it flips."""
    live = Live(lion(), [NUMEL])
    m, g = live.wide("exp_avg"), live.wide("grad")

    def update(x: Floats) -> Floats:
        return -LR * np.sign(0.9 * x + 0.1 * g)

    new = 0.99 * signed(m, width) + 0.01 * g
    stored = new + (signed(new, width) - new) * math.sqrt(kept(0.99))
    expected = ((update(stored) - update(new)) ** 2).sum() / (update(m) ** 2).sum()
    assert live.measure()[0, "exp_avg"][width] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_stochastic_rounding_on_average(width: int) -> None:
    """Of many seeds; in float64 every value goes to a neighbour with the linear probability."""
    live = Live(sgd(), [NUMEL])
    m, g = live.wide("momentum_buffer"), live.wide("grad")
    rng = np.random.default_rng(0)

    def drawn(x: Floats) -> Floats:
        levels = softsign_levels(x, width)
        above = (levels[:, None, :] <= x[:, :, None]).sum(2).clip(1, levels.shape[1] - 1)
        low, high = (np.take_along_axis(levels, above - i, 1) for i in (1, 0))
        return np.where(rng.random(x.shape) < (x - low) / (high - low), high, low)

    news = [0.9 * drawn(m) + g for _ in range(20)]
    noise = np.mean([((LR * 0.9 * (drawn(new) - new)) ** 2).sum() for new in news])
    expected = noise * kept(0.9, "stochastic") / ((LR * (0.9 * m + g)) ** 2).sum()
    found = [live.measure(0, seed, "stochastic")[0, "momentum_buffer"][width] for seed in range(20)]
    assert np.mean(found) == pytest.approx(expected, rel=0.03)


# Samples. ---------------------------------------------------------------------------------------


def test_tensors_are_measured_together_and_each_for_itself() -> None:
    """Tails and tensors of less than a block are left out; packed states are decoded."""
    sizes = [NUMEL, 50, 3 * BLOCK + 17]
    live = Live(adam(), sizes)
    for number in (0, 2):
        v = PackedState.pack(live.values[number, "exp_avg_sq"], FORMATS["adaptive_log6"])
        live.values[number, "exp_avg_sq"] = v
        m = PackedState.pack(
            live.values[number, "exp_avg"], FORMATS["midrise6"], normalizer=v.packed
        )
        live.values[number, "exp_avg"] = m
    together = live.measure()
    assert {number for number, _ in together} == {0, 2}
    for number in (0, 2):
        whole = sizes[number] // BLOCK * BLOCK
        alone = Live(adam(), [whole])
        alone.values = {
            (0, name): (v.dequantize() if isinstance(v, PackedState) else v)[:whole]
            for (n, name), v in live.values.items()
            if n == number
        }
        for key in ("exp_avg", "exp_avg_sq"):
            expected = alone.measure()[0, key]
            assert together[number, key] == pytest.approx(expected, rel=1e-5)


def test_another_look_takes_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block's gradient is NaN, nothing is found exactly if the block is sampled."""
    monkeypatch.setattr("stq_compile.planner.direct.WIDTHS", (4,))
    live = Live(sgd(), [2 * NUMEL])
    grad = live.values[0, "grad"]
    seen: list[set[int]] = [set(), set()]
    for look, block in itertools.product((0, 1), range(2 * BLOCKS)):
        first = float(grad[block * BLOCK])
        grad[block * BLOCK] = math.nan
        if not live.measure(look):
            seen[look].add(block)
        grad[block * BLOCK] = first
    assert [len(s) for s in seen] == [BLOCKS, BLOCKS]
    assert not seen[0] & seen[1]


def test_no_update_no_measurement() -> None:
    live = Live(sgd(), [NUMEL])
    for name in ("grad", "momentum_buffer"):
        live.values[0, name] = torch.zeros(NUMEL)
    assert live.measure() == {}
