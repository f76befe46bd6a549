"""Loading through ``torch.distributed.checkpoint``, whatever widths the checkpoint holds.

    state = get_optimizer_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=path, planner=LoadPlanner())
    set_optimizer_state_dict(model, optimizer, state)

torch loads into the tensors of the state dict that it is given, so these must be of the sizes that
were saved. Those of packed states depend on their widths, and a planner may have chosen others; the
`LoadPlanner` looks the sizes up in the checkpoint and makes room for them. Saving needs nothing of
the kind.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from stq_compile.formats import block_count
from stq_compile.shard_blocks import is_split
from stq_compile.shards import distributed, is_sharded, local, placed_as

FIELDS = (
    "format", "size", "stride", "normalizer", "eager_writes", "sharding", "split", "codes", "scales"
)  # fmt: skip


class LoadPlanner(DefaultLoadPlanner):
    """torch's planner, for state dicts with packed states in them."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Make room for what the checkpoint holds; then as torch."""
        if metadata is not None:
            saved = metadata.state_dict_metadata
            for place, key, path in list(_states(state_dict, ())):
                place[key] = _room(place[key], path, saved)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        # torch spells all keys as strings, and would put what is no tensor beside those that are
        # numbers, as the keys of a plain ``optimizer.state_dict()`` are.
        paths = {name: _spelled(state_dict, path) for name, path in self.mappings.items()}
        self.mappings = paths


def _spelled(container: Any, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path with the keys that the containers have."""
    out = []
    for key in path:
        if isinstance(container, MutableMapping) and key not in container:
            key = next((k for k in container if str(k) == key), key)
        out.append(key)
        inside = isinstance(container, list) or key in container
        container = container[key] if inside else {}
    return tuple(out)


def _states(value: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    """Every tensor and packed state: (container, key, name in the checkpoint)."""
    items: Any = ()
    if isinstance(value, MutableMapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        name = (*path, str(key))
        if isinstance(inner, Tensor) or _is_packed(inner):
            yield value, key, ".".join(name)
        else:
            yield from _states(inner, name)


def _is_packed(value: Any) -> bool:
    return isinstance(value, MutableMapping) and value.keys() >= set(FIELDS)


def _room(value: Any, name: str, saved: dict[str, Any]) -> Any:
    """What to load the entry into: of the form in which it was saved."""
    codes, scales = saved.get(f"{name}.codes"), saved.get(f"{name}.scales")
    if isinstance(codes, TensorStorageMetadata) and isinstance(scales, TensorStorageMetadata):
        state = _stand_in(value)
        entry: dict[str, Any] = dict.fromkeys(FIELDS)
        return {**entry, "codes": _buffer(codes, state), "scales": _buffer(scales, state)}
    whole = saved.get(name)
    if _is_packed(value) and isinstance(whole, TensorStorageMetadata):
        state = _stand_in(value)
        if not is_sharded(state):
            return torch.empty(whole.size, dtype=whole.properties.dtype)
        part = torch.empty(local(state).shape, dtype=whole.properties.dtype)
        return distributed(part, state, tuple(whole.size))
    return value


def _stand_in(value: Any) -> Tensor:
    """A tensor without memory, of the state's shape and sharding."""
    if isinstance(value, Tensor):
        return value
    shape = torch.Size(value["size"])
    if not is_sharded(value["codes"]):
        return torch.empty(shape, device="meta")
    return placed_as(shape, value["sharding"], value["codes"])


def _buffer(saved: TensorStorageMetadata, state: Tensor) -> Tensor:
    """Memory for codes or scales: this process's rows where all processes would cut them alike,
    and else all of them."""
    size, dtype = tuple(saved.size), saved.properties.dtype
    if not is_sharded(state):
        return torch.empty(size, dtype=dtype)
    if dtype != torch.uint8 and size == tuple(state.shape):  # a code for each element
        return distributed(torch.empty(local(state).shape, dtype=dtype), state, size)
    if size[0] != block_count(state.numel()) or is_split(state):
        return torch.empty(size, dtype=dtype)
    rows = block_count(local(state).numel())
    return distributed(torch.empty(rows, *size[1:], dtype=dtype), state, size, by_rows=True)
