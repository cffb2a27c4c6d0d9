"""Preferences as a directed graph, and what cannot be true of it: both orders, and circles. Standard library only.

A node is one image under one prompt; an edge leads from the preferred node to the other. A hard negative joins two
prompts; else every prompt has a graph of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

Node = tuple[str, str]  # prompt, content of the image
Edge = tuple[Node, Node]  # preferred, other


def contradictions(edges: Iterable[Edge]) -> list[Edge]:
    """Edges that also stand the other way round, each two of them once, in order of first appearance."""
    known = dict.fromkeys(edges)
    found: dict[Edge, None] = {}
    for one, other in known:
        if one != other and (other, one) in known and (other, one) not in found:
            found[one, other] = None
    return list(found)


def cycles(edges: Iterable[Edge]) -> list[list[Node]]:
    """A circle of three or more nodes of each connected part that has one; contradictions are left aside.

    Each node of a circle is preferred to the next, and the last to the first.
    """
    known = dict.fromkeys(edges)
    one_way = [(one, other) for one, other in known if one != other and (other, one) not in known]
    found = []
    for part in _parts(one_way):
        # The sorter wants what comes before each node.
        sorter: TopologicalSorter[Node] = TopologicalSorter()
        for better, worse in part:
            sorter.add(worse, better)
        try:
            sorter.prepare()
        except CycleError as error:
            circle: list[Node] = error.args[1]  # each a predecessor of the next; the first stands at both ends
            found.append(circle[:-1])
    return found


def _parts(edges: Iterable[Edge]) -> list[list[Edge]]:
    """The edges of each connected part."""
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    edges = list(edges)
    for one, other in edges:
        parent[root(one)] = root(other)
    parts: dict[Node, list[Edge]] = {}
    for edge in edges:
        parts.setdefault(root(edge[0]), []).append(edge)
    return list(parts.values())
