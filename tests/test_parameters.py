"""Every kind of parameter, compiled beside the stock optimizer: types, layouts, shapes, changes
midway. What is pointwise runs in kernels for all of them that are dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from cases import cases
from stq_compile import PackedState

HALVES = (torch.bfloat16, torch.float16)
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def gradients(params: list[Tensor], steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def follow(
    ours: torch.optim.Optimizer, other: torch.optim.Optimizer, steps: int = 6
) -> tuple[list[Tensor], list[Tensor]]:
    """Give both the same gradients; where ``other`` is in another type, in that."""
    mine = [p for g in ours.param_groups for p in g["params"]]
    theirs = [p for g in other.param_groups for p in g["params"]]
    for grads in gradients(mine, steps):
        for p, q, g in zip(mine, theirs, grads, strict=True):
            p.grad, q.grad = g.clone(), g.to(q.dtype)
        ours.step()
        other.step()
    return mine, theirs


def adamw(params: Any) -> torch.optim.Optimizer:
    """With an epsilon that float16 has."""
    return torch.optim.AdamW(params, lr=0.01, eps=1e-4)


def assert_as_torch(ours: Tensor, stock: Tensor) -> None:
    """In 16 bits every operation rounds, and two of torch's own forms of a step differ by that."""
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, stock)
    else:
        torch.testing.assert_close(ours, stock, rtol=0.02, atol=1e-3)


def params_of(*tensors: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in tensors]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda d: torch.randn(9, 70).to(d),
    "transposed": lambda d: torch.randn(70, 9).to(d).t(),
    "channels_last": lambda d: torch.randn(4, 6, 5, 7).to(
        dtype=d, memory_format=torch.channels_last
    ),
    "channels_last_3d": lambda d: torch.randn(2, 3, 4, 5, 6).to(
        dtype=d, memory_format=torch.channels_last_3d
    ),
    "permuted": lambda d: torch.randn(5, 6, 7).to(d).permute(2, 0, 1),
    "every other column": lambda d: torch.randn(9, 140).to(d)[:, ::2],
    "a window of another tensor": lambda d: torch.randn(20, 70).to(d)[3:12],
    "rows apart": lambda d: torch.randn(9, 100).to(d)[:, :70],
}
DENSE = {k for k in LAYOUTS if k not in ("every other column", "rows apart")}


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return sum(float((x.detach().float() - y.detach().float()).norm()) for x, y in pairs)


def as_is(tensor: Tensor) -> nn.Parameter:
    """A parameter of exactly that layout; a clone would be dense."""
    return nn.Parameter(tensor.detach())


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(
        LAYOUTS,
        [torch.float32, *HALVES],
        few=[
            ("channels_last", torch.bfloat16),
            ("rows apart", torch.float16),
            ("every other column", torch.float32),
        ],
    ),
)
def test_layouts(name: str, dtype: torch.dtype) -> None:
    """At 32 bits the stock step; packed, a resumed run's bits, and only what is not dense is
    outside of kernels."""

    def make() -> nn.Parameter:
        torch.manual_seed(0)
        return as_is(LAYOUTS[name](dtype))

    p, q = make(), make()
    wide = stq.compile(adamw([p]), precision=32)
    follow(wide, adamw([q]))
    assert_as_torch(p, q)
    assert p.stride() == make().stride()

    through, first, second = make(), make(), make()
    options: dict[str, Any] = {"precision": 4, "min_numel": 64}
    optimizers = [stq.compile(adamw([r]), **options) for r in (through, first, second)]
    grads = list(gradients([p], 6))

    def train(i: int, steps: range) -> None:
        for step in steps:
            (through, first, second)[i].grad = grads[step][0]
            optimizers[i].step()

    train(0, range(6))
    train(1, range(3))
    with torch.no_grad():
        second.copy_(first)
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    train(2, range(3, 6))
    assert torch.equal(second, through)
    state = optimizers[2].state[second]["exp_avg"]
    assert isinstance(state, PackedState)
    assert state.format.width == 4
    assert state.dtype == dtype
    assert bool(stq.report(optimizers[2]).note) == (name not in DENSE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(MAKERS, HALVES, few=[("AdamW", torch.bfloat16), ("SGD", torch.float16)]),
)
def test_packed_states_of_half_parameters(name: str, dtype: torch.dtype) -> None:
    """A kernel computes in float32 and rounds once: nearer to the float32 run than torch's own."""
    torch.manual_seed(0)
    make = MAKERS[name]
    start = [torch.randn(9, 70).to(dtype), torch.randn(50).to(dtype)]
    ours, stock = params_of(*[t.clone() for t in start]), params_of(*[t.clone() for t in start])
    exact = params_of(*[t.float() for t in start])
    packed = stq.compile(make(ours), precision=8, min_numel=64)
    follow(packed, make(exact), 20)
    follow(make(stock), make(twins(exact)), 20)
    moved = distance(exact, start)
    assert distance(ours, exact) < max(1.5 * distance(stock, exact), 0.1 * moved)
    report = stq.report(packed)
    assert not report.note
    assert {row.width for row in report.rows if row.shape == (9, 70)} <= {8}
    states = [s for p in ours for s in packed.state[p].values() if s.ndim]
    assert all(isinstance(s, PackedState) and s.dtype == dtype for s in states)
    assert report.compiles <= 3


@pytest.mark.parametrize("dtype", cases([torch.float32, *HALVES], few=[(torch.float16,)]))
def test_no_elements_no_dimension_and_many(dtype: torch.dtype) -> None:
    """At 32 bits the stock step, packed the float32 run: torch's own float16 step strays from
    that by 0.3 where a second moment underflows."""
    shapes: list[tuple[int, ...]] = [(0,), (), (1,), (3, 0, 2), (127,), (1, 1), (200, 2)]
    for options in ({"precision": 32}, {"precision": 8, "min_numel": 1}):
        torch.manual_seed(0)
        ours = params_of(*[torch.randn(s).to(dtype) for s in shapes])
        wide = options["precision"] == 32
        stock = twins(ours) if wide else params_of(*[p.detach().float() for p in ours])
        optimizer = stq.compile(adamw(ours), **options)
        mine, theirs = follow(optimizer, adamw(stock))
        for p, q in zip(mine, theirs, strict=True):
            if wide:
                assert_as_torch(p, q)
            else:
                torch.testing.assert_close(p.float(), q, rtol=0.05, atol=0.02)
        assert stq.report(optimizer).compiles == 1
        again = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(again)
        follow(optimizer, adamw(stock), 1)


def test_tied_parameters_are_stepped_once() -> None:
    """A matrix that is embedding and head: one parameter, one state, the sum of two gradients."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(40, 8)
            self.head = nn.Linear(8, 40, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embedding(x))
            return logits

    def train(options: Mapping[str, Any] | None) -> tuple[Tied, torch.optim.Optimizer]:
        model = Tied()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
        if options is not None:
            stq.compile(optimizer, **options)
        tokens = torch.arange(40)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
            optimizer.step()
        return model, optimizer

    stock, _ = train(None)
    wide, _ = train({"precision": 32})
    torch.testing.assert_close(wide.head.weight, stock.head.weight)
    packed, optimizer = train({"precision": 4, "min_numel": 64})
    assert packed.head.weight is packed.embedding.weight
    assert sorted(row.state for row in stq.report(optimizer).rows) == [
        "exp_avg", "exp_avg_sq", "step",
    ]  # fmt: skip


@pytest.mark.parametrize("foreach", [False, True])
def test_complex_parameters_are_stepped_as_torch_does(foreach: bool) -> None:
    """As pairs of real numbers, outside of kernels, since the step views them so; states stay."""
    torch.manual_seed(0)
    ours = params_of(torch.randn(9, 70, dtype=torch.complex64), torch.randn(100))
    stock = twins(ours)
    optimizer = stq.compile(
        torch.optim.AdamW(ours, lr=0.01, foreach=foreach), precision=4, min_numel=64
    )
    mine, theirs = follow(optimizer, torch.optim.AdamW(stock, lr=0.01))
    torch.testing.assert_close(mine[0], theirs[0])
    rows = {(row.param, row.state): row for row in stq.report(optimizer).rows}
    assert rows["group0.param0", "exp_avg"].format == "complex64"
    assert rows["group0.param1", "exp_avg"].width == 4
    assert stq.report(optimizer).note
    assert stq.report(optimizer).compiles > 0  # as regions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_midway(dtype: torch.dtype) -> None:
    """`requires_grad_(False)` and no gradient: parameter and states rest, and go on later."""
    torch.manual_seed(0)
    ours = params_of(torch.randn(9, 70).to(dtype), torch.randn(9, 70).to(dtype))
    stock = twins(ours)
    optimizer = stq.compile(torch.optim.AdamW(ours, lr=0.01, weight_decay=0.1), precision=32)
    other = torch.optim.AdamW(stock, lr=0.01, weight_decay=0.1)
    for step, grads in enumerate(gradients(list(ours), 9)):
        frozen = 3 <= step < 6
        for params in (ours, stock):
            params[0].requires_grad_(not frozen)
            params[0].grad = None if frozen else grads[0].clone()
            params[1].grad = grads[1].clone()
        before = ours[0].detach().clone()
        optimizer.step()
        other.step()
        assert torch.equal(ours[0], before) == frozen
    for p, q in zip(ours, stock, strict=True):
        assert_as_torch(p, q)
    assert float(optimizer.state[ours[0]]["step"]) == 6
    assert stq.report(optimizer).compiles <= 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_groups_added_midway(rounding: str) -> None:
    """In another type than the first group, and with its own learning rate."""
    torch.manual_seed(0)
    first, extra = params_of(torch.randn(9, 70), torch.randn(300).bfloat16())
    stock, late = params_of(first.detach().clone(), extra.detach().float())
    optimizer = stq.compile(
        torch.optim.AdamW([first], lr=0.01), precision=8, min_numel=64, param_rounding=rounding
    )
    other = torch.optim.AdamW([stock], lr=0.01)
    follow(optimizer, other, 3)
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    other.add_param_group({"params": [late], "lr": 0.1})
    follow(optimizer, other, 5)
    torch.testing.assert_close(first, stock, rtol=0.01, atol=0.03)
    torch.testing.assert_close(extra.float(), late, rtol=0.02, atol=0.1)
    assert isinstance(optimizer.state[extra]["exp_avg"], PackedState)
    assert stq.report(optimizer).compiles == 2
