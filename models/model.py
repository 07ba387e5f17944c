"""A model: a config, a tree of abstract parameters and pure functions over trees of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import kernels
from functional_trainer import param
from functional_trainer.hf import Name
from functional_trainer.tree import Tree
from functional_trainer.types import ONE_DEVICE, Batch, Gather, Output, Unembed
from models import layers

COLUMNS = "batch/columns"


@dataclass(frozen=True)
class Model:
    """A decoder-only language model. It holds no tensors; change it with `dataclasses.replace`.

    `layer(p, x_BSD, rows, window=, dtype=, shard=, cache=) -> (x_BSD, aux)` is one block, the unit of recomputation and
    of compilation: wrap it and put it back. `window` is the layer's sliding window or None.
    """

    config: Any
    """The family's frozen dataclass; `config.hf` is the Hugging Face dict it was read from."""
    specs: Tree
    """Tree of `Param`, the shape of every parameter tree of this model."""
    layer: Callable
    names: tuple[tuple[Name, ...], ...]
    """Hugging Face name maps, the layouts that checkpoints come in; the first is written."""
    dtype: torch.dtype | None = None
    """Compute dtype; parameters are cast at use. None computes in the parameters' own dtype."""
    gather: Gather = "kept"
    together: tuple[tuple[str, ...], ...] = (layers.QKV, layers.EXPERTS)
    """Names within a layer of parameters that are one product: all of them are in 8 bits, or none."""

    def init(self, seed: int, dtype: torch.dtype = torch.float32, device=None, shard=ONE_DEVICE) -> Tree:
        """Draw a parameter tree."""

        def one(path: str, p: param.Param):
            return shard.init_leaf(path, p.shape, lambda part: param.init_leaf(path, p, seed, dtype, device, part))

        return param.tree.map_with_path(one, self.specs, is_leaf=param.is_param)

    def apply(
        self, params: Tree, batch: Batch, shard=ONE_DEVICE, buffers=None, cache: Tree | None = None, record=False
    ) -> Output:
        """Map tokens (B, S) to hidden states (B, S, D) after the final norm.

        `batch` needs tokens, segment_ids and positions; routed_experts (B, S, L, K), if there, replays a routing, and
        parent_ids (B, S) are the segments that others continue (0: none), see `kernels.attention`.
        `aux` stacks the router sums of the L MoE layers: load (L, E), prob (L, E), balance (L,). With a `cache` from
        `init_cache` the new keys are written into it in place, from its "length" on: one place for all rows, which then
        moves on, or a tensor (B,), each row's own, which the caller keeps within what the cache holds; `aux` then, and
        with `record`, has routed_experts (L, B, S, K) too. ValueError for a routing that is not of this model.
        """
        c = self.config
        self._check(batch)

        def place(column_BS: torch.Tensor, name: str) -> torch.Tensor:
            return shard.local(lambda x: x, (f"{COLUMNS} > {name}",), (name,))(column_BS)

        embed = shard.weights({"embed": params["embed"]}, "params", self.dtype)["embed"]
        look_up = partial(kernels.embedding, part=shard.part("params/embed", 0))
        begin = shard.local(look_up, ("params/embed", f"{COLUMNS} > act/rows"), ("sum:act/block_in > act/residual",))
        x_BSD = begin(embed, batch["tokens"])
        ids = [name for name in ("segment_ids", "positions", "parent_ids") if name in batch]
        rows: dict[str, Any] = {name: place(batch[name], "act/attn_rows") for name in ids}
        rows["token_segment_ids"] = place(batch["segment_ids"], "act/token_rows")
        tables = shard.local(
            lambda positions_BS: c.rope.tables(positions_BS, c.head_dim, embed.dtype), (f"{COLUMNS} > act/rows",),
            ("act/rope", "act/rope"),
        )  # fmt: skip
        rows["cos"], rows["sin"] = tables(batch["positions"])
        rows |= _append_rows(cache, batch) | ({"record": True} if record else {})
        stats: list[dict] = []
        coming = shard.ahead(params["layers"], layers.LAYER, self.dtype, self.gather)
        fetched = hooks = None
        for i, p in enumerate(params["layers"]):
            del fetched, hooks  # so that no more than two layers are gathered
            fetched, hooks = next(coming)
            if "routed_experts" in batch and "moe" in p:
                rows = rows | {"routed_experts": batch["routed_experts"][:, :, len(stats)]}
            with hooks:
                x_BSD, aux = self.layer(
                    fetched, x_BSD, rows, window=c.windows[i], dtype=self.dtype, shard=shard,
                    cache=None if cache is None else cache["layers"][i],
                )  # fmt: skip
            stats += [aux] if aux else []
        scale = shard.weights({"norm": params["norm"]}, "params", self.dtype)["norm"]
        hidden = layers.norm(x_BSD, scale, "params/norm", c.eps, shard)
        aux = {k: torch.stack([s[k] for s in stats]) for k in stats[0]} if stats else {}
        return Output(hidden, aux, cache)

    def _check(self, batch: Batch) -> None:
        if "routed_experts" in batch:
            depth, given = sum("moe" in layer for layer in self.specs["layers"]), batch["routed_experts"].shape
            if not depth:
                raise ValueError("the batch has a routing to replay, routed_experts, but the model has no experts")
            if given[2:] != (depth, self.config.top_k):
                wanted = f"{depth} layers with experts and {self.config.top_k} experts for each token"
                raise ValueError(f"routed_experts is (B, S, L, K) = {tuple(given)}; the model has {wanted}")

    def unembed(self, params: Tree, shard=ONE_DEVICE) -> Unembed:
        """Return what turns hidden states into logits, in the compute dtype."""
        name = "embed" if self.config.tied else "unembed"
        return Unembed(shard.weights({name: params[name]}, "params", self.dtype)[name])

    def init_cache(self, rows: int, length: int, like: Tree) -> Tree:
        """Return an empty KV cache for `rows` sequences of at most `length` tokens, typed and placed as `like`."""
        w = like["embed"]
        shape = (rows, length, self.config.kv_heads, self.config.head_dim)
        at = {"dtype": self.dtype or w.dtype, "device": w.device}
        ids = {"dtype": torch.int64, "device": w.device}
        return {
            "layers": [{"k": torch.zeros(shape, **at), "v": torch.zeros(shape, **at)} for _ in like["layers"]],
            "segment_ids": torch.zeros(rows, length, **ids),
            "positions": torch.zeros(rows, length, **ids),
            "length": 0,
        }


def _append_rows(cache: Tree | None, batch: Batch) -> dict:
    """Write the new tokens' segments and positions into the cache; return what attention needs of it."""
    if cache is None:
        return {}
    start, (S, T) = cache["length"], (batch["tokens"].shape[1], cache["positions"].shape[1])
    if isinstance(start, int) and start + S > T:
        raise ValueError(f"the KV cache holds {T} tokens per row, {start + S} are needed")
    for name in ("segment_ids", "positions"):
        layers.write(cache[name], batch[name], start)
    cache["length"] = start + S
    return {"start": start, "key_segment_ids": cache["segment_ids"], "key_positions": cache["positions"]}
