"""`stq.compile`: an optimizer stays the optimizer that it was, with a packed step."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import stq_compile as stq
from models import backward, equal, loss_of, make_model
from stq_compile import PackedState
from stq_compile.backend import session_of

PACKED = {"precision": {"exp_avg": 4, "exp_avg_sq": 3}, "min_numel": 64}


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def compiles(optimizer: torch.optim.Optimizer) -> int:
    session = session_of(optimizer)
    assert session is not None
    return session.compiles


def test_returns_the_same_optimizer_and_packs_from_birth() -> None:
    model = make_model()
    optimizer = adamw(model)
    assert stq.compile(optimizer, **PACKED) is optimizer
    train(model, optimizer, range(1))
    for p in model.parameters():
        state = optimizer.state[p]
        assert isinstance(state["exp_avg"], PackedState) == (p.numel() >= 64)
        assert type(state["step"]) is Tensor


def test_string_backend_gives_the_same_bits() -> None:
    ours, theirs = make_model(), make_model()
    optimizer = stq.compile(adamw(ours), **PACKED, seed=7)
    other = adamw(theirs)
    step = torch.compile(other.step, backend="stq", options={**PACKED, "seed": 7})
    for i in range(8):
        backward(ours, i)
        optimizer.step()
        backward(theirs, i)
        step()
        if i == 4:
            for o in (optimizer, other):
                o.param_groups[0]["lr"] *= 0.5
    assert equal(ours.parameters(), theirs.parameters())
    assert stq.report(optimizer).rows == stq.report(other).rows


def test_string_backend_frees_the_float32_states() -> None:
    model = make_model()
    optimizer = adamw(model)
    backward(model, 0)
    optimizer.step()  # stock: float32 states exist
    old = [weakref.ref(s["exp_avg"]) for p, s in optimizer.state.items() if p.numel() >= 64]
    step = torch.compile(optimizer.step, backend="stq", options=PACKED)
    backward(model, 1)
    step()
    gc.collect()
    assert all(ref() is None for ref in old)


def test_string_backend_needs_an_optimizer() -> None:
    @torch.compile(backend="stq")
    def function(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(Exception, match=r"found none in the frame .*function"):
        function(torch.ones(3))


def test_same_result_for_any_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(300_001))
            optimizer = stq.compile(torch.optim.AdamW([p]), precision=4)
            for i in range(3):
                p.grad = torch.sin(p.detach() * 1e3 + i)
                optimizer.step()
            results.append(p.detach().clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: CosineAnnealingLR(o, 20),
        lambda o: OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_cost_one_more_compile_at_most(make_scheduler: Any, tensor_lr: bool) -> None:
    eager_model, model = make_model(), make_model()
    optimizers = [
        adamw(m, lr=torch.tensor(1e-2) if tensor_lr else 1e-2) for m in (eager_model, model)
    ]
    stq.compile(optimizers[1], precision=32)
    schedulers = [make_scheduler(o) for o in optimizers]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*lr_scheduler.*"
        )  # a scheduler must see that step() was called
        for step in range(10):
            for m, o, s in zip((eager_model, model), optimizers, schedulers, strict=True):
                backward(m, step)
                o.step()
                s.step()
    for p, q in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert compiles(optimizers[1]) <= 2


def test_hooks_closure_and_loss() -> None:
    model = make_model()
    optimizer = stq.compile(adamw(model), **PACKED)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
    assert isinstance(loss, Tensor)
    assert loss > 0


@pytest.mark.parametrize("first", ["pre", "post"])
def test_hooks_of_all_optimizers_run_as_well(first: str) -> None:
    """Whoever is there: a step without any of them is told to nobody."""
    model = make_model()
    optimizer = stq.compile(adamw(model), **PACKED)
    calls: list[str] = []
    register = {
        "pre": optim.register_optimizer_step_pre_hook,
        "post": optim.register_optimizer_step_post_hook,
    }
    handle = register[first](lambda *_: calls.append("all"))
    try:
        backward(model, 0)
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert calls == ["all"]


def test_a_closure_registers_a_hook_of_its_own_step() -> None:
    model = make_model()
    optimizer = stq.compile(adamw(model), **PACKED)
    calls: list[str] = []

    def closure() -> Tensor:
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        backward(model, 0)
        return torch.zeros(())

    optimizer.step(closure)
    assert calls == ["post"]


def test_a_profiler_sees_the_step_under_its_name() -> None:
    model = make_model()
    optimizer = stq.compile(adamw(model), **PACKED)
    backward(model, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
    optimizer.step()
    names = [event.key for event in profile.key_averages()]
    assert "Optimizer.step#AdamW.step" in names


def test_parameters_without_gradient_are_skipped() -> None:
    model = make_model()
    optimizer = stq.compile(adamw(model, weight_decay=0.5), **PACKED)
    first, *rest = list(model.parameters())
    before = first.detach().clone()
    backward(model, 0)
    first.grad = None
    optimizer.step()
    assert torch.equal(first, before)
    assert first not in optimizer.state or not optimizer.state[first]
    backward(model, 1)
    optimizer.step()
    assert not torch.equal(first, before)
    assert isinstance(optimizer.state[first]["exp_avg"], PackedState)
    assert all(p in optimizer.state for p in rest)


def test_frozen_midway_keeps_its_state() -> None:
    model = make_model()
    optimizer = stq.compile(adamw(model), **PACKED)
    train(model, optimizer, range(2))
    first = next(iter(model.parameters()))
    before, state = first.detach().clone(), optimizer.state[first]["exp_avg"].dequantize()
    for step in (2, 3):
        backward(model, step)
        first.grad = None
        optimizer.step()
    assert torch.equal(first, before)
    assert torch.equal(optimizer.state[first]["exp_avg"].dequantize(), state)


def test_add_param_group() -> None:
    model, extra = make_model(), nn.Parameter(torch.ones(100))
    optimizer = stq.compile(adamw(model), **PACKED)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    extra.grad = torch.ones(100)
    train(model, optimizer, range(2, 4))
    assert isinstance(optimizer.state[extra]["exp_avg"], PackedState)
    assert float(extra.detach().max()) < 0.6


def test_loading_a_stock_checkpoint_packs_it() -> None:
    model = make_model()
    stock = adamw(model)
    train(model, stock, range(3))
    checkpoint, weights = copy.deepcopy(stock.state_dict()), copy.deepcopy(model.state_dict())

    other = make_model(1)
    optimizer = stq.compile(adamw(other), **PACKED)
    train(other, optimizer, range(2))
    other.load_state_dict(weights)
    optimizer.load_state_dict(checkpoint)
    train(other, optimizer, range(3, 4))
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert isinstance(optimizer.state[p]["exp_avg"], PackedState) == (p.numel() >= 64)
        assert float(optimizer.state[p]["step"]) == 4
        close = optimizer.state[p]["exp_avg_sq"].dequantize() / stock.state[q]["exp_avg_sq"]
        assert 0.3 < float(close.median()) < 3


def test_grad_scaler() -> None:
    model = make_model()
    optimizer = stq.compile(adamw(model), **PACKED)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    scaler.scale(loss_of(model, 3) * float("inf")).backward()
    scaler.step(optimizer)  # non-finite: the scaler skips the step
    assert equal(model.parameters(), before)


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_dense_layouts(layout: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 6, 5, 4)
    values = (
        values.transpose(0, 1)
        if layout == "transposed"
        else values.contiguous(memory_format=torch.channels_last)
    )
    p, q = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    assert p.stride() == values.stride()
    optimizer = stq.compile(torch.optim.AdamW([p]), precision=32, min_numel=64)
    eager = torch.optim.AdamW([q])
    for _ in range(3):
        grad = torch.randn(p.shape)  # contiguous: other strides than the parameter's
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        eager.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (129,), (3, 43, 2)])
def test_odd_sizes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    q = nn.Parameter(p.detach().clone())
    optimizer = stq.compile(torch.optim.AdamW([p]), precision=8, min_numel=0)
    eager = torch.optim.AdamW([q])
    for _ in range(3):
        p.grad = torch.randn(shape)
        q.grad = p.grad.clone()
        optimizer.step()
        eager.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


def test_two_optimizers_do_not_disturb_each_other() -> None:
    models = [make_model(), make_model(1)]
    optimizers = [stq.compile(adamw(m), **PACKED) for m in models]
    alone_model = make_model()
    alone = stq.compile(adamw(alone_model), **PACKED)
    for step in range(4):
        for m, o in zip(models, optimizers, strict=True):
            backward(m, step)
            o.step()
        backward(alone_model, step)
        alone.step()
    assert equal(models[0].parameters(), alone_model.parameters())


def test_twelve_optimizers_of_one_class() -> None:
    """Dynamo's recompile limit counts per optimizer, not per class."""
    for seed in range(12):
        p = nn.Parameter(torch.randn(70 + seed))
        optimizer = stq.compile(torch.optim.SGD([p], lr=0.1), precision=32)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert compiles(optimizer) == 1


def test_eager_step_on_packed_states() -> None:
    model, twin = make_model(), make_model()
    optimizer = stq.compile(adamw(model), precision=8, min_numel=64)
    train(model, optimizer, range(2))
    twin.load_state_dict(model.state_dict())
    stock = adamw(twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            dense = value.dequantize() if isinstance(value, PackedState) else value.clone()
            stock.state[q][key] = dense
    backward(model, 2)
    backward(twin, 2)
    type(optimizer).step(optimizer)  # the class's own, eager step
    stock.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # The eager step uses exp_avg as just re-encoded, so a rounding step shows in the update.
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)
        assert float((p - q).detach().abs().mean()) < 5e-4
        assert isinstance(optimizer.state[p]["exp_avg"], PackedState) == (p.numel() >= 64)


@pytest.mark.parametrize(("width", "first"), [(32, 32), (4, 8)])
def test_a_state_that_the_step_creates(width: int, first: int) -> None:
    """SGD makes its momentum buffer from the first gradient: packed then, at the widest width that
    any entry gives, and at its own from the second step on."""
    model = make_model()
    optimizer = stq.compile(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        precision={"*": 8, "momentum_buffer": width},
        min_numel=64,
    )
    for step, expected in enumerate((first, width)):
        backward(model, step)
        optimizer.step()
        for p in model.parameters():
            buffer = optimizer.state[p]["momentum_buffer"]
            found = buffer.format.width if isinstance(buffer, PackedState) else 32
            assert found == (expected if p.numel() >= 64 else 32)


def test_an_integer_hyperparameter_that_changes() -> None:
    """Dynamo makes it an input that is a Python number, not a tensor."""
    eager_model, model = make_model(), make_model()
    optimizers = [torch.optim.Adagrad(m.parameters(), lr_decay=0) for m in (eager_model, model)]
    step = torch.compile(optimizers[1].step, backend="stq", options={"precision": 32})
    for i in range(5):
        for m, o, run in zip(
            (eager_model, model), optimizers, (optimizers[0].step, step), strict=True
        ):
            o.param_groups[0]["lr_decay"] = i
            backward(m, i)
            run()
    for p, q in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
