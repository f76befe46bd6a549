"""States at birth: constants that cost no memory, and eager steps on packed states."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stq_compile.birth import Birth, init_states
from stq_compile.formats import CONSTANT, FLOAT32, FORMATS
from stq_compile.packed_state import PackedState

MIN_NUMEL = 256
LARGE, SMALL = (16, 16), (15, 17)  # 256 and 255 elements
LIKE = torch.ones(LARGE)

FACTORIES: dict[str, tuple[Callable[[], Tensor], float]] = {
    "zeros_like": (lambda: torch.zeros_like(LIKE), 0.0),
    "zeros_like, as optimizers do": (
        lambda: torch.zeros_like(LIKE, memory_format=torch.preserve_format),
        0.0,
    ),
    "zeros_like of float64": (
        lambda: torch.zeros_like(LIKE.double(), dtype=torch.float32),
        0.0,
    ),
    "zeros": (lambda: torch.zeros(LARGE), 0.0),
    "zeros of numbers": (lambda: torch.zeros(4, 8, 8), 0.0),
    "new_zeros": (lambda: LIKE.new_zeros(LARGE), 0.0),
    "ones_like": (lambda: torch.ones_like(LIKE), 1.0),
    "ones": (lambda: torch.ones(LARGE), 1.0),
    "new_ones": (lambda: LIKE.new_ones(300), 1.0),
    "full_like": (lambda: torch.full_like(LIKE, 0.1), 0.1),
    "full_like, by name": (lambda: torch.full_like(LIKE, fill_value=-2), -2.0),
    "full": (lambda: torch.full(LARGE, 1e-8), 1e-8),
    "new_full": (lambda: LIKE.new_full(LARGE, 3.0), 3.0),
}


@pytest.mark.parametrize(("factory", "value"), FACTORIES.values(), ids=list(FACTORIES))
def test_a_constant_is_born_packed(factory: Callable[[], Tensor], value: float) -> None:
    with Birth(MIN_NUMEL):
        state = factory()
    plain = factory()
    assert isinstance(state, PackedState)
    assert state.format == CONSTANT
    assert state.packed.nbytes == 4
    assert state.size() == plain.size()
    assert state.stride() == plain.stride()
    assert torch.equal(state.dequantize(), torch.full_like(plain, value))
    assert torch.equal(state.dequantize(), plain)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: torch.zeros(SMALL),
        lambda: torch.zeros_like(torch.ones(SMALL)),
        lambda: torch.full((), 1.0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(LARGE, dtype=torch.float64),
        lambda: torch.zeros((), dtype=torch.bfloat16),
        lambda: torch.zeros_like(LIKE, dtype=torch.int32),
        lambda: torch.full(LARGE, 1),  # int64
        lambda: torch.full(LARGE, True),
        lambda: torch.zeros(LARGE, device="meta"),
        lambda: torch.zeros_like(LIKE, device="meta"),
        lambda: torch.zeros_like(LIKE.to("meta")),
        lambda: LIKE.new_zeros(LARGE, device="meta"),
        lambda: torch.zeros(LARGE, layout=torch.sparse_coo),
        lambda: LIKE.clone(),
        lambda: LIKE * 0,
        lambda: torch.empty(LARGE).fill_(2.0),
        lambda: torch.eye(16),
    ],
)
def test_everything_else_is_made_as_ever(factory: Callable[[], Tensor]) -> None:
    """Below ``min_numel``, of another dtype, on another device, or not a constant at all."""
    with Birth(MIN_NUMEL):
        found = factory()
    plain = factory()
    assert not isinstance(found, PackedState)
    assert (found.dtype, found.device, found.layout) == (plain.dtype, plain.device, plain.layout)
    assert found.is_meta or torch.equal(found.to_dense(), plain.to_dense())


def test_strides_are_those_of_the_parameter() -> None:
    for like in (
        torch.ones(32, 16).t(),
        torch.ones(2, 8, 8, 8).to(memory_format=torch.channels_last),
        torch.ones(32, 32)[:, ::2],  # with gaps: its zeros have none
        nn.Parameter(torch.ones(16, 32).t()),
    ):
        with Birth(MIN_NUMEL):
            state = torch.zeros_like(like)
        assert isinstance(state, PackedState)
        assert state.stride() == torch.zeros_like(like).stride()


def test_outside_and_with_zero_as_the_minimum() -> None:
    with Birth(0):
        assert isinstance(torch.zeros(()), PackedState)
    assert not isinstance(torch.zeros(LARGE), PackedState)


def test_birth_does_not_allocate_the_values() -> None:
    with Birth(MIN_NUMEL):
        state = torch.zeros(1 << 40)  # four terabytes
    assert isinstance(state, PackedState)
    assert state.numel() == 1 << 40


# init_states --------------------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    """Two large ones and a small one, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(size, generator=generator)) for size in (LARGE, (300,), (5,))]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (torch.optim.AdamW, {"exp_avg", "exp_avg_sq"}),
        (
            lambda p: torch.optim.Adam(p, amsgrad=True),
            {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        ),
        (torch.optim.RMSprop, {"square_avg"}),
        (torch.optim.Adamax, {"exp_avg", "exp_inf"}),
        (torch.optim.Adadelta, {"square_avg", "acc_delta"}),
        (torch.optim.Rprop, {"prev", "step_size"}),
    ],
)
def test_states_are_created_packed_with_their_values(
    make: Callable[[Any], Optimizer], keys: set[str]
) -> None:
    params, twins = parameters(), parameters()
    optimizer = make(params)
    assert init_states(optimizer, MIN_NUMEL) == params
    stock = make(twins)
    stock._init_group(stock.param_groups[0], *([] for _ in range(_lists(stock))))  # type: ignore[attr-defined]
    for p, twin in zip(params, twins, strict=True):
        state, expected = optimizer.state[p], stock.state[twin]
        assert set(state) == set(expected)
        for key, value in expected.items():
            packed = key in keys and p.numel() >= MIN_NUMEL
            assert isinstance(state[key], PackedState) == packed, key
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value))


def _lists(optimizer: Optimizer) -> int:
    """How many lists ``_init_group`` fills; Dynamo may have wrapped the method."""
    return len(inspect.signature(optimizer._init_group).parameters) - 1  # type: ignore[attr-defined]


def test_only_new_states_are_reported_and_old_ones_are_kept() -> None:
    params = parameters()
    first, late, frozen = params
    late.grad = frozen.grad = None
    optimizer = torch.optim.AdamW(params)
    assert init_states(optimizer, MIN_NUMEL) == [first]
    old = dict(optimizer.state[first])
    assert init_states(optimizer, MIN_NUMEL) == []
    late.grad = torch.ones_like(late)
    assert init_states(optimizer, MIN_NUMEL) == [late]
    assert all(optimizer.state[first][key] is value for key, value in old.items())
    assert not optimizer.state[frozen]


def test_every_group_is_looked_at() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in params])
    assert init_states(optimizer, MIN_NUMEL) == params


def test_an_optimizer_without_init_group_is_left_alone() -> None:
    class Plain(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    optimizer = Plain(parameters())
    assert init_states(optimizer, MIN_NUMEL) == []
    assert not optimizer.state


def test_momentum_that_is_made_inside_the_step_is_not_reported() -> None:
    assert init_states(torch.optim.SGD(parameters(), momentum=0.9), MIN_NUMEL) == []


# Eager steps on packed states ---------------------------------------------------------------


def packed_adamw(**options: Any) -> tuple[torch.optim.AdamW, list[nn.Parameter]]:
    """AdamW with 8-bit states that hold numbers; v varies little, so that no code is clamped."""
    params = parameters()[:2]
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), **options)
    init_states(optimizer, MIN_NUMEL)
    for p in params:
        assert p.grad is not None
        p.grad.mul_(0.1)
        state = optimizer.state[p]
        state["exp_avg"].packed.reencode(FORMATS["softsign8"])
        state["exp_avg_sq"].packed.reencode(FORMATS["adaptive_log8"])
        state["exp_avg"].copy_(p.grad * 0.5 + 0.01)
        state["exp_avg_sq"].copy_(torch.rand(p.shape) * 0.05 + 0.95)
    return optimizer, params


@pytest.mark.parametrize(
    "options",
    [{"foreach": False}, {"foreach": True}, {"fused": True}, {"foreach": True, "maximize": True}],
)
def test_an_eager_step_is_adamw_within_the_error_of_the_formats(options: dict[str, Any]) -> None:
    """States within the roundings of their writes, parameters exact for the states used."""
    torch.manual_seed(0)
    optimizer, params = packed_adamw(**options)
    before = [
        {k: v.clone().dequantize() for k, v in optimizer.state[p].items() if k != "step"}
        for p in params
    ]
    start = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old, p0 in zip(params, before, start, strict=True):
        assert p.grad is not None
        grad = -p.grad if options.get("maximize") else p.grad
        m, v = (optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq"))
        assert (m.format.name, v.format.name) == ("softsign8", "adaptive_log8")
        m_exact = old["exp_avg"].lerp(grad, 0.1)
        v_exact = old["exp_avg_sq"] * 0.99 + grad.square() * 0.01
        gap = 1.01 * m_exact.abs().max() * 2 / 128
        assert (m - m_exact).abs().max() <= gap
        # Two writes, each within a step of the smallest range, 14/32 octaves in 255 steps.
        assert (v.log2() - v_exact.log2()).abs().max() <= 2 * 14 / 32 / 255 + 1e-5
        used_m, used_v = (m_exact, v_exact) if options.get("fused") else (m, v)
        update = used_m / (1 - 0.9) / (used_v.sqrt() / math.sqrt(1 - 0.99) + 1e-8)
        assert torch.allclose(p, p0 * (1 - 0.01 * 0.1) - 0.01 * update, rtol=1e-5, atol=1e-7)


def test_many_eager_steps_stay_near_float32() -> None:
    """Twenty steps at 8 bits; the same optimizer with its states left in float32 beside it."""
    torch.manual_seed(0)
    runs = []
    for format_m, format_v in (("softsign8", "adaptive_log8"), ("float32", "float32")):
        params = parameters()[:2]
        optimizer = torch.optim.AdamW(params, lr=0.01)
        init_states(optimizer, MIN_NUMEL)
        for p in params:
            optimizer.state[p]["exp_avg"].packed.reencode(FORMATS[format_m])
            optimizer.state[p]["exp_avg_sq"].packed.reencode(FORMATS[format_v])
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in params]))
    start = torch.cat([p.detach().flatten() for p in parameters()[:2]])
    moved = (runs[1] - start).norm()
    assert 0 < (runs[0] - runs[1]).norm() < 0.1 * moved


def test_an_untouched_birth_constant_steps_exactly_like_float32() -> None:
    params, twins = parameters(), parameters()
    optimizer, stock = torch.optim.AdamW(params), torch.optim.AdamW(twins)
    init_states(optimizer, MIN_NUMEL)
    for _ in range(3):
        optimizer.step()
        stock.step()
    assert all(map(torch.equal, params, twins))
    assert optimizer.state[params[0]]["exp_avg"].format == FLOAT32


def test_state_dict_of_packed_states_loads_again() -> None:
    optimizer, params = packed_adamw()
    optimizer.step()
    other = torch.optim.AdamW(parameters()[:2])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], other.state[q][key])
