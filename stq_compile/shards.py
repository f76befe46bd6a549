"""Where the part of a tensor that this process holds lies in the whole one.

A parameter that ``fully_shard`` or tensor parallelism has sharded is a DTensor, and so are its
gradient and its states; a packed state is a DTensor whose local tensor is a `PackedState`. Kernels
work element by element and run on local tensors; what is no kernel gets whole tensors, one
parameter's at a time (`regions`). What must not depend on the sharding is stated here in terms of
the whole tensor: its number of elements, and which of its blocks the local ones are.

The blocks of a shard are those of the whole tensor if the shard is one stretch of its memory that
begins where a block begins. Else its blocks are its own, and so are their random numbers: then
``first_block`` counts in a range that no whole tensor reaches, one part of it for each shard.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stq_compile.formats import BLOCK, block_count

if torch.distributed.is_available():
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard
else:  # builds of torch without it have no sharded tensors
    # A class that nothing is of, so that tests for it say no.
    DTensor = type("DTensor", (), {})  # type: ignore[assignment,misc]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Size of a part of a tensor, and where it begins, per dimension."""

Layout = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
"""Sizes of a mesh, and per dimension of it the dimension of the tensor that is divided (-1: none)
and the factor of a strided shard: placements in plain types."""

OWN_BLOCKS = 1 << 40
"""Counters from here on belong to shards whose blocks are not those of the whole tensor."""


@dataclass(frozen=True)
class Region:
    """A local tensor's place in the whole one.

    Attributes:
        shape: of the whole tensor.
        placements: torch's, one per dimension of the mesh.
        first_block: of the local tensor, as the random counter counts blocks.
        on_grid: whether the local blocks are blocks of the whole tensor.
        box: size and beginning of the part.
    """

    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    first_block: int
    on_grid: bool
    box: Box

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def sharded(self) -> bool:
        """Whether no process of a replica holds all of the tensor."""
        return any(divides(p) for p in self.placements)


def divides(placement: Any) -> bool:
    """Whether a placement shares a tensor out.

    torch's ``is_shard`` says no of a strided shard, that of FSDP over tensor parallelism on one
    dimension.
    """
    return isinstance(placement, (Shard, _StridedShard))


def local(value: Any) -> Any:
    """The tensor that this process holds: a DTensor's local one, and anything else itself."""
    return value._local_tensor if type(value) is DTensor else value


def wrap(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` as the local tensor of a DTensor if ``like`` is one, sharded as it is."""
    if type(like) is not DTensor:
        return tensor
    return DTensor(tensor, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]  # torch's


def region_of(tensor: Any) -> Region | None:
    """Where a DTensor's local tensor lies; None for an ordinary tensor."""
    if type(tensor) is not DTensor:
        return None
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate() or (0,) * mesh.ndim  # none: it has no part of the tensor
    return _region(tuple(tensor.shape), tuple(mesh.shape), tuple(placements), tuple(coordinate))


@functools.lru_cache(maxsize=4096)
def _region(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinate: tuple[int, ...],
) -> Region:
    size, start = _box(shape, mesh, placements, coordinate)
    begin = _begin(shape, placements, start)
    if begin is not None and (begin % BLOCK == 0 or not math.prod(size)):
        return Region(shape, placements, begin // BLOCK, True, (size, start))
    index = 0
    for i, placement in enumerate(placements):
        if divides(placement):
            index = index * mesh[i] + coordinate[i]
    own = OWN_BLOCKS + index * (block_count(math.prod(shape)) + 1)
    return Region(shape, placements, own, False, (size, start))


def _box(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinate: tuple[int, ...],
) -> Box:
    """The shard at a coordinate of the mesh."""
    return _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)


def _begin(
    shape: tuple[int, ...], placements: tuple[Any, ...], start: tuple[int, ...]
) -> int | None:
    """The element at which a shard begins that is one stretch of the whole tensor's memory."""
    dims = {p.dim for p in placements if divides(p)}
    if not all(type(p) in (Shard, Replicate) for p in placements):
        return None  # a strided shard's rows may lie apart
    if not dims:
        return 0
    if len(dims) > 1 or math.prod(shape[: min(dims)]) != 1:
        return None
    dim: int = dims.pop()
    return start[dim] * math.prod(shape[dim + 1 :])


def boxes(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...]) -> list[Box]:
    """Every shard, in the order of the mesh; each replicated one once."""
    counts = [n if divides(p) else 1 for n, p in zip(mesh, placements, strict=True)]
    places = itertools.product(*map(range, counts))
    return [_box(shape, mesh, placements, place) for place in places]


def split_blocks(tensor: Any) -> int:
    """How many blocks all shards together have beyond those of the whole tensor.

    Where a border between two shards lies inside of a block, both have a part of it, with a scale
    and padding of its own.
    """
    if type(tensor) is not DTensor:
        return 0
    found = boxes(
        tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(tensor.placements)
    )  # fmt: skip
    return sum(block_count(math.prod(size)) for size, _ in found) - block_count(tensor.numel())


def gradient(value: Any, region: Region | None) -> Any:
    """The local gradient, placed as its parameter; it is ready to be read.

    Tensor parallelism may leave a gradient partial, to be added up over the mesh.
    """
    if type(value) is not DTensor:
        return value
    if region is not None and value.placements != region.placements:
        value = value.redistribute(placements=region.placements)
    found = value._local_tensor
    return found.wait() if type(found) is AsyncCollectiveTensor else found


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor."""
    return type(value) is DTensor


def place_of(tensor: Tensor) -> Box:
    """The part of the whole tensor that this process holds; all of an ordinary one."""
    shape = tuple(tensor.shape)
    if type(tensor) is not DTensor:
        return shape, (0,) * len(shape)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate() or (0,) * mesh.ndim
    return _box(shape, tuple(mesh.shape), tuple(tensor.placements), tuple(coordinate))


def layout_of(tensor: Any) -> Layout | None:
    """How a DTensor is sharded, in plain types."""
    if type(tensor) is not DTensor:
        return None
    placements: tuple[Any, ...] = tuple(tensor.placements)
    dims = tuple(
        (p.dim, getattr(p, "split_factor", 1)) if divides(p) else (-1, 1) for p in placements
    )
    return tuple(tensor.device_mesh.shape), dims


def placements_of(dims: tuple[tuple[int, int], ...]) -> tuple[Any, ...]:
    """torch's placements from the second part of a `Layout`."""
    return tuple(
        Replicate() if dim < 0
        else Shard(dim) if factor == 1
        else _StridedShard(dim, split_factor=factor)
        for dim, factor in dims
    )  # fmt: skip


def distributed(
    part: Tensor, like: Tensor, shape: tuple[int, ...], *, by_rows: bool = False
) -> Tensor:
    """A DTensor of which ``part`` is the local tensor, on the mesh of ``like``.

    It is divided as ``like``, or ``by_rows``: along its first dimension wherever ``like`` is.
    """
    assert isinstance(like, DTensor)
    placements = tuple(like.placements)
    if by_rows:
        placements = tuple(Shard(0) if divides(p) else Replicate() for p in placements)
    return _assembled(part, like.device_mesh, placements, shape)


def _assembled(
    part: Tensor, mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]
) -> Tensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, shape=torch.Size(shape), stride=stride)


def whole_of(part: Tensor, region: Region, mesh: Any) -> Tensor:
    """All of a tensor of which this process holds ``part``, row-major; all processes call it."""
    whole: Tensor = gathered(_assembled(part, mesh, region.placements, region.shape))
    return whole.contiguous()


def part_of(whole: Tensor, region: Region) -> Tensor:
    """What this process holds of a whole tensor, as a view."""
    return whole[slices(region.box)]


def slices(box: Box) -> tuple[slice, ...]:
    """What a box cuts out of a tensor."""
    return tuple(slice(s, s + n) for n, s in zip(*box, strict=True))


def gathered(value: Any) -> Any:
    """All of a DTensor on every process (they must all call it); anything else as it is."""
    if type(value) is not DTensor:
        return value
    if value.dtype == torch.int16:  # which gloo does not know
        wide: Any = value.to(torch.int32)
        return wide.full_tensor().to(torch.int16)
    return value.full_tensor()


def placed_as(shape: tuple[int, ...], layout: Layout, like: Tensor) -> Tensor:
    """A DTensor of no particular values on the mesh of ``like``, sharded as ``layout`` says."""
    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, placements_of(layout[1])
    coordinate = mesh.get_coordinate() or (0,) * mesh.ndim
    size, _ = _box(tuple(shape), tuple(mesh.shape), placements, tuple(coordinate))
    return _assembled(torch.empty(size, device=mesh.device_type), mesh, placements, tuple(shape))
