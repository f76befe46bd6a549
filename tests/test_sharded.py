"""Sharded parameters: results, plans and random bits do not depend on the sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import stq_compile as stq
from processes import run_processes
from sharded import ALIGNED, CUT, differing, distance, make, mesh_of, outcome, run, widths
from stq_compile.formats import BLOCK, block_count
from stq_compile.packed_state import PackedState
from stq_compile.shards import OWN_BLOCKS, Region, boxes, divides, local, region_of

PLANNED = {"interval": 3}
PINNED = {"precision": {"*": 4, "exp_avg_sq": 3}}
STEPS = range(10)


class Counted:
    """Notes what is given to all-reduces."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.inner = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes.append(tensor.nbytes)
        return self.inner(tensor, *args, **kwargs)


def planned_run(rank: int, world: int, optimizer: str) -> Any:
    model, compiled = make(ALIGNED, optimizer, mesh_of(world), **PLANNED)
    counted = Counted()
    dist.all_reduce = counted
    run(model, compiled, STEPS)
    states = [local(v) for state in compiled.state.values() for v in state.values()]
    bytes_here = sum(s.packed.nbytes for s in states if isinstance(s, PackedState))
    return {**outcome(model, compiled), "bytes": counted.bytes, "bytes_here": bytes_here}


def cut_run(rank: int, world: int) -> Any:
    model, compiled = make(CUT, "adamw", mesh_of(world), **PINNED)
    run(model, compiled, STEPS)
    return outcome(model, compiled)


def both_runs(rank: int, world: int, optimizer: str) -> Any:
    return planned_run(rank, world, optimizer), cut_run(rank, world)


def check_aligned(results: list[Any], optimizer: str) -> None:
    model, compiled = make(ALIGNED, optimizer, **PLANNED)
    run(model, compiled, STEPS)
    expected = outcome(model, compiled)
    assert expected["report"].transitions > 0
    for result in results:
        assert not differing(result["params"], expected["params"])
        assert not differing(result["states"], expected["states"])
        assert widths(result) == widths(expected)
        assert result["history"] == expected["history"]
        assert result["report"].rows == expected["report"].rows
        assert result["report"].split_bytes == 0
    packed = [row.bytes for row in expected["report"].rows if row.width < 32]
    assert sum(result["bytes_here"] for result in results) == sum(packed)


def check_cut(results: list[Any], world: int) -> None:
    model, compiled = make(CUT, "adamw", **PINNED)
    run(model, compiled, STEPS)
    expected = outcome(model, compiled)
    start, _ = make(CUT, "adamw", **PINNED)
    for result in results:
        assert not differing(result["params"], results[0]["params"])
        assert widths(result) == widths(expected)
        for name, param in expected["params"].items():
            moved = distance(start.get_parameter(name), param)
            assert distance(result["params"][name], param) <= 0.3 * moved, name
    pieces = {2: (18, 17), 4: (9, 9, 9, 8)}[world]  # rows
    extra = sum(block_count(160 * rows) for rows in pieces) - block_count(35 * 160)
    extra_vector = world * block_count(5200 // world) - block_count(5200)
    assert extra > 0
    assert extra_vector > 0
    bits = 4 * BLOCK // 8 + 2, 3 * BLOCK // 8 + 2
    report = results[0]["report"]
    assert report.split_bytes == (extra + extra_vector) * sum(bits)
    assert report.state_bytes == expected["report"].state_bytes + report.split_bytes
    assert "shards cut blocks" in str(report)


def test_two_processes_are_one() -> None:
    results = run_processes(2, both_runs, "adamw")
    check_aligned([planned for planned, _ in results], "adamw")
    check_cut([cut for _, cut in results], 2)
    # One all-reduce at each look (steps 3, 6 and 9), as long as the report says
    for planned, _ in results:
        assert len(planned["bytes"]) == 3
        assert planned["bytes"][-1] == planned["report"].look_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_four_processes_are_one(optimizer: str) -> None:
    results = run_processes(4, both_runs, optimizer)
    check_aligned([planned for planned, _ in results], optimizer)
    check_cut([cut for _, cut in results], 4)


def looks_of_sizes(rank: int, world: int) -> list[int]:
    found = []
    for rows in (64, 1024):
        model, compiled = make({"matrix": (rows, 128)}, "adamw", mesh_of(world), interval=1)
        run(model, compiled, range(4))
        found.append(stq.report(compiled).look_bytes)
    return found


@pytest.mark.slow
def test_what_a_look_sends_does_not_depend_on_the_size() -> None:
    for small, large in run_processes(2, looks_of_sizes):
        assert 0 < small == large < 1000


def regions(rank: int, world: int) -> Any:
    found = {}
    for name, param in make({**ALIGNED, **CUT}, "adamw", mesh_of(world))[0].named_parameters():
        region = region_of(param)
        assert region is not None
        found[name] = region, local(param).numel()
    return found


def test_counters_of_shards_do_not_overlap() -> None:
    results = run_processes(2, regions)
    for name in results[0]:
        (first, numel), (second, rest) = (result[name] for result in results)
        assert first.first_block == 0
        if rest:
            assert second.on_grid == (numel % BLOCK == 0)
            assert second.first_block == (numel // BLOCK if second.on_grid else second.first_block)
            assert second.on_grid or second.first_block > OWN_BLOCKS
    assert region_of(torch.zeros(3)) is None


def test_shards_of_two_dimensions_of_a_mesh_on_one_of_the_tensor() -> None:
    """FSDP over tensor parallelism: four parts, each row in one of them, in torch's order."""
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    rows = [(start[0], start[0] + size[0]) for size, start in boxes((256, 128), (2, 2), placements)]
    assert rows == [(0, 64), (128, 192), (64, 128), (192, 256)]
    assert all(divides(placement) for placement in placements)
    assert not divides(Replicate())
    assert Region(
        (256, 128), (Replicate(), _StridedShard(0, split_factor=2)), 0, True, ((), ())
    ).sharded
