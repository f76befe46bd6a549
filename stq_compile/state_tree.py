"""The tensors of an optimizer's state, in whatever containers the optimizer keeps them.

Most states are ``state[param][key]``; some optimizers keep lists of matrices (one per dimension),
dicts of dicts, objects of their own, or state under a key that is no parameter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Leaf:
    """One tensor: the key of ``optimizer.state`` it is under, its own key, how to replace it.

    ``key`` joins what leads to it with dots: ``state[p]["GG"][1]`` is ``"GG.1"``.
    """

    owner: Any
    key: str
    value: Tensor
    put: Callable[[Tensor], None]


def optimizers_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and those that it wraps, as attributes (Lookahead and its like)."""
    found = [optimizer]
    for outer in found:
        inner = [v for v in vars(outer).values() if isinstance(v, Optimizer)]
        found += [o for o in inner if all(o is not f for f in found)]
    return found


def leaves(optimizer: Optimizer) -> Iterator[Leaf]:
    """Every tensor in the state of an optimizer and of those that it wraps, each place once."""
    seen: set[int] = set()
    for one in optimizers_of(optimizer):
        if id(one.state) in seen:
            continue
        seen.add(id(one.state))
        for owner, entries in list(one.state.items()):
            yield from _walk(owner, "", entries, _setter(one.state, owner))


def _walk(owner: Any, key: str, value: Any, put: Callable[[Any], None]) -> Iterator[Leaf]:
    if isinstance(value, Tensor):
        yield Leaf(owner, key, value, put)
    elif isinstance(value, (dict, list, deque)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in list(items):
            yield from _walk(owner, _join(key, name), inner, _setter(value, name))
    elif isinstance(value, tuple):
        parts = list(value)
        make = getattr(value, "_make", type(value))

        def rebuild(i: int) -> Callable[[Any], None]:
            def put_part(new: Any) -> None:
                parts[i] = new
                put(make(parts))

            return put_part

        for i, inner in enumerate(value):
            yield from _walk(owner, _join(key, i), inner, rebuild(i))
    elif _is_record(value):
        for name, inner in list(vars(value).items()):
            yield from _walk(owner, _join(key, name), inner, partial(setattr, value, name))


def _is_record(value: Any) -> bool:
    """Whether an object holds its attributes and nothing else that may lead back to it."""
    if isinstance(value, (type, Optimizer, nn.Module)) or callable(value):
        return False
    if not hasattr(value, "__dict__"):
        return False
    held = tree_leaves(list(vars(value).values()))
    return all(not hasattr(inner, "__dict__") or isinstance(inner, Tensor) for inner in held)


def tensors(entries: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the state of one parameter, with its key."""
    for leaf in _walk(None, "", entries, lambda _: None):
        yield leaf.key, leaf.value


def rebuilt(value: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    """A copy of nested containers, each part of which is what ``change`` gives for (key, part).

    A part that ``change`` gives back is walked if it is a container.
    """
    new = change(key, value)
    if new is not value:
        return new
    if isinstance(value, dict):
        return {name: rebuilt(part, change, _join(key, name)) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [rebuilt(part, change, _join(key, i)) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else getattr(value, "_make", type(value))(parts)
    return value


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _setter(container: Any, index: Any) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        container[index] = value

    return put
