"""Whole optimizer runs on a device, beside the eager optimizer: one body for every device.

The same functions run on a GPU (`test_gpu`) and, with the CPU in its place and Triton's interpreter
for a compiler, where there is none (`test_interpreted_runs`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import stq_compile as stq
from stq_compile import PackedState, reference
from stq_compile.backend import session_of
from stq_compile.layout import unpack
from stq_compile.rounding import Noise, step_key, stream_id

SIZES = ((37, 27), (129,), (5,), (64, 33))
"""999, 129 and 2112 elements: tails in blocks, sizes that are no multiple of 4, one that stays in
float32."""
MIN_NUMEL = 100
STEPS = 6

Make = Callable[[list[Parameter]], Optimizer]


@dataclass(frozen=True)
class Case:
    """An optimizer, the options that it is compiled with, and widths that it changes to.

    ``fused``: whether its states are written by kernels, with the noise of a step.
    """

    make: Make
    options: dict[str, Any]
    change: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    fused: bool = True


CASES: dict[str, Case] = {
    "adamw": Case(
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        {"precision": {"exp_avg": 4, "exp_avg_sq": 3}},
        {"exp_avg": 5, "exp_avg_sq": 4},
    ),
    "adamw foreach, planned": Case(
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True), {"interval": 2, "dwell": 0}
    ),
    "sgd": Case(
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        {"precision": 4},
        {"momentum_buffer": 8},
    ),
    "rmsprop": Case(
        lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
        {"precision": 6},
        {"square_avg": 2},
    ),
    "lion, planned": Case(lambda p: Lion(p, lr=1e-3), {"interval": 2}),
    "adagrad": Case(lambda p: torch.optim.Adagrad(p), {"precision": 8}, {"sum": 16}),
    "nearest": Case(
        lambda p: torch.optim.AdamW(p, lr=1e-2), {"precision": 3, "rounding": "nearest"}
    ),
    # To nearest, Triton's interpreter cuts bfloat16 off where compiled code rounds.
    "bfloat16": Case(
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        {"precision": 4, "param_rounding": "compensated"},
        {},
        torch.bfloat16,
    ),
    "bfloat16, stochastic": Case(
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        {"precision": 4, "param_rounding": "stochastic"},
        {},
        torch.bfloat16,
    ),
    "float16": Case(
        lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4), {"precision": 4}, {}, torch.float16
    ),
    "not pointwise": Case(
        lambda p: torch.optim.Adafactor(p, lr=1e-2), {"precision": 8}, fused=False
    ),
}

Bits = dict[str, Tensor]


@dataclass
class Trained:
    """What a run leaves, on the CPU."""

    params: list[Tensor]
    codes: Bits
    formats: dict[str, str]
    transitions: int


def make_params(device: str, dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in SIZES]


def give_gradients(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p.device, p.dtype)


def train(case: Case, device: str, *, steps: int = STEPS, check: bool = True) -> Trained:
    """Some steps; with ``check``, each against the eager optimizer on the decoded states."""
    params = make_params(device, case.dtype)
    optimizer = stq.compile(case.make(params), min_numel=MIN_NUMEL, **case.options)
    session = session_of(optimizer)
    assert session is not None
    for step in range(steps):
        give_gradients(params, step)
        states = {key for _, _, key, _ in packed(optimizer)}
        expected = eager_step(case, optimizer, params) if check and states else None
        counter, before = session.steps, (session.compiles, session.transitions)
        optimizer.step()
        # What is compiled or planned anew was encoded anew as well, before the step or after it.
        if expected is not None and before == (session.compiles, session.transitions):
            compare(case, optimizer, params, expected, counter)
        if step == STEPS // 2 and case.change:
            session.change_widths(
                {
                    (i, key): case.change[key]
                    for i, _, key, state in packed(optimizer)
                    if key in case.change
                }
            )
    return Trained(
        [p.detach().cpu() for p in params],
        {
            f"{i} {key} {name}": getattr(state.packed, name).cpu()
            for i, _, key, state in packed(optimizer)
            for name in ("codes", "scales")
        },
        {f"{i} {key}": state.format.name for i, _, key, state in packed(optimizer)},
        session.transitions,
    )


Step = Callable[[], object]
Replay = Callable[[Step, int, Callable[[int], None]], Step]
"""Given a step, makes it some times without the host, and calls something before each; returns what
makes it once more."""


def replayed(device: str, replay: Replay) -> list[str]:
    """What differs between steps that the host makes and a step that is replayed; and between what
    their checkpoints hold, and what becomes of runs that are resumed from those.

    The learning rate is a tensor beside the parameters that changes from step to step.
    """
    results = []
    for on_host in (True, False):
        lr = torch.tensor(1e-2, device=device)
        params, optimizer = _small_adamw(device, lr)
        give_gradients(params, 0)
        optimizer.step()

        def turn(step: int, lr: Tensor = lr) -> None:
            lr.fill_(1e-2 / (step + 1))

        once_more: Step = optimizer.step
        if on_host:
            for step in range(STEPS):
                turn(step)
                optimizer.step()
        else:
            once_more = replay(optimizer.step, STEPS, turn)
        saved = copy.deepcopy(optimizer.state_dict())
        found = _what_it_holds(params, optimizer)
        found["steps"] = torch.tensor(saved["stq"]["steps"])
        once_more()
        for name, again in (("resumed", None), ("loaded", optimizer)):
            if again is None:
                twins, again = _small_adamw(device, lr)
                for p, q in zip(params, twins, strict=True):
                    q.data.copy_(p.detach())
            else:
                twins = params
            again.load_state_dict(copy.deepcopy(saved))
            give_gradients(twins, 1)
            again.step()
            found |= {f"{name} {k}": v for k, v in _what_it_holds(twins, again).items()}
        results.append(found)
    return [key for key, value in results[0].items() if not torch.equal(value, results[1][key])]


def _small_adamw(device: str, lr: Tensor) -> tuple[list[Parameter], Optimizer]:
    params = make_params(device, torch.float32)
    optimizer = torch.optim.AdamW(params, lr=lr, capturable=device != "cpu")
    return params, stq.compile(optimizer, min_numel=MIN_NUMEL, precision=4)


def _what_it_holds(params: list[Parameter], optimizer: Optimizer) -> Bits:
    """Parameters, codes and step counters, on the CPU."""
    found = {f"{i}": p.detach().cpu().clone() for i, p in enumerate(params)}
    for i, _, key, state in packed(optimizer):
        found[f"{i} {key}"] = state.packed.codes.cpu().clone()
    counters = [optimizer.state[p]["step"].cpu().clone() for p in params]
    return found | {f"{i} step": c for i, c in enumerate(counters)}


def packed(optimizer: Optimizer) -> list[tuple[int, Tensor, str, PackedState]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (i, p, key, value)
        for i, p in enumerate(params)
        for key, value in optimizer.state[p].items()
        if isinstance(value, PackedState)
    ]


def eager_step(case: Case, optimizer: Optimizer, params: list[Parameter]) -> list[Any]:
    """Parameters and states after an eager float32 step on the CPU, from the decoded states."""
    twins = [Parameter(p.detach().cpu().float().clone()) for p in params]
    twin = case.make(twins)
    for p, q in zip(params, twins, strict=True):
        assert p.grad is not None
        q.grad = p.grad.cpu().float().clone()
        for key, value in optimizer.state[p].items():
            plain = value.dequantize() if isinstance(value, PackedState) else value
            twin.state[q][key] = copy.deepcopy(plain).cpu() if isinstance(plain, Tensor) else plain
    twin.step()
    return [(q.detach(), twin.state[q]) for q in twins]


def compare(
    case: Case, optimizer: Optimizer, params: list[Parameter], expected: list[Any], counter: int
) -> None:
    """Parameters are close in 99.5%; codes are equal in 99.5%, never off by more than a level."""
    rounded = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    for p, (wanted, _) in zip(params, expected, strict=True):
        tolerance = rounded[p.dtype]
        near = torch.isclose(p.detach().cpu().float(), wanted, rtol=tolerance, atol=tolerance / 10)
        assert near.float().mean() >= 0.995  # a sign near to zero may fall either way (Lion)
    session = session_of(optimizer)
    assert session is not None
    if not case.fused:
        return
    off: list[Tensor] = []
    for i, _, key, state in packed(optimizer):
        storage = state.packed
        if not storage.format.blocked:
            continue
        key_of_step = step_key(session.seed, counter, stream_id(i, key))
        noise = Noise(key_of_step if storage.rounding == "stochastic" else None)
        unit = None if storage.normalizer is None else storage.normalizer.read().cpu()
        values = expected[i][1][key].detach().reshape(-1).float()
        codes, scales = reference.encode(values, storage.format, noise, unit)
        same = (scales == storage.scales.cpu())[:, None].expand(-1, 128)
        assert int((~same[:, 0]).sum()) <= max(1, len(scales) // 100), key
        width = storage.format.width
        distance = (unpack(codes, width) - unpack(storage.codes.cpu(), width))[same].abs()
        assert distance.max() <= 1, key
        off.append(distance.flatten())
    if off:
        assert (torch.cat(off) == 0).float().mean() >= 0.995
