"""What a layer leaves for backward: kept, computed again, or sent to host memory.

Ways to keep less, of `make_train_step`'s `remat`: "layer" keeps a layer's input only, "selective" the results of
`kernels.EXPENSIVE` too; "budget:0.4" lets the compiler keep what fits in 0.4 of the bytes between all that it would
keep and the inputs alone, and compute again what costs the fewest FLOPs (torch's activation_memory_budget).

`Offload` sends what is kept to host memory while later layers run, and brings it back a layer ahead in backward; the
idea is that of torchtune's OffloadActivations. Hooks on saved tensors see a compiled layer's too.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels
from functional_trainer import backend as devices
from functional_trainer import tree

SMALL = 1024
"""Bytes below which a tensor stays where it is."""


def budget(remat: str) -> float | None:
    """Return X of "budget:X", None of the other ways; ValueError if it is no way to recompute."""
    name, _, number = remat.partition(":")
    try:
        share = float(number) if name == "budget" else None
    except ValueError:
        share = math.nan
    if share is None and remat not in ("none", "selective", "layer") or share is not None and not 0 <= share <= 1:
        raise ValueError(f"--remat {remat}: it is none, selective, layer, or budget:X with X from 0 to 1")
    return share


def budgeted(remat: str) -> AbstractContextManager:
    """Return the context in which graphs are cut by a budget, if there is one."""
    share = budget(remat)
    return nullcontext() if share is None else torch._functorch.config.patch(activation_memory_budget=share)


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in kernels.EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _selective():
    """Keep the results of `kernels.EXPENSIVE`, recompute the others."""
    return create_selective_checkpoint_contexts(_policy)


_selective.cache_hash = kernels.SOURCE  # type: ignore[attr-defined]  # without it AOTAutograd caches nothing on disk


def _outer_hooks() -> tuple[Callable, Callable]:
    """Return the hooks on saved tensors that are in force: those that are set inside take their place."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) or (lambda x: x, lambda x: x)


class Offload:
    """What one layer keeps for backward, in host memory; `before` is the layer that backward comes to next.

    What `stays` is left to the hooks outside: of gathered weights, those that gather them again.
    """

    def __init__(self, stays: Any, before: "Callable[[], Offload | None]"):
        self.stays = {x.untyped_storage()._cdata for x in tree.leaves(stays) if isinstance(x, torch.Tensor)}
        self.before = before
        self.outer = _outer_hooks()
        self.sent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by storage: the bytes here and there
        self.away: list[torch.Tensor] = []
        self.device = torch.device("meta")
        self.here: list[Callable[[], torch.Tensor]] = []

    def pack(self, x: torch.Tensor) -> Any:
        if is_traceable_wrapper_subclass(x):  # the result of an exchange that is still on its way
            x = collectives.wait_tensor(x.detach())
        where = (storage := x.untyped_storage())._cdata
        if where in self.stays or storage.nbytes() < SMALL:
            return None, self.outer[0](x)
        if where not in self.sent:
            self.device = x.device
            own = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)  # not to be freed and met again
            self.sent[where] = own, devices.send_away(own)
        return list(self.sent).index(where), (x.dtype, x.size(), x.stride(), x.storage_offset())

    def done(self) -> None:
        """Let go of what is here: the layer has run."""
        self.away = [there for _, there in self.sent.values()]
        self.sent.clear()

    def fetch(self) -> None:
        """Begin to bring everything back."""
        if self.away:
            self.here, self.away = [devices.bring_back(x, self.device) for x in self.away], []

    def unpack(self, kept: Any) -> torch.Tensor:
        place, stays_or_view = kept
        if place is None:
            return self.outer[1](stays_or_view)
        self.fetch()
        if before := self.before():
            before.fetch()
        dtype, *view = stays_or_view
        return self.here[place]().view(dtype).as_strided(*view)


def offloading(layer: Callable) -> Callable:
    """Return the layer with what it keeps for backward, but weights and the batch's columns, in host memory.

    On a mesh weights are what was gathered; a copy in another layout that the layer makes of them goes too.
    """
    last: list[Any] = [lambda: None]

    def run(p, x, rows, **options):
        if not torch.is_grad_enabled():
            return layer(p, x, rows, **options)
        own = Offload((p, rows), last[0])
        last[0] = weakref.ref(own)
        with torch.autograd.graph.saved_tensors_hooks(own.pack, own.unpack):
            made = layer(p, x, rows, **options)
        own.done()
        return made

    return run


def wrap_layer(model: Any, *, compile: bool, remat: str, backend: str = "inductor", offload: bool = False) -> Any:
    """Return the model with its block recomputed in backward (all of it, or the cheap rest), compiled, or both."""
    layer = model.layer
    if remat != "none":
        how: dict[str, Any] = {"context_fn": _selective} if remat == "selective" else {}
        again = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False, **how)
        inner = layer if budget(remat) is not None else again

        def layer(p, x, rows, **options):
            return inner(p, x, rows, **options)

        layer.__code__ = layer.__code__.replace(co_name=f"layer_{remat}")  # what Dynamo keeps graphs by

    if compile:
        layer = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    if offload:
        layer = offloading(layer)
    return replace(model, layer=layer, gather="kept" if remat == "none" else "again" if compile else "inside")
