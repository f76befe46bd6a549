"""A graph as a layered drawing, after Sugiyama, Tagawa and Toda (1981).

Layers by longest path, dummy nodes on edges that span layers, orders by barycenter sweeps, and
positions by relaxation towards the neighbours. Sizes are in pixels.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from stq_compile.reporting.graph_data import GraphData

ROW = 58
HEIGHT = 24
GAP = 14
CHARACTER = 6.6
SWEEPS = 12


@dataclass
class Box:
    """A node of the drawing; a dummy has no label and only bends an edge."""

    label: str = ""
    kind: str = ""
    note: str = ""
    layer: int = 0
    x: float = 0.0
    width: float = 4.0
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)

    @property
    def y(self) -> float:
        return self.layer * ROW + HEIGHT / 2 + 4


@dataclass(frozen=True)
class Picture:
    """Boxes with labels, edges as SVG paths, and the size of the drawing."""

    boxes: Sequence[Box]
    paths: Sequence[str]
    width: int
    height: int


def draw(graph: GraphData) -> Picture:
    """Lay a graph out, its inputs above."""
    boxes = [
        Box(n["label"], n["kind"], n["note"], width=14 + CHARACTER * len(n["label"]))
        for n in graph["nodes"]
    ]
    if not boxes:
        return Picture((), (), 0, 0)
    edges = [(a, b) for a, b in dict.fromkeys(map(tuple, graph["edges"]))]
    _assign_layers(boxes, edges)
    chains = [_chain(boxes, a, b) for a, b in edges]
    layers = _ordered(boxes)
    _place(boxes, layers)
    left = min(b.x - b.width / 2 for b in boxes)
    for box in boxes:
        box.x += 4 - left
    paths = [_path([boxes[i] for i in chain]) for chain in chains]
    width = max(b.x + b.width / 2 for b in boxes) + 4
    height = max(b.y for b in boxes) + HEIGHT / 2 + 4
    return Picture([b for b in boxes if b.label], paths, round(width), round(height))


def _assign_layers(boxes: Sequence[Box], edges: Sequence[tuple[int, int]]) -> None:
    """Operators as high as they can be, inputs right above their first reader.

    Nodes are numbered in topological order.
    """
    readers: dict[int, list[int]] = defaultdict(list)
    has_input = {b for _, b in edges}
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        boxes[b].layer = max(boxes[b].layer, boxes[a].layer + 1)
        readers[a].append(b)
    for i, box in enumerate(boxes):
        if i not in has_input and readers[i]:
            box.layer = min(boxes[r].layer for r in readers[i]) - 1


def _chain(boxes: list[Box], start: int, end: int) -> list[int]:
    """The edge as a chain of neighbouring layers, with dummies in between."""
    chain = [start]
    for layer in range(boxes[start].layer + 1, boxes[end].layer):
        boxes.append(Box(layer=layer))
        chain.append(len(boxes) - 1)
    chain.append(end)
    for a, b in itertools.pairwise(chain):
        boxes[a].below.append(b)
        boxes[b].above.append(a)
    return chain


def _ordered(boxes: Sequence[Box]) -> list[list[int]]:
    """The boxes of each layer from left to right, with few crossings."""
    layers: list[list[int]] = [[] for _ in range(max(b.layer for b in boxes) + 1)]
    for i, box in enumerate(boxes):
        layers[box.layer].append(i)
    rank: dict[int, float] = {i: k for layer in layers for k, i in enumerate(layer)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            around = {i: boxes[i].above if down else boxes[i].below for i in layer}
            layer.sort(key=lambda i: _mean(around[i], rank, rank[i]))
            rank |= {i: float(k) for k, i in enumerate(layer)}
    return layers


def _place(boxes: Sequence[Box], layers: Sequence[Sequence[int]]) -> None:
    """Positions near the mean of the neighbours that keep the order and the gaps."""
    for layer in layers:
        x = 0.0
        for i in layer:
            boxes[i].x = x + boxes[i].width / 2
            x += boxes[i].width + GAP
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 else reversed(layers):
            _relax(boxes, layer)


def _relax(boxes: Sequence[Box], layer: Sequence[int]) -> None:
    where = {i: box.x for i, box in enumerate(boxes)}
    wanted = [_mean(boxes[i].above + boxes[i].below, where, where[i]) for i in layer]
    # From the left nobody is too far left, from the right nobody too far right; their mean keeps
    # the gaps, since both do.
    from_left, from_right = list(wanted), list(wanted)
    for k in range(1, len(layer)):
        from_left[k] = max(wanted[k], from_left[k - 1] + _distance(boxes, layer, k))
    for k in range(len(layer) - 2, -1, -1):
        from_right[k] = min(wanted[k], from_right[k + 1] - _distance(boxes, layer, k + 1))
    for k, i in enumerate(layer):
        boxes[i].x = (from_left[k] + from_right[k]) / 2


def _distance(boxes: Sequence[Box], layer: Sequence[int], k: int) -> float:
    """Between the centres of a box and the one before it, at least."""
    return (boxes[layer[k - 1]].width + boxes[layer[k]].width) / 2 + GAP


def _mean(around: Sequence[int], values: Mapping[int, float], default: float) -> float:
    return fmean(values[i] for i in around) if around else default


def _path(boxes: Sequence[Box]) -> str:
    """A smooth curve from the lower side of the first box to the upper side of the last."""
    points = [(b.x, b.y) for b in boxes]
    points[0] = (points[0][0], points[0][1] + HEIGHT / 2)
    points[-1] = (points[-1][0], points[-1][1] - HEIGHT / 2)
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x, y), (u, v) in itertools.pairwise(points):
        bend = (v - y) / 2
        text += f"C{x:.1f} {y + bend:.1f} {u:.1f} {v - bend:.1f} {u:.1f} {v:.1f}"
    return text
