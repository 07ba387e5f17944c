"""Gathering of weights over the axes that only store them: a layer ahead, several in one exchange, in 8 bits.

Forward begins to gather a layer's weights before the layer before it runs; so does backward, where it gathers again,
the other way round. Backward leaves the sums of a layer's gradients on their way while the next layer computes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from functional_trainer import tree
from functional_trainer.types import Fp8, Gather
from sharding_rules.exchange import Late, Packed, Step, bind, bucket, move, unpack, unpack_bytes, wait
from sharding_rules.layout import Layout, Moves

Bucket = tuple[tuple[Step | None, Step | None], list[str], list[int], list[Packed]]
BUCKETED = [(["gather"], ["scatter"]), (["gather"], ["scatter", "sum"]), ([], ["sum"])]
"""Kinds of the steps, and of the gradient's, of parameters that travel together."""


def _kinds(moves: Moves) -> tuple[list[str], list[str]]:
    steps, back = moves
    return [step.kind for step in steps], [step.kind for step in back]


@dataclass(frozen=True)
class Fetched:
    """Parameters that are on their way: this rank's parts, and what they travel in."""

    parts: tree.Tree
    whole: list[torch.Tensor]
    packed: list[torch.Tensor]
    """The bytes of those that came in 8 bits; in `whole` is then what has their gradients."""


pytree.register_dataclass(Fetched)


class Again:
    """Lets go of gathered weights after forward; backward gathers each layer's again, and the next one's ahead."""

    def __init__(self, fetch: Callable[[int], Fetched]):
        self.fetch = fetch
        self.coming: dict[int, list[torch.Tensor]] = {}

    def hooks(self, layer: int, whole: list[torch.Tensor]) -> Any:
        """Return the context in which a layer is to run that is given `whole`."""
        places = {x.untyped_storage().data_ptr(): i for i, x in enumerate(whole) if x.numel()}

        def pack(x: torch.Tensor) -> Any:
            place = places.get(x.untyped_storage().data_ptr())
            return x if place is None else (place, x.size(), x.stride(), x.storage_offset())

        def unpack(kept: Any) -> torch.Tensor:
            return kept if isinstance(kept, torch.Tensor) else self._whole(layer, kept[0]).as_strided(*kept[1:])

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    @torch.no_grad()
    def _whole(self, layer: int, place: int) -> torch.Tensor:
        self.coming.pop(layer + 1, None)
        for i in (layer, layer - 1):
            if i >= 0 and i not in self.coming:
                self.coming[i] = self.fetch(i).whole
        return wait(self.coming[layer][place])


@dataclass(frozen=True, eq=False)
class Gathering(Layout):
    """A layout whose parameters are gathered where they are used; see `functional_trainer.types.OneDevice`."""

    fp8: Fp8 = field(default_factory=dict)
    matrices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of parameters as maths names them: leading dims that are one matrix each, and last dims that are inputs."""
    late: Late = field(default_factory=Late, init=False)

    def storage(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_local() if isinstance(x, DTensor) else x

    def ahead(
        self, layers: list[tree.Tree], prefix: str, dtype: torch.dtype | None, gather: Gather
    ) -> Iterator[tuple[Any, Any]]:
        if gather == "inside":
            yield from ((layer, nullcontext()) for layer in layers)
            return
        late = None if torch.compiler.is_compiling() else self.late

        def fetch(i: int) -> Fetched:
            return self._fetch(layers[i], prefix, dtype)

        again, coming = Again(fetch), [fetch(0)] if layers else []
        for i in range(len(layers)):
            now = coming.pop()
            coming += [fetch(i + 1)] if i + 1 < len(layers) else []
            hooks = again.hooks(i, now.whole) if gather == "again" else nullcontext()
            given = self._bound(now, prefix, dtype, late), hooks
            del now  # the layer's alone, to be let go of when it has run
            yield given
            del given

    def _fetch(self, params: tree.Tree, prefix: str, dtype: torch.dtype | None) -> Fetched:
        """Begin to gather, cast: all parameters that the same ranks share in one exchange."""
        flat = {path: self.storage(w) for path, w in tree.flatten(params).items()}
        buckets = self._buckets(flat, prefix)
        whole = [
            bucket([flat[path] for path in paths], gather, dtype, packed) for (gather, _), paths, _, packed in buckets
        ]
        return Fetched(tree.unflatten(flat, params), whole, [])

    def _bound(self, fetched: Fetched, prefix: str, dtype: torch.dtype | None, late: Late | None = None) -> Fetched:
        """Return what was fetched, with gradients."""
        flat, of = tree.flatten(fetched.parts), None if late is None else object()
        bound = [
            bind(whole, [flat[path] for path in paths], *steps, late, of, dtype)
            for whole, (steps, paths, *_) in zip(fetched.whole, self._buckets(flat, prefix), strict=True)
        ]
        return Fetched(fetched.parts, bound, [whole for whole in fetched.whole if whole.dtype == torch.uint8])

    def settle(self) -> None:
        self.late.settle()

    def inductor(self) -> dict[str, Any]:
        """Leave a layer's gather where the model begins it, a layer ahead; wait for gradients a layer late."""
        from sharding_rules.overlap import Overlap  # imports the compiler

        return {"reorder_for_peak_memory": False, "post_grad_custom_post_pass": Overlap()}

    def weights(self, params: "tree.Tree | Fetched", prefix: str, dtype: torch.dtype | None = None) -> tree.Tree:
        if not isinstance(params, Fetched):
            params = self._bound(self._fetch(params, prefix, dtype), prefix, dtype)
        flat, buckets = tree.flatten(params.parts), self._buckets(tree.flatten(params.parts), prefix)
        came = list(params.packed)
        for whole, (_, paths, along, packed) in zip(params.whole, buckets, strict=True):
            xs = [flat[path] for path in paths]
            made = unpack_bytes(whole, came.pop(0), xs, along, packed) if packed else unpack(whole, xs, along)
            flat |= dict(zip(paths, made, strict=True))
        alone = self._alone(tree.flatten(params.parts), prefix)
        flat |= {path: move(flat[path], *moves, dtype) for path, moves in alone.items()}
        return tree.unflatten(flat, params.parts)

    def _moves(self, flat: dict[str, torch.Tensor], prefix: str) -> dict[str, Moves]:
        return {path: self._gather(f"{prefix}/{path}") for path in flat}

    def _alone(self, flat: dict[str, torch.Tensor], prefix: str) -> dict[str, Moves]:
        """Return the moves of parameters that travel alone."""
        return {path: moves for path, moves in self._moves(flat, prefix).items() if _kinds(moves) not in BUCKETED}

    def _buckets(self, flat: dict[str, torch.Tensor], prefix: str) -> list[Bucket]:
        """Return what travels together: steps of the exchange, paths, and the dim along which each is gathered."""
        buckets: dict[Any, Bucket] = {}
        for path, moves in self._moves(flat, prefix).items():
            if _kinds(moves) in BUCKETED:
                steps, back = moves
                gather, total = (*steps, None)[0], back[-1] if back[-1].kind == "sum" else None
                packed = self._packed(f"{prefix}/{path}", flat[path].shape, gather)
                alike = gather and gather.group, total and total.group, flat[path].dtype, flat[path].requires_grad
                _, paths, along, how = buckets.setdefault((*alike, not packed), ((gather, total), [], [], []))
                paths.append(path)
                along.append(gather.dim if gather else 0)
                how += packed
        return list(buckets.values())

    def _packed(self, name: str, shape: Sequence[int], gather: Step | None) -> list[Packed]:
        """Return how a parameter of which a rank has this part travels in 8 bits, nothing if it does not.

        It does if the borders of parts are borders of what shares a scale.
        """
        recipe = self.fp8.get(name)
        if recipe is None or gather is None:
            return []
        first, last = self.matrices[name][0], len(shape) - self.matrices[name][1]
        matrix = *shape[:first], math.prod(shape[first:last]), math.prod(shape[last:])
        which = {first: "outputs", last: "inputs"}.get(gather.dim)
        fits = gather.dim < first or which is not None and recipe.travels(matrix[-2], matrix[-1], which)
        return [Packed(matrix, recipe)] if fits else []
