"""Inductor's pass over exchanges: what is begun is waited for later, and every value stays the same."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule

from sharding_rules.overlap import CARRIED, SUMS, WAIT, Overlap
from tests.multi_rank import launch

scatter, reduce = SUMS
aten = torch.ops.aten
STEPS = ("product", "scatter", "sum", "view", "use")


def program(steps: list[tuple[str, int]], group: str = "0") -> Graph:
    """Return a graph in which each step takes an earlier value, and which returns all of them."""
    graph = Graph()
    values = [graph.placeholder("x")]
    for kind, which in steps:
        x = values[which % len(values)]
        if kind == "product":
            y = graph.call_function(aten.mm.default, (x, x))
        elif kind == "view":
            y = graph.call_function(aten.view.default, (x, (4, 4)))
        elif kind == "use":
            y = graph.call_function(aten.add.Tensor, (x, values[0]))
        else:
            begun = (scatter, (x, "sum", 1, group)) if kind == "scatter" else (reduce, (x, "sum", group))
            y = graph.call_function(WAIT, (graph.call_function(*begun),))
        values.append(y)
    graph.output(tuple(values))
    return graph


def text(graph: Graph) -> list[str]:
    """Name the calls of a graph: exchanges by when they begin, waits by what they wait for."""
    numbers: dict[Any, int] = {}
    found = []
    for node in graph.nodes:
        if node.target in SUMS:
            numbers[node] = len(numbers)
            found.append(f"begin {numbers[node]}")
        elif node.target is WAIT:
            found.append(f"wait {numbers[node.args[0]]}")
        elif node.op == "call_function":
            found.append(node.target.overloadpacket.__name__)
    return found


def test_a_gradient_is_waited_for_when_the_next_is_on_its_way():
    layer = [("product", -1), ("scatter", -1), ("view", -1)]
    graph = program([("product", 0), *layer, ("product", 1), *layer[1:], ("product", 1), *layer[1:], ("use", 4)])
    Overlap()(graph)
    graph.lint()
    assert text(graph) == [
        "mm", "mm", "begin 0", "mm", "begin 1", "wait 0", "view", "mm", "begin 2", "wait 1", "view", "add", "wait 2",
        "view",
    ]  # fmt: skip


def test_what_is_used_at_once_is_waited_for_at_once():
    steps = [("product", 0), ("scatter", -1), ("use", -1), ("product", 0), ("scatter", -1), ("use", -1)]
    graph = program(steps)
    before = text(graph)
    Overlap()(graph)
    assert text(graph) == before


def test_sums_of_sums_move_along():
    """As of HSDP: scattered over one axis, then added over another."""
    pair = [("scatter", -1), ("sum", -1)]
    graph = program([("product", 0), *pair, ("product", 0), *pair, ("product", 0), *pair])
    Overlap()(graph)
    graph.lint()
    assert text(graph) == [
        "mm", "begin 0", "mm", "begin 1", "wait 0", "begin 2", "mm", "begin 3", "wait 1", "begin 4", "wait 2", "wait 3",
        "begin 5", "wait 4", "wait 5",
    ]  # fmt: skip


def same_values(programs: list[list[tuple[str, int]]]) -> bool:
    group = torch.distributed.distributed_c10d._get_default_group().group_name
    x = torch.arange(16.0).view(4, 4) / 8 - 1
    for steps in programs:
        graph = program(steps, group)
        wanted = GraphModule({}, graph)(x)
        Overlap()(graph)
        graph.lint()
        assert all(torch.equal(a, b) for a, b in zip(GraphModule({}, graph)(x), wanted, strict=True)), steps
    return True


def test_every_value_stays_the_same():
    """Programs are drawn here and run on one rank of gloo, all together."""
    programs: list[list[tuple[str, int]]] = []
    step = st.tuples(st.sampled_from(STEPS), st.integers(0, 9))

    @settings(max_examples=200, database=None)
    @given(st.lists(step, max_size=12))
    def draw(steps):
        programs.append(steps)

    draw()
    assert launch.run(1, same_values, programs)


def test_its_names_are_ops():
    assert all(callable(op) for op in CARRIED)
