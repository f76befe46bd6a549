"""Every factor against its definition, in float64; their sums over shards; their size."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphs import only, program, with_sizes
from stq_compile import error_law
from stq_compile.formats import BLOCK, WIDTHS, choose_format
from stq_compile.options import Options
from stq_compile.passes.measure import LADDER, RANGE_SUMS, measure, slots_of
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.planner.factors import FACTOR_NAMES, Measured, interpret
from stq_compile.planner.planner import Managed, Planner
from zoo import adam

Floats = NDArray[np.float64]
Sums = dict[str, float]
NUMEL = 40 * BLOCK + 37  # the last block is partly padding


def tensors(seed: int = 0, octaves: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A state before and after a step, and the gradient; some elements are zero."""
    generator = torch.Generator().manual_seed(seed)
    size, old, moved, grad = torch.randn(4, NUMEL, generator=generator)
    size = torch.exp2(octaves * size)
    new = size * (old + 0.3 * moved**3)
    new[::11] = 0
    return size * old, new, grad


def sums_of(old: Tensor, new: Tensor, grad: Tensor) -> Sums:
    """As a measuring kernel sums them."""
    values = error_law.sums(error_law.factors(old, new, grad)).tolist()
    found = {f"s:{name}": v for name, v in zip(error_law.FACTORS, values, strict=True)}
    errors = {f"s:error_{w}": 0.5**w * float(new.double().square().sum()) for w in LADDER}
    update = float((grad.double() ** 2).sum())
    return found | errors | {"count": float(len(new)), "update": update, "param": update}


def measured(sums: Mapping[str, float], before: Measured | None = None) -> Measured:
    found = interpret(sums, "s", before)
    assert found is not None
    return found


def scales(x: Floats) -> Floats:
    """Each element's block maximum, rounded up to 8 significant bits."""
    starts = np.arange(0, len(x), BLOCK)
    largest = np.maximum.reduceat(np.abs(x), starts)
    mantissa, exponent = np.frexp(largest)
    up = np.ldexp(np.ceil(mantissa * 256) / 256, exponent)
    return np.repeat(up, BLOCK)[: len(x)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_factor_is_what_it_is_said_to_be(seed: int) -> None:
    old, new, grad = tensors(seed)
    before = measured(sums_of(*(x * 2.0**-3 for x in (old, old, grad))))
    found = measured(sums_of(old, new, grad), before)
    x, y, g = (t.double().numpy() for t in (new, old, grad))
    scale = scales(x)
    magnitude, increment = np.abs(x) / scale, np.minimum(np.abs(x - y) / scale, 16)
    with np.errstate(divide="ignore"):
        octaves = np.maximum(np.log2(magnitude), -24)
    half_a_level = (1 + magnitude) ** 2 / 14 / 2
    expected = {
        "range": octaves.std(),
        "crest": -np.log2(np.sqrt((magnitude**2).mean())),
        "kurtosis": np.log2((magnitude**4).mean() / (magnitude**2).mean() ** 2),
        "zeros": (x == 0).mean(),
        "increment": np.log2(increment.mean() / magnitude.mean()),
        "swamped": (increment < half_a_level).mean(),
        "agreement": (x * g > 0).mean(),
        "scale_spread": np.log2(scale).std(),
        "scale_drift": (np.log2(scale) - np.log2(scales(y / 8))).mean(),
    }
    assert found.factors == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-3)
    assert found.level == pytest.approx(np.log2(scale).mean(), rel=1e-4)
    assert measured(sums_of(old, new, grad)).factors["scale_drift"] == 0
    for width in LADDER:
        assert found.errors[width] == pytest.approx(0.5**width * (x**2).sum() / (g**2).sum())
        assert found.at(width).keys() == set(FACTOR_NAMES)
        assert found.at(width)["narrowness"] == 2.0**-width
        assert found.at(width)["predicted"] == pytest.approx(np.log(found.errors[width]))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_sums_of_shards_add_up_to_those_of_the_whole(order: Sequence[int]) -> None:
    """Shards of whole blocks, added in any order: the same factors to the last bit."""
    old, new, grad = tensors()
    borders = [0, 7 * BLOCK, 8 * BLOCK, 31 * BLOCK, NUMEL]
    parts = [
        sums_of(*(t[start:end] for t in (old, new, grad)))
        for start, end in itertools.pairwise(borders)
    ]
    whole, added = sums_of(old, new, grad), dict.fromkeys(parts[0], 0.0)
    for shard in order:
        for name, value in parts[shard].items():
            added[name] += value
    assert measured(added) == measured(whole)
    assert measured(parts[0]) != measured(whole)


def test_a_step_without_an_update_measures_nothing() -> None:
    sums = sums_of(*tensors())
    for update in (0.0, float("nan"), float("inf")):
        assert interpret({**sums, "update": update}, "s", None) is None
    least = (2.0**-24) ** 2 * sums["param"]  # half of a last bit of every element
    assert interpret({**sums, "update": 5 * least}, "s", None) is None
    assert interpret({**sums, "update": 20 * least}, "s", None) is not None
    assert interpret({**sums, "count": 0.0}, "s", None) is None


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_lost_to_elements_below_the_range(stored: bool) -> None:
    """Adam's update of 1 in 100 elements is due, squares of 90 of them are at 2^-6 of where their
    block's range ends; whether they were stored there, and so move 1/8 as far, or not."""
    sums = sums_of(*tensors())
    seen = 90.0 / 64 if stored else 90.0
    ends = {
        "end_update": seen, "end_effect": seen / 4, "end_stored": 90.0 * 64,
        "end_old": 90.0 * 64 if stored else 90.0, "end_fed": 90.0,
    }  # fmt: skip
    row = sums | {"update": 10 + seen} | {f"s:{name}": v for name, v in ends.items()}
    assert measured(row).lost == pytest.approx(0.9 * (1 - 1 / 8) ** 2)
    assert measured(row | {"s:end_fed": 90.0 * 64}).lost == 0  # they are where they belong
    assert measured(row | {"s:end_update": 0.0}).lost == 0  # and these do not move
    assert measured(sums).lost == 0


def test_a_look_is_averaged_with_the_last_one_and_falls_no_faster_than_noise_fades() -> None:
    first = measured(sums_of(*tensors()))
    for factor, kept, expected in (
        (4.0, 0.0, 2.0), (0.25, 0.0, 0.5), (0.01, 0.3, 0.3), (0.25, 1.0, 1.0), (4.0, 1.0, 2.0),
    ):  # fmt: skip
        errors = {w: factor * e for w, e in first.errors.items()}
        now = Measured(errors, first.factors, first.level)
        after = now.after(first, kept)
        for width, error in first.errors.items():
            assert after.errors[width] == pytest.approx(expected * error)
        assert after.factors == now.factors


def test_numbers_per_state_do_not_depend_on_its_size() -> None:
    """Of a look, and of all that a planner keeps."""
    slots = []
    for sizes in ([100], [1 << 20, 5]):
        analysed = find_recurrences(
            find_normalizers(find_ranges(program(with_sizes(adam(), sizes))))
        )
        slots.append(slots_of(only(measure(analysed, "stochastic"))))
    assert slots[0] == slots[1]
    per_state = len(LADDER) + len(error_law.FACTORS)
    assert len(slots[0]) == 3 + 2 * per_state + len(RANGE_SUMS)

    def kept(numel: int) -> int:
        planner = Planner(Options.from_dict({}))
        formats = {w: choose_format(w, nonnegative=False, normalizable=False) for w in WIDTHS}
        nbytes = {w: f.nbytes(numel) for w, f in formats.items()}
        prior = dict.fromkeys(LADDER, 0.1)
        planner.enroll([Managed((0, "s"), "p", "s", numel, nbytes, prior)], 0, numel, 0)
        rng = random.Random(0)
        for step in range(5):
            sums = sums_of(*tensors(step))
            planner.look({0: sums})
            planner.observe({(0, "s"): {w: rng.uniform(0.1, 0.2) for w in LADDER[:6]}})
            planner.decide(step, 0, numel)
        plain = {k: v for k, v in planner.state_dict().items() if k != "history"}
        return len(json.dumps(plain))

    assert kept(1 << 30) == pytest.approx(kept(1 << 10), rel=0.05)
