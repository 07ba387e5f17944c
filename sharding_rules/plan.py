"""What a step costs each rank of a mesh, found by running the step itself on meta tensors, without processes.

In a step tensors are plain, each rank's part, and every exchange follows from names. So a `Sharder` on a mesh that is
not there gives one rank's exact shapes and exchanges, and a `Watch` counts them. Routing is taken as balanced.

Costs are linear in the number of layers of each kind, so the step runs with three layers of a kind, with a fourth, and
the difference is multiplied: a model of 1T parameters takes seconds. `sharding_rules.roofline` turns costs into times.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch._C._distributed_c10d as c10d

from functional_trainer import param, tree
from functional_trainer.param import Part
from functional_trainer.types import Fp8
from sharding_rules.exchange import run
from sharding_rules.gathering import Fetched
from sharding_rules.mesh import AXES
from sharding_rules.rules import Held, Rules
from sharding_rules.sharder import Sharder
from sharding_rules.watch import Costs, Watch, in_backward, size

SHAPES = torch.device("meta")
Build = Callable[[Any, Any], tuple[Callable, Any]]
"""(model, shard) to the step and the state before it."""


@cache
def silent(ranks: int) -> Any:
    """Return a process group that sends nothing; kept here, for the registry of names does not hold it."""
    return c10d.ProcessGroup(0, ranks)  # type: ignore[call-arg]


def group(axes: tuple[tuple[str, int], ...]) -> str:
    """Return the name of a group that sends nothing: the wrappers of collectives ask by name for a group's size.

    Leaving a job (`destroy_process_group`) forgets all names, so each is given anew.
    """
    name: Any = "plan " + " ".join(f"{axis}{n}" for axis, n in axes)
    c10d._unregister_process_group(name)
    c10d._register_process_group(name, silent(math.prod(n for _, n in axes)))
    return name


class Grid:
    """A device mesh seen from its first rank, of which no process is there."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes = {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1}
        self.mesh_dim_names, self.shape = tuple(self.sizes), tuple(self.sizes.values())

    def size(self) -> int:
        return math.prod(self.shape)

    def get_local_rank(self, axis: str = "") -> int:
        return 0

    def __getitem__(self, axes: tuple[str, ...]) -> "Grid":
        return Grid({axis: self.sizes[axis] for axis in axes})

    def _flatten(self) -> "Grid":
        return self

    def get_group(self) -> Any:
        return SimpleNamespace(group_name=group(tuple(self.sizes.items())))


@dataclass(frozen=True, eq=False)
class Planner(Sharder):
    """The first rank's `Sharder` on a `Grid`: parameters are plain tensors, and a `Watch` learns what is what."""

    watch: Watch = field(default_factory=Watch)
    compiled: bool = False
    """Whether layers are compiled: then the next one's weights are on their way while one runs."""
    held: dict[torch.Tensor, tuple[Held, tuple[int, ...]]] = field(default_factory=dict)
    """What is `stored` of each parameter."""
    coming: list[torch.Tensor] = field(default_factory=list)
    """The next layer's weights, and in backward the whole gradients of the layer after it, which are on their way."""
    travelling: list[int] = field(default_factory=list)
    """Bytes in which the weights that were fetched last travel."""

    @property
    def rank(self) -> int:
        return 0

    def init_leaf(self, path: str, shape: tuple[int, ...], make: Callable[[Part], torch.Tensor]) -> Any:
        self.placements(path, shape)  # says what is wrong
        where = self.where(f"params/{path}", use=False, shape=shape)
        p = make(self.own(where, shape))
        self.held[p] = where, shape
        return p

    def stored(self, p: Any) -> tuple[Held, tuple[int, ...]]:
        return self.held[p]

    def _fetch(self, *args: Any) -> Any:
        with self.watch.within("weights gathered"):
            made = super()._fetch(*args)
        self.travelling[:] = [size(made.whole)]
        return made

    def weights(self, params: tree.Tree, prefix: str, dtype: torch.dtype | None = None) -> tree.Tree:
        self.watch.label = "activations"
        alone = self.compiled and "/layers/" in prefix and not isinstance(params, Fetched)
        with self.watch.within("weights gathered"):
            made = super().weights(tree.map(self.watch.leaf, params), prefix, dtype)
            # As many operations in forward as in backward, for selective recomputation counts them.
            self.coming[:] = [torch.empty(alone * self.travelling[0], dtype=torch.uint8, device=SHAPES)]
        with self.watch.within("backward"):
            grads = alone * in_backward() * size(made)
            self.coming.append(torch.empty(grads, dtype=torch.uint8, device=SHAPES))
        return made

    def squares(self, squares: list[torch.Tensor], params: list) -> torch.Tensor:
        self.watch.label = "update"
        return run(torch.stack(squares), (self._step("sum", tuple(self.sizes)),))


def columns(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch without values."""
    ids = ("tokens", "targets", "segment_ids", "positions")
    types = {**dict.fromkeys(ids, torch.int64), "weights": torch.float32}
    return {name: torch.empty(rows, length, dtype=dtype, device=SHAPES) for name, dtype in types.items()}


def observed(
    shard: Sharder, model: Any, build: Build, batch: dict[str, torch.Tensor], watch: Watch, offload: Iterable[str] = ()
) -> Costs:  # fmt: skip
    """Return what one step costs this rank, which reads `batch`; groups are called by their axes.

    `offload` is what of the state that is built lives in host memory.
    """
    step, state = build(watch.marked(model), shard)
    local = tree.map(shard.storage, (state.params, state.moments))
    moments = "host" if "optimizer" in offload else "optimizer"
    for what, part in zip(("parameters", moments, "batch"), (*local, batch), strict=True):
        watch.see(part, what)
    with watch:
        step(state, shard.put_batch(batch))
    axes = {name: axes for axes, (name, *_) in shard.groups.items()}
    said = ("sent", "calls")
    costs = {(*key[:2], axes[key[2]]) if key[0] in said else key: n for key, n in watch.costs.items()}
    return costs | {("rest", k): size(part) for k, part in zip(("params", "moments"), local, strict=True)}


def cut(model: Any, keep: list[int]) -> Any:
    """Return the model with some of its layers."""
    windows = tuple(model.config.windows[i] for i in keep)
    specs = model.specs | {"layers": [model.specs["layers"][i] for i in keep]}
    return replace(model, specs=specs, config=replace(model.config, windows=windows))


def kinds(model: Any) -> list[list[int]]:
    """Return the indices of the layers of each kind: alike in parameters and window."""
    found: dict[Any, list[int]] = {}
    for i, layer in enumerate(model.specs["layers"]):
        leaves = tuple((path, p.shape) for path, p in param.tree.flatten(layer).items())
        found.setdefault((leaves, model.config.windows[i]), []).append(i)
    return list(found.values())


def onward(total: Costs, less: Costs, more: Costs, times: int) -> Costs:
    """Return `total` and `times` what makes `more` of `less`."""
    keys = {**total, **less, **more}
    return {k: total.get(k, 0) + times * (more.get(k, 0) - less.get(k, 0)) for k in keys}


def plan(
    model: Any, build: Build, rules: Rules, sizes: dict[str, int], rows: int, length: int, document: int = 0,
    dispatch: str | None = None, compiled: bool = True, fp8: Fp8 | None = None, offload: Iterable[str] = (),
) -> Costs:  # fmt: skip
    """Return what a step of `rows` rows of `length` tokens for each data rank costs one rank of a mesh.

    `document` is the length of the documents in a row (0: a row is one), `dispatch` and `fp8` are as in `Sharder`,
    `offload` as in `observed`. If layers are `compiled` two are gathered at a time. ValueError as of `Rules.fit`, or if
    the mesh has one device only.
    """
    if not Grid(sizes).shape:
        raise ValueError("a mesh of one device exchanges nothing; give an axis more, as in fsdp=8")

    def costs(layers: list[int]) -> Costs:
        some, watch = cut(model, sorted(layers)), Watch(document or length)
        grid: Any = Grid(sizes)
        shard = Planner.of(rules, grid, some.specs, dispatch, fp8, watch=watch, compiled=compiled)
        return observed(shard, some, build, columns(rows, length), watch, offload)

    few = [i for of in kinds(model) for i in dict.fromkeys((*of[:2], of[-1]))]
    base = costs(few)
    total = base
    for of in kinds(model):
        if len(of) > 3:
            total = onward(total, base, costs([*few, of[2]]), len(of) - 3)
    inner = {key for key in total if key[:2] == ("memory", "others")}  # between the first and the last
    return {key: n for key, n in total.items() if key not in inner}
