"""Regions whose states are updated element by element get a kernel for that.

    m = m.lerp(g, 0.1)               kernel:  m, v, p, norm, norm_1 -> the same lines, but that
    u = m / v.sqrt() + 0.01 * p               norms are inputs; also u, for the rest to read
    ratio = p.norm() / u.norm()      rest:    norm = p.norm()
    p = p - lr * ratio * u                    (u,) = kernel_0("u_value")
                                              norm_1 = u.norm()

What lies between the two, *intermediates*, belongs to one parameter and one step. There are those
that the rest makes for the kernel, of one number or of one per element, and *feeds*, which the
kernel makes for the rest. The kernel of a feed may need intermediates in its turn, so that the rest
says when it is called; it is cut out of the whole kernel when formats are known (`passes.feed`).
So states are decoded and encoded in registers, as in any kernel, and nothing of the optimizer's is
written before everything else is computed: the kernel that writes computes the feeds once more.

Only what depends on states goes into feeds; the rest has its own ways to compute what depends on
gradients and parameters alone, and what its own results give (a Newton-Schulz iteration).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from stq_compile.passes.partition import Supports, why_layout_unfused, why_operand_unfused
from stq_compile.step_graph import Instance, Operand, Program, Role, Source, StepGraph

WORTH_CUTTING = 1 << 16
"""Elements of a parameter from which on its region is cut: fewer are sooner updated by operators
than kernels for them are built."""


def cut(program: Program, why_not: Supports) -> Program:
    """Cut every region that has a state for a kernel to update."""
    return Program(program.optimizer, tuple(map(partial(_cut, why_not=why_not), program.units)))


def _cut(unit: StepGraph, why_not: Supports) -> StepGraph:
    params = {o.source.param for o in unit.operands} - {-1}
    param = unit.instances[0].param
    if not unit.unfused or len(params) > 1 or param.role is not Role.PARAM:
        return unit
    misfit = any(why_layout_unfused(i.param) for i in unit.instances)
    if misfit or param.shape == () or param.numel < WORTH_CUTTING:
        return unit
    return _Knife(unit, why_not).cut()


class _Border(NamedTuple):
    """Intermediates: those that the rest makes, feeds, and the kernels' placeholders for both."""

    made: list[fx.Node]
    fed: list[fx.Node]
    between: dict[fx.Node, fx.Node]


class _Knife:
    """Sorts the nodes of one region.

    ``pointwise``: nodes that a kernel can compute or read, one number or one for each element.
    ``stateful``: those of them that depend on a state with one number for each element.
    """

    def __init__(self, unit: StepGraph, why_not: Supports) -> None:
        self.unit = unit
        self.shape = unit.instances[0].param.whole_shape
        self.by_name = {n.name: n for n in unit.placeholders}
        self.fitting = {
            node
            for i, node in enumerate(unit.placeholders)
            if unit.operands[i].source.key not in unit.facts.matrices  # with formats of their own
            and not any(
                why_operand_unfused(row.operands[i], row.param, unit.widened)
                for row in unit.instances
            )
        }
        self.states = {
            n for n in self.fitting if unit.operand_of(n).role is Role.STATE and self._is_dense(n)
        }
        self.pointwise, self.stateful = set(self.fitting), set(self.states)
        for node in unit.calls:
            inputs = node.all_input_nodes
            if not why_not(node) and self._fits(node) and all(map(self._readable, inputs)):
                self.pointwise.add(node)
                if any(a in self.stateful for a in inputs):
                    self.stateful.add(node)

    def cut(self) -> StepGraph:
        """The unit's kernel with its rest; the unit itself if no state would be a kernel's."""
        results = dict(zip(self.unit.writes or (), self.unit.outputs, strict=True))
        mine = {
            name: value
            for name, value in results.items()
            if self.by_name[name] in self.fitting and self._readable(value)
        }
        if not any(self.by_name[name] in self.states for name in mine):
            return self.unit
        others = {name: value for name, value in results.items() if name not in mine}
        kernel, rest = self._closure(mine.values(), others.values())
        made = [n for n in self.unit.calls if n in rest and n in kernel - self.pointwise]
        fed = [n for n in self.unit.calls if n in rest and self._is_feed(n)]
        border = _Border(made, fed, self._intermediates([*made, *fed]))
        return self.unit.replace(
            **self._kernel(kernel, mine, border),
            unfused="",
            plain=None,
            rest=self.unit.replace(
                **self._rest(rest, others, border),
                name=f"{self.unit.name}_rest",
                plain=None,
            ),
            whole=self.unit,
        )

    def _is_dense(self, node: fx.Node) -> bool:
        value = node.meta.get("val", node.meta.get("example"))
        return isinstance(value, Tensor) and tuple(value.shape) == self.shape

    def _fits(self, node: fx.Node) -> bool:
        value = node.meta.get("val", node.meta.get("example"))
        return not isinstance(value, Tensor) or value.shape == () or self._is_dense(node)

    def _readable(self, node: Any) -> bool:
        """Whether a kernel has the value of a node, or can be given it."""
        if not isinstance(node, fx.Node) or node in self.pointwise:
            return isinstance(node, fx.Node)
        value = node.meta.get("val")
        number = isinstance(value, torch.SymFloat)
        loadable = number or (isinstance(value, Tensor) and value.dtype == torch.float32)
        return node.op != "placeholder" and loadable and self._fits(node)

    def _is_feed(self, node: fx.Node) -> bool:
        """Whether the rest gets a node from a kernel."""
        return node in self.stateful and node.op != "placeholder" and self._is_dense(node)

    def _closure(
        self, mine: Iterable[fx.Node], others: Iterable[fx.Node]
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """What the kernels compute or read, and what the rest does. Intermediates are in both."""
        kernel, rest = set[fx.Node](), set[fx.Node]()
        todo = [(node, kernel) for node in mine] + [(node, rest) for node in others]
        while todo:
            node, side = todo.pop()
            if node in side:
                continue
            side.add(node)
            if side is kernel and node not in self.pointwise:
                todo.append((node, rest))
            elif side is rest and self._is_feed(node):
                todo.append((node, kernel))
            else:
                todo += [(a, side) for a in node.all_input_nodes]
        return kernel, rest

    def _intermediates(self, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Placeholders of the kernel for them."""
        found = {}
        example = self.by_name[self.unit.instances[0].param.name].meta["example"]
        for node in nodes:
            new = found[node] = fx.Graph().placeholder(f"{node.name}_value")
            value = node.meta["val"]
            if self._is_dense(node):
                new.meta = {"val": value, "example": example}
            else:
                dtype = value.dtype if isinstance(value, Tensor) else torch.float64
                new.meta = {"val": value, "example": torch.ones((), dtype=dtype)}
        return found

    def _kernel(
        self, nodes: set[fx.Node], writes: dict[str, fx.Node], border: _Border
    ) -> dict[str, Any]:
        """Graph, operands and writes of the kernel; feeds are written as well."""
        made, fed, between = border
        graph, inputs, env = self._begun(nodes, writes)
        env |= {node: graph.node_copy(between[node]) for node in made}
        feeds = {node: graph.node_copy(between[node]) for node in fed}
        for node in self.unit.calls:
            if node in nodes and node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        results = {name: env[value] for name, value in writes.items()}
        results |= {feeds[node].name: env[node] for node in fed}
        return self._finished(graph, results, self._rows(inputs, [*made, *fed], between))

    def _rest(
        self, nodes: set[fx.Node], writes: dict[str, fx.Node], border: _Border
    ) -> dict[str, Any]:
        """The same of the rest, with calls of the kernels that feed it."""
        made, fed, between = border
        graph, inputs, env = self._begun(nodes, writes)
        targets = {node: graph.node_copy(between[node]) for node in made}
        level = self._levels()
        for k in range(max(level.values(), default=0) + 1):
            mine = [n for n in self.unit.calls if n in nodes and level[n] == k and n not in fed]
            for node in mine:
                env[node] = graph.node_copy(node, env.__getitem__)
            values = [n for n in fed if level[n] == k]
            if values:
                kernel, _ = self._closure(values, ())
                needed: dict[str, Any] = {between[n].name: env[n] for n in made if n in kernel}
                names = tuple(between[n].name for n in values)
                call = graph.call_module(f"kernel_{k}", names, needed)
                env |= {n: graph.call_function(getitem, (call, i)) for i, n in enumerate(values)}
        results = {name: env[value] for name, value in writes.items()}
        results |= {targets[node].name: env[node] for node in made}
        return self._finished(graph, results, self._rows(inputs, made, between))

    def _begun(
        self, nodes: set[fx.Node], writes: dict[str, fx.Node]
    ) -> tuple[fx.Graph, list[fx.Node], dict[fx.Node, fx.Node]]:
        """A graph that has its inputs, and what stands for the unit's nodes in it."""
        graph = fx.Graph()
        inputs = self._placeholders(graph, nodes, writes)
        return graph, inputs, {self.by_name[node.name]: node for node in inputs}

    def _finished(
        self, graph: fx.Graph, results: dict[str, fx.Node], rows: tuple[Instance, ...]
    ) -> dict[str, Any]:
        """The fields of a unit with this graph, which returns these results."""
        graph.output(tuple(results.values()))
        return {"graph": graph, "instances": rows, "writes": tuple(results)}

    def _levels(self) -> dict[fx.Node, int]:
        """How many kernels are called before a node is computed."""
        level: dict[fx.Node, int] = {}
        for node in self.unit.graph.nodes:
            fed = node not in self.pointwise
            level[node] = max(
                (level[a] + (fed and self._is_feed(a)) for a in node.all_input_nodes), default=0
            )
        return level

    def _placeholders(
        self, graph: fx.Graph, nodes: set[fx.Node], writes: Iterable[str]
    ) -> list[fx.Node]:
        """Copies of the inputs that are read or written; of the parameter in any case."""
        kept = {*writes, self.unit.instances[0].param.name}
        return [graph.node_copy(n) for n in self.unit.placeholders if n in nodes or n.name in kept]

    def _rows(
        self, inputs: list[fx.Node], nodes: list[fx.Node], between: dict[fx.Node, fx.Node]
    ) -> tuple[Instance, ...]:
        """The operands of these inputs, and of intermediates."""
        names = {node.name for node in inputs}
        rows = []
        for instance in self.unit.instances:
            own = [o for o in instance.operands if o.name in names]
            new = [self._operand(between[n], instance.param, self._is_dense(n)) for n in nodes]
            rows.append(Instance((*own, *new)))
        return tuple(rows)

    def _operand(self, node: fx.Node, param: Operand, dense: bool) -> Operand:
        example = node.meta["example"]
        return Operand(
            node.name,
            Role.INTERMEDIATE,
            Source(param.source.param, param.source.name, node.name),
            shape=param.shape if dense else (),
            stride=param.stride if dense else (),
            dtype=torch.float32 if dense else example.dtype,
            device=param.device,
            number=isinstance(node.meta["val"], torch.SymFloat),
            region=param.region if dense else None,
        )
