"""From what Dynamo hands the backend to a `Program`: every input gets its role and its source.

Dynamo shows parameters and states as attributes of the graph module, the very objects that the
optimizer holds, and gradients and changing hyperparameters as placeholders. So a role is found
by looking an object up among the optimizer's own, by identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

from stq_compile.errors import UnknownInputError
from stq_compile.shards import is_sharded, local, region_of
from stq_compile.state_tree import leaves
from stq_compile.step_graph import (
    CPU,
    Instance,
    Operand,
    Program,
    Role,
    Source,
    StepGraph,
    location_of,
    set_device,
)


@dataclass(frozen=True)
class Argument:
    """An input that Dynamo passes at each call. ``live`` is set for a state: the object that the
    optimizer holds, which packing may since have replaced."""

    position: int
    live: Tensor | None = None


@dataclass(frozen=True)
class Gradient:
    """The gradient of a parameter that Dynamo was not shown."""

    param: Tensor


Binding = Tensor | Argument | Gradient
"""What an operand of the captured step stands for: a live tensor, an argument of the call, or what
a parameter has as its gradient then."""


@dataclass(frozen=True)
class Captured:
    """The step as one graph, the live object behind each (role, source), and the name of the graph
    module's attribute that held it.

    ``handed_back``: places among what Dynamo's graph returns that are states themselves, as a step
    stores them that casts its states to the dtype which they have (``state["m"].type_as(p)``). The
    program does not return them.
    """

    program: Program
    bindings: dict[tuple[Role, Source], Binding]
    attributes: dict[tuple[Role, Source], str]
    handed_back: dict[int, tuple[Role, Source]] = field(default_factory=dict)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of `Source.param`."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def param_sources(optimizer: Optimizer) -> dict[int, Source]:
    """Source of every parameter by ``id``; names are the ones that the optimizer was given."""
    sources: dict[int, Source] = {}
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            name = names[i] if names else f"group{g}.param{i}"
            sources[id(param)] = Source(len(sources), name)
    return sources


def capture(
    gm: fx.GraphModule, optimizer: Optimizer, sources: Mapping[int, Source] | None = None
) -> Captured:
    """Turn Dynamo's graph of ``optimizer.step`` into a program of one step graph.

    What the step makes itself is made on the CPU in the graph: passes know no devices, and what
    runs on one is told so by the operands.

    ``sources`` number the parameters as `param_sources` does, where the optimizer has only some.
    """
    known = _known_tensors(optimizer, sources or param_sources(optimizer))
    name = type(optimizer).__name__
    params = {known[id(p)][1].param: p for p in params_of(optimizer)}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    operands: list[Operand] = []
    bindings: dict[tuple[Role, Source], Binding] = {}
    attributes: dict[tuple[Role, Source], str] = {}
    placeholders: dict[tuple[Role, Source], fx.Node] = {}
    position = 0
    inputs: list[tuple[fx.Node, Tensor, Binding]] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example = node.meta["grapharg"].example
            inputs.append((node, example, Argument(position)))
            position += 1
        elif node.op == "get_attr":
            live = _attribute(gm, str(node.target))
            inputs.append((node, live, live))
    for node, example, binding in inputs:
        role, source = _identify(node, example, known, name)
        key = (role, source)
        if key in placeholders:
            env[node] = placeholders[key]
            continue
        new = graph.placeholder(_readable(role, source))
        number = not isinstance(example, Tensor)
        outer = _as_tensor(example)
        new.meta["example"] = _stand_in(outer)
        env[node] = placeholders[key] = new
        # A gradient may be placed otherwise than its parameter, as which it is read.
        placed = params[source.param] if role is Role.GRAD else outer
        held = local(placed if region_of(placed) is not None else outer)
        operands.append(
            Operand(
                new.name,
                role,
                source,
                tuple(held.shape),
                tuple(held.stride()),
                outer.dtype,
                held.device,
                next((location_of(user) for user in node.users), ""),
                number=number,
                region=region_of(placed),
            )
        )
        if role is Role.STATE and isinstance(binding, Argument):
            binding = Argument(binding.position, outer)
        bindings[key] = binding
        if node.op == "get_attr":
            attributes[key] = str(node.target)
    states = {
        _place(node): key
        for key, new in placeholders.items()
        for node, _, _ in inputs
        if env[node] is new and key[0] is Role.STATE
    }
    handed_back: dict[int, tuple[Role, Source]] = {}
    kept: dict[int, Any] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            for i, out in enumerate(node.args[0]):
                place = _place(out) if isinstance(out, fx.Node) else None
                if place is not None and place in states:
                    handed_back[i] = states[place]
                else:
                    kept[i] = fx.map_arg(out, env.__getitem__)
            graph.output(tuple(kept.values()))
        elif node.target in CASTS and _place(node) == _place(node.args[0]) is not None:
            env[node] = env[node.args[0]]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            set_device(env[node], CPU)
    instance = Instance(tuple(operands), tuple(kept))
    step = StepGraph("step", graph, (instance,))
    return Captured(Program(name, (step,)), bindings, attributes, handed_back)


CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous")
"""Methods that give back the tensor itself if it is so already. What is then written in place is
written to it; functionalization would take the cast for a copy and forget what is written."""


def _place(node: fx.Node) -> Any:
    """Equal for values that are the same memory, read in the same way; None if it is not known."""
    fake = node.meta.get("example_value")
    if not isinstance(fake, Tensor) or fake.layout != torch.strided or is_sharded(fake):
        return None
    layout = (fake.storage_offset(), *fake.shape, *fake.stride())
    if not all(isinstance(number, int) for number in layout):
        return None
    memory = StorageWeakRef(fake.untyped_storage())  # type: ignore[no-untyped-call]  # torch's
    return memory, layout, fake.dtype


NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def _as_tensor(example: Any) -> Tensor:
    """A Python number that Dynamo made an input, as a 0-dim tensor.

    A symbolic number's present value is its hint; to convert it would be a guard on that value.
    """
    if isinstance(example, (torch.SymInt, torch.SymFloat)):
        example = example.node.hint
    if isinstance(example, NUMBERS):
        return torch.tensor(float(example), dtype=torch.float64)
    tensor: Tensor = example
    return tensor


def _stand_in(example: Tensor) -> Tensor:
    """What passes may look at: the value of a scalar, the geometry of anything else.

    The geometry is that of the whole tensor, of which this process may hold a part. A graph must
    not keep a state alive that has since been packed.
    """
    if example.ndim == 0:
        return local(example).detach().to("cpu", copy=True)  # type: ignore[no-any-return]  # a tensor
    return torch.empty_strided(example.size(), example.stride(), dtype=example.dtype, device="meta")


def _attribute(gm: fx.GraphModule, target: str) -> Tensor:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def _known_tensors(
    optimizer: Optimizer, sources: Mapping[int, Source]
) -> dict[int, tuple[Role, Source]]:
    known: dict[int, tuple[Role, Source]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            known[id(param)] = (Role.PARAM, sources[id(param)])
            if param.grad is not None:
                known[id(param.grad)] = (Role.GRAD, sources[id(param)])
        for key, value in group.items():
            if isinstance(value, Tensor):
                known[id(value)] = (Role.SCALAR, Source(-1, "", f"param_groups[{g}][{key!r}]"))
    for leaf in leaves(optimizer):
        owner = sources.get(id(leaf.owner))
        if owner is not None and id(leaf.value) not in known:  # a parameter stays one
            known[id(leaf.value)] = (Role.STATE, Source(owner.param, owner.name, leaf.key))
    return known


def _identify(
    node: fx.Node, example: Any, known: dict[int, tuple[Role, Source]], optimizer: str
) -> tuple[Role, Source]:
    found = known.get(id(example))
    if found is not None:
        return found
    location = next((location_of(user) for user in node.users), "")
    if not isinstance(example, (Tensor, *NUMBERS)):
        reason = f"it is a {type(example).__name__}"
        raise UnknownInputError(
            optimizer=optimizer, name=node.target, reason=reason, location=location
        )
    tensor = _as_tensor(example)
    if tensor.ndim == 0:
        expression = str(node.target)
        if "grapharg" in node.meta:
            expression = str(node.meta["grapharg"].source.name).replace("L['self'].", "")
        return Role.SCALAR, Source(-1, "", expression)
    raise UnknownInputError(
        optimizer=optimizer,
        name=node.target,
        reason=f"a tensor of shape {tuple(tensor.shape)}",
        location=location,
    )


def _readable(role: Role, source: Source) -> str:
    if role is Role.SCALAR:
        return re.sub(r"\W+", "_", source.key.replace("param_groups", "group")).strip("_")
    stem = re.sub(r"\W+", "_", source.key or str(role))
    return f"{stem}_{source.param}" if stem[0].isalpha() else f"{role}_{stem}_{source.param}"
