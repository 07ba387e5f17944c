"""A pass for Inductor: a compiled step goes on while gradients are added.

Its graph waits for each exchange where that is begun. The pass moves the wait for a sum over ranks, with what renames
its result or sends it on, behind the beginning of the next sum of the kind: in backward, of the layer before. So two
are on their way, as where layers are compiled (`exchange.Late`). No wait moves past a computation with its result.
"""

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
SUMS = (c10d.reduce_scatter_tensor.default, c10d.all_reduce.default)
WAIT = c10d.wait_tensor.default
CARRIED: set[Any] = {
    *SUMS, WAIT, operator.getitem, aten.view.default, aten.reshape.default, aten.split.Tensor, aten.alias.default,
    aten.split_with_sizes.default, aten.slice.Tensor, aten.permute.default, aten.select.int, aten.unsqueeze.default,
    aten.squeeze.dims, aten.expand.default,
}  # fmt: skip
"""What moves along with a wait."""


class Overlap(CustomGraphPass):
    """See this file's text."""

    def __call__(self, graph: Graph) -> None:
        for begun in [node for kind in SUMS for node in graph.nodes if node.target is kind]:
            for wait in [user for user in begun.users if user.target is WAIT]:
                _sink(wait, begun)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _sink(wait: Node, begun: Node) -> None:
    """Move a wait, with what moves along, behind the next exchange like `begun`, or before the first use."""
    along, place = {wait: True}, wait.next
    alike = uses = False
    while place.op != "output":
        uses = any(node in along for node in place.all_input_nodes)
        alike = place.target is begun.target and place.args[1:] == begun.args[1:]
        if alike or uses and place.target not in CARRIED:
            break
        if uses:
            along[place] = True
        place = place.next
    last = place if alike and not uses else place.prev
    for node in along:
        last.append(node)
        last = node
