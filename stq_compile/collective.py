"""Sums of shards become sums of whole tensors: what makes the planner's decisions global.

One all-reduce of one vector per planning step and mesh, and per dimension of the mesh along which
some parameter is sharded. The vector holds some tens of numbers per parameter, however many
elements it has. Ordinary tensors take no part: processes that hold a copy each (DDP) compute
the same sums from the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from stq_compile.shards import divides, region_of

Sums = dict[int, dict[str, float]]
"""Named sums by parameter number; the same names in the same order on every process."""


def add_up(sums: Mapping[int, Mapping[str, float]], params: Sequence[Tensor]) -> tuple[Sums, int]:
    """The sums over all shards, and the bytes that this process gave to the all-reduces.

    Every process of the meshes must call it, with sums of the same parameters.
    """
    total: Sums = {number: dict(row) for number, row in sums.items()}
    sent = 0
    for mesh, numbers in _meshes(total, params).items():
        parts = [torch.tensor(list(total[n].values()), dtype=torch.float64) for n in numbers]
        placements = [params[n].placements for n in numbers]  # type: ignore[attr-defined]  # DTensors
        for dim in range(mesh.ndim):
            if not any(divides(p[dim]) for p in placements):
                continue
            for part, placed in zip(parts, placements, strict=True):
                if not divides(placed[dim]) and mesh.get_local_rank(dim) != 0:
                    part.zero_()  # of copies, one counts
            vector = torch.cat(parts).to(mesh.device_type)
            dist.all_reduce(vector, group=mesh.get_group(dim))
            sent += vector.nbytes
            parts = list(torch.split(vector.cpu(), [len(part) for part in parts]))
        for number, part in zip(numbers, parts, strict=True):
            total[number] = dict(zip(total[number], part.tolist(), strict=True))
    return total, sent


def anywhere(here: bool, params: Sequence[Tensor]) -> bool:
    """Whether something is so on any process that has a part of these parameters."""
    count = 1.0 if here else 0.0
    total, _ = add_up({number: {"count": count} for number in range(len(params))}, params)
    return any(row["count"] > 0 for row in total.values())


def _meshes(sums: Sums, params: Sequence[Tensor]) -> dict[Any, list[int]]:
    """The parameters whose sums are of shards, in order, by their mesh."""
    found: dict[Any, list[int]] = {}
    for number in sorted(sums):
        region = region_of(params[number])
        if region is not None and region.sharded:
            mesh = params[number].device_mesh  # type: ignore[attr-defined]  # a DTensor, by `region_of`
            found.setdefault(mesh, []).append(number)
    return found
