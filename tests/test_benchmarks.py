"""The benchmarks measure what they say; nothing here depends on how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stq_compile.benchmarks import growth, measure
from stq_compile.benchmarks.contenders import FAMILIES, Contender, Step, contenders, state_bytes
from stq_compile.benchmarks.measure import compare, first_steps, parameters
from stq_compile.benchmarks.picture import draw

SHAPES = [(96, 64), (64,)]


class Clock:
    """Time that passes in steps alone."""

    now = 0.0

    def contender(self, name: str, seconds: float, ours: bool = False) -> Contender:
        def step() -> None:
            self.now += seconds

        size = 6208 if ours else 8 * 6208
        return Contender(name, lambda params: (step, lambda: size), ours, 28.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_times_ratios_bits_and_bandwidth(clock: Clock) -> None:
    told: list[str] = []
    entrants = [clock.contender("a", 0.01), clock.contender("b", 0.02, ours=True)]
    first, second = compare(SHAPES, entrants, rounds=5, bandwidth=1e9, told=told.append)
    assert first.ratio == 1
    assert second.ratio == pytest.approx(2)
    numel = 96 * 64 + 64
    assert first.ns == pytest.approx(0.01 / numel * 1e9)
    assert first.low == pytest.approx(first.ns) == first.high
    assert (first.bits, second.bits) == (32, 4)
    assert second.moved == 12 + 2 * 6208 / numel == 14
    assert first.bandwidth == pytest.approx(28 * numel / (first.ns * numel * 1e-9) / 1e9)
    assert told == ["a: first steps", "b: first steps", *(f"round {i} of 5" for i in range(1, 6))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(family: str) -> None:
    """Stock forms and ours on one set of parameters; the reference is the fastest in fp32."""
    entrants = list(contenders(family))
    reference = {"rmsprop": "torch foreach", "adafactor": "torch foreach", "lion": "stock"}
    assert entrants[0].name == reference.get(family, "torch fused")
    ours = next(e for e in entrants if e.ours)
    # Long rows: Adafactor's states are rows and columns, and short ones stay fp32.
    stock, packed = compare([(8192, 4)], [entrants[0], ours], rounds=2)
    assert stock.bits == 32
    assert packed.bits < 9


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = {c.name for c in contenders("adamw", peers=True)}
    assert "torch Inductor" in names
    assert not names & {"torchao 4", "bitsandbytes 8"}


def test_bytes_of_states_are_counted_inside_of_subclasses() -> None:
    import stq_compile as stq

    optimizer = torch.optim.AdamW(parameters([(96, 64)]))
    stq.compile(optimizer, precision=4)
    optimizer.step()
    stock = torch.optim.AdamW(parameters([(96, 64)]))
    stock.step()
    assert state_bytes(stock) == 2 * 96 * 64 * 4 + 4
    assert stq.report(optimizer).state_bytes < state_bytes(stock) / 7


def test_parameters_are_the_same_for_a_seed() -> None:
    one, two = parameters(SHAPES), parameters(SHAPES)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_memory_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "seconds", lambda step, device: 0.5)
    assert measure.memory_bandwidth() == 4 * (1 << 20)


def test_growth_by_parameters_tensors_and_threads(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def make(params: list[torch.nn.Parameter]) -> tuple[Step, Callable[[], int]]:
        def step() -> None:
            clock.now += 1e-4 + 1e-5 * len(params)

        return step, lambda: 1

    contender = Contender("x", make, ours=True)
    monkeypatch.setattr(growth, "PARAMETERS", (8192, 16384, 10**9))
    monkeypatch.setattr(growth, "TENSORS", (10, 60, 10**6))
    assert [p.size for p in growth.by_parameters(contender, 10**6, 2)] == [8192, 16384]
    points = growth.by_tensors(contender, 1000, 9)
    assert [p.size for p in points] == [10, 60]
    assert [p.value for p in points] == pytest.approx([10, 10])  # microseconds a tensor
    before = torch.get_num_threads()
    by_threads = growth.by_threads(SHAPES, lambda: [contender, contender], (1, 2), 2)
    assert set(by_threads) == {1, 2}
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_first_steps_in_new_processes() -> None:
    (found,) = first_steps({"w": (96, 64)}, "adamw", ["stq 4 + 3"])
    assert found.warm < found.cold
    assert found.memory >= 0


def test_picture(tmp_path: Path, clock: Clock) -> None:
    entrants = [clock.contender("a", 0.001), clock.contender("stq b", 0.001)]
    timings = compare(SHAPES, entrants, rounds=2)
    draw("title", timings, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
