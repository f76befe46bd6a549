"""Data, fully sharded, hybrid and tensor parallel training: the losses of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import stq_compile as stq
from processes import run_processes
from sharded import differing, distance, load_dcp, outcome, save_dcp, widths
from stq_compile.shards import local

pytestmark = pytest.mark.timeout(1800)

STEPS = 16
BATCH = 32
OPTIONS = {"interval": 5, "min_numel": 1000}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128))


def train(
    model: nn.Module, optimizer: Any, replica: int, replicas: int, steps: range = range(STEPS)
) -> list[float]:
    """Losses of the global batch, of which this replica sees its part."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 128, generator=generator)
        y = torch.randint(0, 16, (BATCH,), generator=generator)
        mine = slice(replica * BATCH // replicas, (replica + 1) * BATCH // replicas)
        loss = nn.functional.cross_entropy(model(x[mine]).float(), y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() / replicas
        if replicas > 1:
            total = global_sum(total, replica, replicas)
        losses.append(float(total))
    return losses


def global_sum(value: Tensor, replica: int, replicas: int) -> Tensor:
    """Over the replicas; processes that see the same data count once."""
    copies = dist.get_world_size() // replicas
    value = value / copies
    dist.all_reduce(value)
    return value


def shard(model: nn.Sequential, **options: Any) -> nn.Module:
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def split(model: nn.Sequential, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def parallel(
    rank: int, world: int, kind: str, options: dict[str, Any]
) -> tuple[nn.Module, Any, int, int]:
    """The model, its compiled optimizer, and which replica of how many this process belongs to."""
    torch.set_num_threads(1)
    model: nn.Module = make_model()
    replica, replicas = rank, world
    assert isinstance(model, nn.Sequential)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        model = shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = shard(model, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    elif kind == "hsdp":
        names = ("replicate", "shard")
        model = shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names))
    elif kind == "tp":
        model = split(model, init_device_mesh("cpu", (world,)))
        replica, replicas = 0, 1
    elif kind == "fsdp_tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        split(model, mesh["tp"])
        model = shard(model, mesh=mesh["dp"])
        replica, replicas = mesh["dp"].get_local_rank(), world // 2
    optimizer = stq.compile(torch.optim.AdamW(model.named_parameters(), lr=3e-3), **options)
    return model, optimizer, replica, replicas


def parallel_run(rank: int, world: int, kind: str, options: dict[str, Any]) -> Any:
    model, optimizer, replica, replicas = parallel(rank, world, kind, options)
    losses = train(model, optimizer, replica, replicas)
    packed = [local(v) for state in optimizer.state.values() for v in state.values()]
    assert any(isinstance(state, stq.PackedState) for state in packed)
    return {**outcome(model, optimizer), "losses": losses}


def expected_run(options: dict[str, Any]) -> Any:
    model = make_model()
    optimizer = stq.compile(torch.optim.AdamW(model.named_parameters(), lr=3e-3), **options)
    losses = train(model, optimizer, 0, 1)
    return {**outcome(model, optimizer), "losses": losses}


def check(result: Any, expected: Any, error: float) -> None:
    pairs = zip(result["losses"], expected["losses"], strict=True)
    print(f"losses differ by {max(abs(a - b) for a, b in pairs):.2g}")
    assert result["losses"] == pytest.approx(expected["losses"], abs=error)
    assert result["losses"][-1] < result["losses"][0] - 0.2


@pytest.mark.slow
def test_one_process_two_and_four_have_the_same_losses_and_plans() -> None:
    expected = expected_run(OPTIONS)
    assert expected["report"].transitions > 0
    for kind, world in (("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)):
        results = run_processes(world, parallel_run, kind, OPTIONS)
        for result in results:
            check(result, expected, 2e-4)
            formats = [format for _, _, format in widths(result)]
            assert formats == [format for _, _, format in widths(expected)], (kind, world)
            assert [r.step for r in result["history"]] == [r.step for r in expected["history"]]
            assert result["losses"] == results[0]["losses"]
            assert result["history"] == results[0]["history"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("tp", 2), ("fsdp_tp", 4), ("mixed", 2)])
def test_tensor_parallel_and_mixed_precision(kind: str, world: int) -> None:
    """Columns are blocks of their own, and bfloat16 rounds: near, and the same on all processes."""
    expected = expected_run(OPTIONS)
    results = run_processes(world, parallel_run, kind, OPTIONS)
    for result in results:
        check(result, expected, 0.03)
        assert result["history"] == results[0]["history"]
        for name, value in results[0]["params"].items():
            assert torch.equal(result["params"][name], value)


def zero_run(rank: int, world: int) -> Any:
    model = DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, lr=3e-3
    )
    stq.compile(optimizer.optim, precision=4, min_numel=1000)
    losses = train(model, optimizer, rank, world)
    return losses, stq.report(optimizer.optim).state_bytes


@pytest.mark.slow
def test_zero_redundancy_optimizer() -> None:
    """Each process has the states of some parameters: compile the optimizer inside."""
    expected = expected_run({"precision": 4, "min_numel": 1000})
    results = run_processes(2, zero_run)
    for losses, _ in results:
        assert losses == pytest.approx(expected["losses"], abs=0.01)
    assert sum(nbytes for _, nbytes in results) == expected["report"].state_bytes


HALF = 8


def checkpointed_run(rank: int, world: int, kind: str, folder: str) -> Any:
    """Saves half-way, goes on; and another optimizer goes on from the checkpoint."""
    model, optimizer, *place = parallel(rank, world, kind, OPTIONS)
    train(model, optimizer, *place, range(HALF))
    save_dcp(model, optimizer, f"{folder}/{kind}")
    train(model, optimizer, *place, range(HALF, STEPS))
    other, resumed, *place = parallel(rank, world, kind, OPTIONS)
    load_dcp(other, resumed, f"{folder}/{kind}")
    train(other, resumed, *place, range(HALF, STEPS))
    return outcome(model, optimizer), outcome(other, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsdp", "fsdp_tp"])
def test_checkpoints_of_meshes_of_two_dimensions(kind: str, tmp_path: Path) -> None:
    """Exact on the same mesh; on one process exact where blocks are whole, else it is said."""
    results = run_processes(4, checkpointed_run, kind, str(tmp_path))
    for expected, found in results:
        assert not differing(found["params"], expected["params"])
        assert not differing(found["states"], expected["states"])
        assert found["history"] == expected["history"]
        assert found["report"].reencoded == ()
    model = make_model()
    optimizer = stq.compile(torch.optim.AdamW(model.named_parameters(), lr=3e-3), **OPTIONS)
    load_dcp(model, optimizer, f"{tmp_path}/{kind}")
    names = stq.report(optimizer).reencoded
    assert len(names) == {"hsdp": 0, "fsdp_tp": 2}[kind]  # both states of what rows are cut of
    train(model, optimizer, 0, 1, range(HALF, STEPS))
    exact = expected_run({"precision": 32})["params"]
    for name, value in outcome(model, optimizer)["params"].items():
        sharded = results[0][0]["params"][name]  # its rounding is independent of this process's
        assert distance(value, sharded) < 2 * distance(sharded, exact[name]), name
