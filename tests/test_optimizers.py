"""Every pointwise optimizer of torch.optim: compiled against eager, packed against reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from models import backward, make_model
from stq_compile import PackedState, reference
from stq_compile.backend import session_of
from stq_compile.layout import unpack
from stq_compile.rounding import Noise, step_key, stream_id

MIN_NUMEL = 64

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"maximize": True, "foreach": True}),
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1, "foreach": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "foreach": True}),
    ("SGD", {"lr": 0.1}),
    ("Adagrad", {"weight_decay": 0.1, "lr_decay": 0.01}),
    ("Adagrad", {"initial_accumulator_value": 0.1, "foreach": True}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
    ("Adamax", {"foreach": True}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("NAdam", {"foreach": True}),
    ("RAdam", {"weight_decay": 0.1}),
    ("RAdam", {"foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("ASGD", {"weight_decay": 0.1, "t0": 5.0}),
    ("ASGD", {"foreach": True}),
    ("Adadelta", {"weight_decay": 0.1}),
    ("Adadelta", {"foreach": True, "lr": 0.5}),
    ("Rprop", {}),
    ("Rprop", {"foreach": True, "maximize": True}),
]
IDS = [f"{name}-{'-'.join(k for k in kw)}" for name, kw in CASES]


def make_optimizer(model: nn.Module, name: str, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Two groups: matrices with the given options, biases with twice the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    cls = getattr(torch.optim, name)
    lr = options.get("lr", cls(matrices, **options).defaults["lr"])
    lr = lr if isinstance(lr, float) else float(lr)
    groups = [{"params": matrices}, {"params": biases, "lr": 2 * lr}]
    return cls(groups, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_width_32_equals_eager(name: str, options: dict[str, Any]) -> None:
    eager_model, model = make_model(), make_model()
    eager = make_optimizer(eager_model, name, options)
    compiled = stq.compile(make_optimizer(model, name, options), precision=32)
    for step in range(20):
        backward(eager_model, step)
        for p, q in zip(model.parameters(), eager_model.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()  # the same gradients: the step alone is compared
        eager.step()
        compiled.step()
    for p, q in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5 * float(q.detach().abs().max()))
    assert all(row.width == 32 for row in stq.report(compiled).rows)


def packed_states(optimizer: torch.optim.Optimizer) -> list[tuple[int, Tensor, str, PackedState]]:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return [
        (i, p, key, value)
        for i, p in enumerate(params)
        for key, value in optimizer.state[p].items()
        if isinstance(value, PackedState)
    ]


FAST = ("Adam-weight_decay", "SGD-lr-momentum-weight_decay", "Adamax-weight_decay", "Rprop-")
WIDTHS = [
    pytest.param(case, width, id=f"{label}-{width}",
                 marks=() if label in FAST or width == 8 else pytest.mark.slow)
    for case, label in zip(CASES, IDS, strict=True)
    for width in (8, 4, 3, 2)
]  # fmt: skip


@pytest.mark.parametrize(("case", "width"), WIDTHS)
def test_codes_equal_the_reference(case: tuple[str, dict[str, Any]], width: int) -> None:
    """After each step, every packed state holds the codes that the reference makes of what the
    eager optimizer computes from the same decoded states."""
    name, options = case
    model = make_model()
    optimizer = stq.compile(
        make_optimizer(model, name, options), precision=width, min_numel=MIN_NUMEL
    )
    backward(model, 0)
    optimizer.step()
    for step in range(1, 5):
        if name == "SGD" and step == 1:
            backward(model, step)
            optimizer.step()  # the state was created by the first step; formats settle here
            continue
        backward(model, step)
        session = session_of(optimizer)
        assert session is not None
        expected = eager_step(model, optimizer, name, options)
        optimizer.step()
        for i, _, key, state in packed_states(optimizer):
            noise = Noise(step_key(session.options.seed, step, stream_id(i, key)))
            compare_codes(state, expected[(i, key)], noise)


def eager_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, name: str, options: dict[str, Any]
) -> dict[tuple[int, str], Tensor]:
    """The float32 states after one eager step from the compiled optimizer's decoded states."""
    twin_model = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    twin = make_optimizer(twin_model, name, options)
    params = [p for g in optimizer.param_groups for p in g["params"]]
    twin_params = [p for g in twin.param_groups for p in g["params"]]
    for p, q in zip(params, twin_params, strict=True):
        for key, value in optimizer.state[p].items():
            plain = value.dequantize() if isinstance(value, PackedState) else value
            twin.state[q][key] = copy.deepcopy(plain)
    twin.step()
    return {
        (i, key): value
        for i, q in enumerate(twin_params)
        for key, value in twin.state[q].items()
        if isinstance(value, Tensor)
    }


def compare_codes(state: PackedState, value: Tensor, noise: Noise) -> None:
    storage = state.packed
    if storage.format.width == 32:
        return
    unit = None if storage.normalizer is None else storage.normalizer.read()
    codes, scales = reference.encode(value.reshape(-1), storage.format, noise, unit)
    # A last-bit difference of the inputs may move one block's scale to the next word.
    assert int((scales != storage.scales).sum()) <= max(1, scales.numel() // 100)
    got, want = unpacked(storage, storage.codes), unpacked(storage, codes)
    same = (scales == storage.scales)[:, None].expand_as(got)
    difference = (got - want)[same].abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.995


def unpacked(storage: Any, codes: Tensor) -> Tensor:
    return unpack(codes, storage.format.width)


@pytest.mark.parametrize(
    ("name", "options"), [CASES[3], CASES[6], CASES[11], CASES[15]], ids=lambda x: str(x)[:12]
)
def test_width_8_stays_within_the_error_of_the_format(name: str, options: dict[str, Any]) -> None:
    """After 50 steps the distance to fp32 is that of an eager optimizer whose states go through
    the reference's quantizer after every step, with the same formats."""
    fp32, ours, twin = make_model(), make_model(), make_model()
    fp32_opt = make_optimizer(fp32, name, options)
    our_opt = stq.compile(make_optimizer(ours, name, options), precision=8, min_numel=MIN_NUMEL)
    twin_opt = make_optimizer(twin, name, options)
    for step in range(50):
        for model, optimizer in ((fp32, fp32_opt), (ours, our_opt), (twin, twin_opt)):
            backward(model, step)
            optimizer.step()
        quantize_like(twin_opt, our_opt, step)
    error, allowed = distance(ours, fp32), distance(twin, fp32)
    assert 0 < error <= 1.5 * allowed


def quantize_like(twin: torch.optim.Optimizer, ours: torch.optim.Optimizer, step: int) -> None:
    """Send the twin's float32 states through the formats that ours uses, with other noise."""
    twin_params = [p for g in twin.param_groups for p in g["params"]]
    states = packed_states(ours)
    keys = {id(state.packed): key for _, _, key, state in states}
    # Normalizers first: what is stored in their units sees them as they were stored.
    for i, _, key, state in sorted(states, key=lambda s: s[3].packed.normalizer is not None):
        value = twin.state[twin_params[i]][key]
        format, normalizer = state.packed.format, state.packed.normalizer
        unit = None
        if normalizer is not None:
            unit = twin.state[twin_params[i]][keys[id(normalizer)]].reshape(-1)
        noise = Noise(step_key(99, step, stream_id(i, key)))
        codes, scales = reference.encode(value.reshape(-1), format, noise, unit)
        decoded = reference.decode(codes, scales, format, value.numel(), unit)
        value.copy_(decoded.view_as(value))


def distance(a: nn.Module, b: nn.Module) -> float:
    total = sum(
        float((p - q).detach().square().sum())
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )
    return float(total**0.5)


def test_first_moments_survive_second_ones_that_become_zero() -> None:
    """Their units are then those of zeros: beta2 is 0 for a step, and half of the gradients are."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 256) * 0.1)
    optimizer = stq.compile(torch.optim.Adam([param]), precision=8)
    for step in range(4):
        param.grad = torch.randn(64, 256) * 1e-2
        if step == 3:
            optimizer.param_groups[0]["betas"] = (0.9, 0.0)
            param.grad[32:] = 0
            before = optimizer.state[param]["exp_avg"].dequantize()
        optimizer.step()
    wanted = 0.9 * before[32:]
    got = optimizer.state[param]["exp_avg"].dequantize()[32:]
    assert (optimizer.state[param]["exp_avg_sq"].dequantize()[32:] == 0).all()
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
