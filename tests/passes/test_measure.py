"""Measuring graphs: sensitivities and factors against derivations by hand, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from numpy.typing import NDArray
from torch import Tensor

import stq_compile as stq
from graphs import Sketch, Values, assert_pure, aten, only, program, random_inputs, run, with_sizes
from stq_compile import error_law
from stq_compile.backend import session_of
from stq_compile.passes.measure import (
    HORIZON,
    LADDER,
    LONGEST,
    RANGE_SUMS,
    SUMS,
    amplification,
    forgetting,
    formats_of,
    is_smooth,
    measure,
    measured_states,
    slots_of,
    sustained,
    with_packed_normalizers,
)
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import Operand, Recurrence, StepGraph
from zoo import ADAM_FACTS, EPS, LR, adagrad, adam, adamax, amsgrad, descend, lion, rmsprop, sgd

Doubles = NDArray[np.float64]
Numbers = Mapping[str, Any]
"""Inputs in float64, by the state's key, ``param``, ``grad`` or the scalar's name."""
Derivation = Callable[[Numbers], tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]]
"""Update, slopes d(update)/d(state), and new states."""

NUMEL = 300  # two blocks and a part of one


def analysed(unit: StepGraph) -> StepGraph:
    """The unit with its facts, made for tensors of ``NUMEL``: a traced graph holds its sizes."""
    for node in unit.placeholders:
        if node.meta["example"].dim():
            node.meta["example"] = torch.empty(NUMEL, device="meta")
    sized = with_sizes(unit, [NUMEL])
    return only(find_recurrences(find_normalizers(find_ranges(program(sized)))))


def captured(name: str, *changes: dict[str, Any], **options: Any) -> StepGraph:
    """The functional template of an optimizer of torch, with its facts; what ``changes`` between
    its steps are inputs of it."""
    p = torch.nn.Parameter(torch.randn(NUMEL))
    optimizer = getattr(torch.optim, name)([p], **options)
    stq.compile(optimizer, precision=32)
    for change in changes or ({}, {}):
        optimizer.param_groups[0].update(change)
        p.grad = torch.randn(NUMEL)
        optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    return max(session.compiled, key=lambda s: s.number).program.units[0]


# Derivations by hand. -------------------------------------------------------------------------


def adam_by_hand(n: Numbers) -> tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]:
    m, v = 0.9 * n["exp_avg"] + 0.1 * n["grad"], 0.99 * n["exp_avg_sq"] + 0.01 * n["grad"] ** 2
    root = np.sqrt(v)
    slopes = {
        "exp_avg": -LR * 0.9 / (root + EPS),
        "exp_avg_sq": LR * m * 0.99 / (2 * root * (root + EPS) ** 2),
    }
    return -LR * m / (root + EPS), slopes, {"exp_avg": m, "exp_avg_sq": v}


def adamw_by_hand(n: Numbers) -> tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]:
    """lr 0.02, betas (0.8, 0.95), eps 1e-8, weight decay 0.1."""
    m, v = 0.8 * n["exp_avg"] + 0.2 * n["grad"], 0.95 * n["exp_avg_sq"] + 0.05 * n["grad"] ** 2
    step = n["step"] + 1
    size, correction = 0.02 / (1 - 0.8**step), math.sqrt(1 - 0.95**step)
    root = np.sqrt(v)
    denominator = root / correction + 1e-8
    slopes = {
        "exp_avg": -size * 0.8 / denominator,
        "exp_avg_sq": size * m / denominator**2 * 0.95 / (2 * root * correction),
    }
    update = -0.02 * 0.1 * n["param"] - size * m / denominator
    return update, slopes, {"exp_avg": m, "exp_avg_sq": v}


def sgd_by_hand(n: Numbers) -> tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]:
    m = 0.9 * n["momentum_buffer"] + n["grad"]
    return -LR * m, {"momentum_buffer": np.full_like(m, -LR * 0.9)}, {"momentum_buffer": m}


def nesterov_by_hand(n: Numbers) -> tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]:
    """lr 0.05, momentum 0.7."""
    m = 0.7 * n["momentum_buffer"] + n["grad"]
    slopes = {"momentum_buffer": np.full_like(m, -0.05 * 0.7 * 0.7)}
    return -0.05 * (n["grad"] + 0.7 * m), slopes, {"momentum_buffer": m}


def rmsprop_by_hand(n: Numbers) -> tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]:
    v = 0.99 * n["square_avg"] + 0.01 * n["grad"] ** 2
    root = np.sqrt(v)
    buffer = 0.9 * n["momentum_buffer"] + n["grad"] / (root + EPS)
    slopes = {
        "square_avg": LR * n["grad"] * 0.99 / (2 * root * (root + EPS) ** 2),
        "momentum_buffer": np.full_like(root, -LR * 0.9),
    }
    return -LR * buffer, slopes, {"square_avg": v, "momentum_buffer": buffer}


def adagrad_by_hand(n: Numbers) -> tuple[Doubles, dict[str, Doubles], dict[str, Doubles]]:
    total = n["sum"] + n["grad"] ** 2
    root = np.sqrt(total)
    slopes = {"sum": LR * n["grad"] / (2 * root * (root + EPS) ** 2)}
    return -LR * n["grad"] / (root + EPS), slopes, {"sum": total}


ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
SMOOTH: dict[str, tuple[Callable[[], StepGraph], Derivation]] = {
    "adam": (lambda: analysed(adam()), adam_by_hand),
    "sgd": (lambda: analysed(sgd()), sgd_by_hand),
    "rmsprop": (lambda: analysed(rmsprop(centered=False)), rmsprop_by_hand),
    "adagrad": (lambda: analysed(adagrad()), adagrad_by_hand),
    "AdamW": (lambda: captured("AdamW", **ADAMW), adamw_by_hand),
    "SGD": (
        lambda: captured("SGD", lr=0.05, momentum=0.7, nesterov=True), nesterov_by_hand
    ),
}  # fmt: skip
"""Sketched ones in small letters, and torch's own as they are captured."""


# Inputs and results. --------------------------------------------------------------------------


def inputs_of(unit: StepGraph) -> Values:
    return random_inputs(unit, seed=3, positive=tuple(unit.facts.nonnegative))


def numbers_of(unit: StepGraph, values: Values) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for operand in unit.operands:
        value = values[operand.name].double().numpy()
        found[operand.source.key or str(operand.role)] = value if value.ndim else float(value)
    return found


def sums_of(unit: StepGraph, values: Values, rounding: str = "stochastic") -> dict[str, float]:
    """What the measuring graph gives when it is run eagerly."""
    after = assert_pure(lambda p: measure(p, rounding), program(unit))  # type: ignore[arg-type]
    measuring = only(after)
    result = run(measuring, values | {SUMS: torch.empty(0, dtype=torch.float64)})[SUMS]
    return dict(zip(slots_of(measuring), result.tolist(), strict=True))


def law_of(unit: StepGraph, key: str, width: int, old: Doubles, new: Mapping[str, Doubles],
           rounding: str = "stochastic", decay: float | None = None) -> Doubles:  # fmt: skip
    """The settled error, with the persistence put in by hand; `error_law` has its own tests."""
    decay = unit.facts.recurrences[key].value if decay is None else decay
    assert decay is not None
    kept = (1 + 1 / (1 - decay**2)) / 2 if decay < 1 else math.inf
    if rounding == "nearest" and decay < 1:
        kept = 1 / (1 - decay) ** 2
    normalizer = unit.facts.normalizers.get(key)
    v = None if normalizer is None else single(new[normalizer])
    format = formats_of(unit, key)[width]
    error = error_law.settled_error(single(old), single(new[key]), v, format, kept, rounding)
    return error.double().numpy()


def single(x: Doubles) -> Tensor:
    return torch.from_numpy(x).float()


@pytest.mark.parametrize("name", SMOOTH)
def test_sums_of_squares_against_derivations_by_hand(name: str) -> None:
    make, by_hand = SMOOTH[name]
    unit = make()
    values = inputs_of(unit)
    numbers = numbers_of(unit, values)
    update, slopes, new = by_hand(numbers)
    found = sums_of(unit, values)
    assert found["count"] == NUMEL
    assert found["update"] == pytest.approx(float((update**2).sum()), rel=2e-5)
    assert found["param"] == pytest.approx(float((numbers["param"] ** 2).sum()), rel=1e-6)
    assert {o.source.key for o in measured_states(unit)} == set(slopes)
    for key, slope in slopes.items():
        for width in LADDER:
            error = law_of(unit, key, width, numbers[key], new)
            expected = float(((slope * error) ** 2).sum())
            assert expected > 0
            assert found[f"{key}:error_{width}"] == pytest.approx(expected, rel=2e-4), (key, width)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_decays_are_those_of_the_look_and_not_of_the_capture(rounding: str) -> None:
    schedule = [{"betas": (0.95 - i / 10, 0.99 - i / 100)} for i in range(3)]
    unit = captured("AdamW", *schedule, **ADAMW)
    values = inputs_of(unit)
    recurrences = unit.facts.recurrences
    betas = [recurrences[key].scalars[0] for key in ("exp_avg", "exp_avg_sq")]
    assert [recurrences[key].kind for key in recurrences] == ["average", "average"]
    for name, present in zip(betas, (0.8, 0.95), strict=True):  # as `adamw_by_hand` has them
        assert values[name] != present
        values[name] = torch.tensor(present, dtype=torch.float64)
    numbers = numbers_of(unit, values)
    _, slopes, new = adamw_by_hand(numbers)
    found = sums_of(unit, values, rounding)
    for key, decay in (("exp_avg", 0.8), ("exp_avg_sq", 0.95)):
        for width in LADDER:
            error = law_of(unit, key, width, numbers[key], new, rounding, decay)
            expected = float(((slopes[key] * error) ** 2).sum())
            assert found[f"{key}:error_{width}"] == pytest.approx(expected, rel=2e-4), (key, width)

    def live(operand: Operand) -> Tensor:
        return values[operand.name]

    shares = forgetting(program(unit), live)
    assert shares == {
        (0, "exp_avg"): pytest.approx(0.8**2), (0, "exp_avg_sq"): pytest.approx(0.95**2)
    }  # fmt: skip


def test_what_lies_below_the_range_against_a_derivation_by_hand() -> None:
    unit = analysed(adam())
    values = inputs_of(unit)
    values["exp_avg_sq_0"][::128] = 2.0**30  # the scale of each block; all others lie below
    values["grad_0"][::3] = 0.0  # says nothing about the state
    numbers = numbers_of(unit, values)
    update, slopes, _ = adam_by_hand(numbers)
    found = sums_of(unit, values)
    old = numbers["exp_avg_sq"]
    below = (np.arange(NUMEL) % 128 != 0) & (np.arange(NUMEL) % 3 != 0)
    end = 2.0**16 * (1 + (2**23 * 14 - 14392 * 32 * 255) / 2**23)  # 14 octaves down, rounded
    expected = {
        "end_update": (update**2)[below].sum(),
        "end_effect": ((slopes["exp_avg_sq"] * old) ** 2)[below].sum(),
        "end_stored": below.sum() * end,
        "end_old": old[below].sum(),
        "end_fed": (numbers["grad"] ** 2)[below].sum(),
    }
    assert list(expected) == list(RANGE_SUMS)
    for name, value in expected.items():
        assert found[f"exp_avg_sq:{name}"] == pytest.approx(float(value), rel=2e-4), name
    assert not any(f"exp_avg:{name}" in found for name in RANGE_SUMS)


def test_nearest_rounding_adds_up() -> None:
    unit = analysed(sgd())
    values = inputs_of(unit)
    numbers = numbers_of(unit, values)
    _, slopes, new = sgd_by_hand(numbers)
    found = sums_of(unit, values, "nearest")
    for width in LADDER:
        error = law_of(unit, "momentum_buffer", width, numbers["momentum_buffer"], new, "nearest")
        expected = float(((slopes["momentum_buffer"] * error) ** 2).sum())
        assert found[f"momentum_buffer:error_{width}"] == pytest.approx(expected, rel=2e-4)


def factors_by_hand(old: Doubles, new: Doubles, grad: Doubles) -> dict[str, float]:
    """The sums of `error_law.FACTORS`, from the text of its documentation."""
    found = dict.fromkeys(error_law.FACTORS, 0.0)
    for start in range(0, len(new), 128):
        x, before, g = (a[start : start + 128] for a in (new, old, grad))
        fraction, exponent = math.frexp(np.abs(x).max())
        scale = math.ldexp(math.ceil(fraction * 256), exponent) / 256
        a, d = np.abs(x) / scale, np.abs(x - before) / scale
        octaves = np.log2(np.maximum(a, 2.0**-24))
        level = math.log2(scale)
        block: dict[str, Any] = {
            "magnitude": a, "energy": a**2, "fourth": a**4, "octaves": octaves,
            "octaves_squared": octaves**2, "zeros": x == 0, "increment": d,
            "swamped": d < (1 + a) ** 2 / 28, "agreement": x * g > 0,
            "scale": np.full_like(x, level), "scale_squared": np.full_like(x, level**2),
        }  # fmt: skip
        for key, value in block.items():
            found[key] += float(value.sum())
    return found


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_every_factor_against_its_definition(name: str) -> None:
    make, by_hand = SMOOTH[name]
    unit = make()
    values = inputs_of(unit)
    for key in ("exp_avg_0", "momentum_buffer_0", "grad_0"):
        if key in values:
            values[key][40:60] = 0.0  # zeros that stay zeros
    numbers = numbers_of(unit, values)
    _, slopes, new = by_hand(numbers)
    found = sums_of(unit, values)
    for key in slopes:
        stored = single(new[key]).double().numpy()
        for factor, expected in factors_by_hand(numbers[key], stored, numbers["grad"]).items():
            got = found[f"{key}:{factor}"]
            if factor in ("zeros", "agreement", "swamped"):
                assert got == expected, (key, factor)
            assert got == pytest.approx(expected, rel=2e-5), (key, factor)
    zeros = max(v for k, v in found.items() if k.endswith(":zeros"))
    assert zeros == (0 if name == "adagrad" else 20)


# Updates that are not smooth. -----------------------------------------------------------------


def test_a_sign_is_measured_by_the_flips_that_an_error_causes() -> None:
    unit = analysed(lion())
    values = inputs_of(unit)
    numbers = numbers_of(unit, values)
    m, g = numbers["exp_avg"], numbers["grad"]
    new = {"exp_avg": 0.99 * m + 0.01 * g}
    found = sums_of(unit, values)
    before = np.sign(0.9 * m + 0.1 * g)
    assert found["update"] == pytest.approx(LR**2 * NUMEL, rel=1e-5)
    flips = []
    for width in LADDER:
        error = law_of(unit, "exp_avg", width, m, new)
        up, down = (np.sign(0.9 * (m + e) + 0.1 * g) for e in (error, -error))
        flips.append(int((up != before).sum() + (down != before).sum()))
        expected = LR**2 * float((((up - before) ** 2 + (down - before) ** 2) / 2).sum())
        assert found[f"exp_avg:error_{width}"] == pytest.approx(expected, rel=1e-4), width
    assert flips == sorted(flips, reverse=True)
    assert flips[0] > NUMEL / 4
    assert flips[-2] > 0


def clipped_by_v() -> StepGraph:
    """The update is zero where ``v`` is small; an error of ``v`` decides which."""
    s = Sketch("clipped")
    p, g, m, v = s.param(), s.grad(), s.state("m"), s.state("v")
    square = s.call(aten.mul.Tensor, g, g)
    new_v = s.call(
        aten.add.Tensor, s.call(aten.mul.Tensor, v, 0.9), s.call(aten.mul.Tensor, square, 0.1)
    )
    new_m = s.call(
        aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), s.call(aten.mul.Tensor, g, 0.1)
    )
    large = s.call(aten.gt.Scalar, new_v, 0.5)
    update = s.call(aten.where.self, large, new_m, s.call(aten.mul.Tensor, new_m, 0.0))
    return s.functional({m: new_m, v: new_v, p: descend(s, p, update)})


def test_differences_of_a_nonnegative_state_stay_nonnegative() -> None:
    unit = analysed(clipped_by_v())
    assert unit.facts.nonnegative == {"v"}
    values = inputs_of(unit)
    numbers = numbers_of(unit, values)
    m, v, g = numbers["m"], numbers["v"], numbers["grad"]
    new = {"m": 0.9 * m + 0.1 * g, "v": 0.9 * v + 0.1 * g**2}
    found = sums_of(unit, values)

    def moved(x: Doubles) -> Doubles:
        return np.where(0.9 * x + 0.1 * g**2 > 0.5, -LR * new["m"], 0.0)

    for width in LADDER[:-1]:
        error = law_of(unit, "v", width, v, new)
        low, high = moved(np.maximum(v - error, 0)) - moved(v), moved(v + error) - moved(v)
        expected = float(((low**2 + high**2) / 2).sum())
        assert found[f"v:error_{width}"] == pytest.approx(expected, rel=1e-3), width


def test_what_is_smooth() -> None:
    states = {
        "adam": (adam, {"exp_avg_0": True, "exp_avg_sq_0": True}),
        "lion": (lion, {"exp_avg_0": False}),
        "sgd": (sgd, {"momentum_buffer_0": True}),
        # A maximum has a derivative that is right almost everywhere.
        "amsgrad": (amsgrad, {"exp_avg_0": True, "max_exp_avg_sq_0": True}),
        # Only v decides; m passes through.
        "clipped": (clipped_by_v, {"m_0": True, "v_0": False}),
    }
    for name, (make, expected) in states.items():
        unit = make()
        assert {state: is_smooth(unit, state) for state in expected} == expected, name


def test_a_comparison_that_does_not_reach_the_parameter_leaves_it_smooth() -> None:
    s = Sketch()
    p, g, m, hits = s.param(), s.grad(), s.state("m"), s.state("hits")
    new = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), g)
    count = s.call(aten.add.Tensor, hits, s.call(aten.sign.default, new))
    unit = s.functional({m: new, hits: count, p: descend(s, p, new)})
    assert is_smooth(unit, "m_0")


# Which states. --------------------------------------------------------------------------------


def keys(unit: StepGraph) -> set[str]:
    return {o.source.key for o in measured_states(analysed(unit))}


def test_fragile_states_and_counters_are_not_measured() -> None:
    assert keys(amsgrad()) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert keys(adamax()) == {"exp_avg", "exp_inf"}
    # The root of v - m^2 may become NaN by an error of either: both are fragile.
    assert keys(rmsprop(centered=True)) == {"momentum_buffer"}
    fragile = analysed(rmsprop(centered=True)).facts.fragile
    assert set(fragile) == {"square_avg", "grad_avg"}


def test_a_unit_that_moves_no_parameter_is_not_measured() -> None:
    s = Sketch()
    g, m = s.grad(), s.state("m")
    s.param()
    unit = s.functional({m: s.call(aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), g)})
    assert measure(program(analysed(unit)), "stochastic").units == ()


def test_formats_follow_from_the_facts() -> None:
    unit = analysed(adam())
    names = {w: f.name for w, f in formats_of(unit, "exp_avg").items()}
    assert names == {2: "midrise2", 3: "midrise3", 4: "midrise4", 5: "midrise5", 6: "midrise6",
                     8: "midrise8", 16: "bfloat16"}  # fmt: skip
    names = {w: f.name for w, f in formats_of(unit, "exp_avg_sq").items()}
    assert names == {w: f"adaptive_log{w}" for w in (2, 3, 4, 5, 6, 8)} | {16: "bfloat16"}
    names = {w: f.name for w, f in formats_of(analysed(sgd()), "momentum_buffer").items()}
    assert names == {w: f"softsign{w}" for w in (2, 3, 4, 5, 6, 8)} | {16: "bfloat16"}


def test_how_long_an_error_persists() -> None:
    found = analysed(adam()).facts.recurrences
    assert amplification(found["exp_avg"], {}) == pytest.approx(1 / 0.19)
    assert amplification(found["exp_avg_sq"], {}) == pytest.approx(1 / (1 - 0.99**2))
    assert amplification(analysed(adagrad()).facts.recurrences["sum"], {}) == math.inf
    assert amplification(None, {}) == HORIZON
    assert amplification(Recurrence("unknown"), {}) == HORIZON
    assert amplification(analysed(amsgrad()).facts.recurrences["max_exp_avg_sq"], {}) == HORIZON
    step = sympy.Symbol("step")
    factored = Recurrence("average", 1 - step ** sympy.Rational(-4, 5), 0.0)  # as of Adafactor
    for now in (1.0, 100.0):
        decay = 1 - now**-0.8
        assert float(amplification(factored, {"step": torch.tensor(now)})) == pytest.approx(
            1 / (1 - decay**2), rel=1e-5
        )
    assert float(amplification(factored, {"step": torch.tensor(1e30)})) == pytest.approx(LONGEST)


# The graph. -----------------------------------------------------------------------------------


def test_the_slots_are_named_in_order() -> None:
    unit = only(measure(program(analysed(adam())), "stochastic"))
    expected = ["count", "update", "param"]
    for key in ("exp_avg", "exp_avg_sq"):
        expected += [f"{key}:error_{w}" for w in LADDER]
        expected += [f"{key}:{n}" for n in RANGE_SUMS if key == "exp_avg_sq"]
        expected += [f"{key}:{f}" for f in error_law.FACTORS]
    assert list(slots_of(unit)) == expected
    assert unit.writes == (SUMS,)
    assert unit.operands[-1].name == SUMS


def test_sgd_measured(stq_golden: Golden) -> None:
    stq_golden(str(only(measure(program(analysed(sgd())), "stochastic"))))


def with_rate() -> StepGraph:
    s = Sketch("with_rate")
    lr, p, g, m = s.scalar("lr", 0.0), s.param(), s.grad(), s.state("m")
    new = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), g)
    return s.functional({m: new, p: s.call(aten.sub.Tensor, p, s.call(aten.mul.Tensor, new, lr))})


def test_a_learning_rate_of_zero_gives_no_update_and_no_error() -> None:
    unit = analysed(with_rate())
    found = sums_of(unit, inputs_of(unit))
    assert found["update"] == 0
    assert [found[f"m:error_{w}"] for w in LADDER] == [0] * len(LADDER)
    assert found["m:magnitude"] > 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_counts_as_zero(broken: float) -> None:
    unit = analysed(adam())
    values = inputs_of(unit)
    values["grad_0"][5] = broken
    found = sums_of(unit, values)
    assert all(map(math.isfinite, found.values()))
    whole = sums_of(unit, inputs_of(unit))
    assert 0 < found["update"] < whole["update"]
    assert found["count"] == NUMEL


def test_a_unit_that_is_pinned_in_float32_is_none() -> None:
    """Of one parameter out of three: it gets a graph of its own, with raw formats."""
    before = program(with_sizes(adam(ADAM_FACTS), [200, 300, 400]))
    names = [i.param.source.name for i in only(before).instances]
    after = with_packed_normalizers(
        before, lambda name, key: (name, key) == (names[1], "exp_avg_sq")
    )
    kinds = {
        tuple(i.param.source.name for i in unit.instances): formats_of(unit, "exp_avg")[4].kind
        for unit in after.units
    }
    assert kinds == {(names[0], names[2]): "midrise", (names[1],): "softsign"}
    assert len({unit.name for unit in after.units}) == 2
    raw = next(u for u in measure(after, "stochastic").units if len(u.instances) == 1)
    assert "softsign4" in str(raw.graph)
    assert "midrise" not in str(raw.graph)
    assert with_packed_normalizers(before, lambda *_: False).units == before.units


def test_sums_need_more_bits_than_averages() -> None:
    for unit, key, least in ((adagrad(), "sum", 8), (adam(), "exp_avg_sq", 2)):
        analysed = only(find_recurrences(find_ranges(program(unit))))
        formats = formats_of(analysed, key)
        assert min(w for w, f in formats.items() if sustained(analysed, key, f)) == least
