"""Steps with matrix products on sharded parameters: the bits of one process, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.testing import assert_close

import stq_compile as stq
from processes import run_processes
from sharded import ALIGNED, CUT, differing, distance, make, mesh_of, muon, outcome, run, widths
from stq_compile.errors import GraphBreakError, ShardedEagerStepError, ShardedStateError

PINNED = {"precision": 4}


class Preconditioned(torch.optim.Optimizer):
    """Makes a matrix for each parameter, in the step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for p in self.param_groups[0]["params"]:
            if "sides" not in self.state[p]:
                self.state[p]["sides"] = p.grad @ p.grad.T
            p.sub_(p.grad / self.state[p]["sides"].norm())


class Twice(torch.optim.SGD):
    """Calls its closure when it has moved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # torch's is overloaded
        super().step()
        return closure()


def refused(optimizer: torch.optim.Optimizer, error: type[Exception], *args: Any) -> str:
    """What a compiled optimizer's first step says; its parameters and states stay."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    with pytest.raises(error) as caught:
        optimizer.step(*args)
    assert all(torch.equal(*map(_here, pair)) for pair in zip(before, params, strict=True))
    assert not any(optimizer.state.values())
    return str(caught.value)


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def parameter(mesh: Any, *shape: int, placement: Placement | None = None) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    p = nn.Parameter(distribute_tensor(values, mesh, [placement or Shard(0)]))
    p.grad = distribute_tensor(torch.randn(shape, generator=generator), mesh, [Shard(0)])
    return p


def on_two(rank: int, world: int) -> Any:
    mesh = mesh_of(world)
    model, compiled = make({**ALIGNED, **CUT}, "muon", mesh, **PINNED)
    run(model, compiled, range(7))
    found = outcome(model, compiled)

    stock_model, _ = make(ALIGNED, "muon", mesh, **PINNED)
    stock = muon(stock_model.named_parameters())
    wide_model, wide = make(ALIGNED, "muon", mesh, precision=32)
    for number in range(2):  # widths stay
        run(stock_model, stock, [number])
        run(wide_model, wide, [number])
    pairs = {
        name: (p, stock_model.get_parameter(name)) for name, p in wide_model.named_parameters()
    }
    far = {k: float((a - b).detach().full_tensor().abs().max()) for k, (a, b) in pairs.items()}

    narrow = parameter(mesh, 1, 128)
    messages = [refused(stq.compile(torch.optim.Muon([narrow])), GraphBreakError)]
    with pytest.raises(RuntimeError, match="placement"):
        torch.optim.Muon([narrow]).step()
    matrix = parameter(mesh, 8, 128)
    messages.append(refused(stq.compile(Preconditioned([matrix])), ShardedStateError))
    twice = stq.compile(Twice([matrix], lr=0.1, momentum=0.9))
    messages.append(refused(twice, ShardedEagerStepError, lambda: 0.0))
    return found, far, messages, partial_step(mesh)


def partial_step(mesh: Any) -> Tensor:
    """AdamW, with a gradient that is still to be added up: the sum on all processes."""
    p = parameter(mesh, 16, 128, placement=Replicate())
    optimizer = stq.compile(torch.optim.AdamW([p], lr=0.1), precision=32)
    p.grad = DTensor.from_local(torch.full((16, 128), mesh.get_rank() - 0.25), mesh, [Partial()])
    optimizer.step()
    return _here(p)


def test_two_processes_are_one() -> None:
    model, compiled = make({**ALIGNED, **CUT}, "muon", **PINNED)
    run(model, compiled, range(7))
    expected = outcome(model, compiled)
    assert expected["report"].transitions > 0
    start, _ = make({**ALIGNED, **CUT}, "muon", **PINNED)
    results = run_processes(2, on_two)
    for found, far, messages, stepped in results:
        check(found, expected, start)
        # Stock Muon adds up parts of products, in bfloat16
        assert set(far) == {*ALIGNED, "frozen"}
        assert 0 < far["even"] < 1e-2
        assert 0 < far["uneven"] < 1e-2
        assert far["deep"] == far["small"] == far["frozen"] == 0
        for message, part in zip(messages, ("placement", "(8, 8)", "closure"), strict=True):
            assert part in message
            assert "left as it was" in message
        assert_close(stepped, results[0][3], rtol=0, atol=0)
    # The sum is positive, so that AdamW's first step goes down by its learning rate; alone, the
    # first process's part would go up.
    generator = torch.Generator().manual_seed(0)
    begun = torch.randn(16, 128, generator=generator)
    assert_close(results[0][3], begun * (1 - 0.1 * 0.01) - 0.1, rtol=1e-5, atol=1e-5)


def check(found: Any, expected: Any, start: nn.Module) -> None:
    cut = {name for name in expected["params"] if name in CUT}
    names = differing(found["params"], expected["params"])
    assert set(names) <= cut
    assert widths(found) == widths(expected)
    for name in names:
        moved = distance(start.get_parameter(name), expected["params"][name])
        assert distance(found["params"][name], expected["params"][name]) < 0.3 * moved


def on_a_grid(rank: int, world: int, kind: str) -> Any:
    """FSDP over tensor parallelism on one dimension or on two, and hybrid sharding."""
    names = ("a", "b")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    placements = {"rows": (Replicate(), Shard(0)), "both": (Shard(0), Shard(1))}[kind]
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(distribute_tensor(torch.randn(64, 256, generator=generator), mesh, placements))
    optimizer = stq.compile(torch.optim.Muon([p], lr=0.01), precision=4, min_numel=64)
    for _ in range(4):
        p.grad = distribute_tensor(torch.randn(64, 256, generator=generator), mesh, placements)
        optimizer.step()
    return p.full_tensor().detach()  # type: ignore[attr-defined]  # a DTensor


def on_one() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(64, 256, generator=generator))
    optimizer = stq.compile(torch.optim.Muon([p], lr=0.01), precision=4, min_numel=64)
    for _ in range(4):
        p.grad = torch.randn(64, 256, generator=generator)
        optimizer.step()
    return p.detach()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_meshes_of_two_dimensions() -> None:
    expected = on_one()
    for found in run_processes(4, on_a_grid, "rows"):
        assert torch.equal(found, expected)
    results = run_processes(4, on_a_grid, "both")  # columns: blocks of their own
    for found in results:
        assert torch.equal(found, results[0])
        assert 0 < distance(found, expected) < 0.05


def four(rank: int, world: int) -> Any:
    model, compiled = make(ALIGNED, "muon", mesh_of(world), **PINNED)
    run(model, compiled, range(7))
    return outcome(model, compiled)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_processes_are_one() -> None:
    model, compiled = make(ALIGNED, "muon", **PINNED)
    run(model, compiled, range(7))
    expected = outcome(model, compiled)
    for found in run_processes(4, four):
        assert not differing(found["params"], expected["params"])
        assert not differing(found["states"], expected["states"])
        assert widths(found) == widths(expected)
