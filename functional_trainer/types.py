"""The few types that models, losses and the step share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch

import kernels
from functional_trainer import tree
from functional_trainer.optimizers import alone
from functional_trainer.param import Part

Batch = dict[str, torch.Tensor]
"""Named per-token columns, each (B, S): tokens, targets, segment_ids (0 = padding), positions, weights, ..."""


Fp8 = Mapping[str, kernels.Recipe]
"""How products with parameters are quantised, by the names that maths has for them: "params/layers/_/attn/q"."""


Gather = Literal["kept", "again", "inside"]
"""Where a layer's parameters are gathered: before the layer before it runs, and then kept until backward or gathered
again there, a layer ahead too; or inside of the layer."""


class Output(NamedTuple):
    """What a model returns: hidden states (B, S, D) after the final norm, router statistics, and the new KV cache.

    In a step the state's buffers come with it, for losses that keep something from step to step.
    """

    hidden: Any
    aux: dict[str, Any]
    cache: Any = None
    buffers: Any = None


class Unembed(NamedTuple):
    """What turns hidden states into logits: table (V, D), optional bias (V,), optional soft cap."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (..., V) of hidden states (..., D) in at least float32; losses never hold them."""
        z = kernels.promote(torch.nn.functional.linear(hidden, self.weight, self.bias))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class OneDevice:
    """The identity sharder: what `sharding_rules.Sharder` is on a mesh, on one device.

    A model receives one of the two as `shard` and never learns which. In a step tensors are plain: this rank's part.
    """

    rank, world = 0, 1
    data = 0, 1
    """Which of how many sets of rows of a batch this process reads."""
    dispatch: str | None = None
    """How tokens travel to experts: a backend of `kernels.experts`' `exchange`, None for its default."""
    fp8: Fp8 = {}
    """Products that are in 8 bits; see `functional_trainer.precision`."""

    def __init__(self, fp8: Fp8 | None = None):
        self.fp8 = fp8 or {}

    def ahead(
        self, layers: list[tree.Tree], prefix: str, dtype: torch.dtype | None, gather: Gather
    ) -> Iterator[tuple[Any, Any]]:
        """Yield what `weights` takes for each layer, the next layer's being on their way, and a context to run it in.

        Gradients of what comes so are not there before `settle` is called.
        """
        yield from ((layer, nullcontext()) for layer in layers)

    def settle(self) -> None:
        """Wait for gradients that backward left on their way."""

    def inductor(self) -> dict[str, Any]:
        """Return options with which Inductor compiles what has exchanges."""
        return {}

    def weights(self, params: tree.Tree, prefix: str, dtype: torch.dtype | None = None) -> tree.Tree:
        """Return the parameters below `prefix` as the maths uses them: cast to `dtype`, gathered over storage axes."""
        return params if dtype is None else tree.map(lambda w: w.to(dtype), params)

    def local(self, fn: Callable, ins: tuple[str, ...], outs: tuple[str, ...]) -> Callable:
        """Run `fn` on this rank's parts; `ins` and `outs` name the placement of each operand and result.

        "a > b" comes placed as a and is wanted as b, or is made as a and left as b. "sum:a" is made as each rank's
        share of a sum. "sum" alone stays one: a rank's share, as if summed over the rank's own tokens of the batch.
        """
        return fn

    def part(self, name: str, dim: int) -> tuple[int, int]:
        """Return which part of dim `dim` of the tensor called `name` is this rank's, and of how many."""
        return 0, 1

    def group(self, name: str, dim: int) -> str | None:
        """Return the name of the process group over which dim `dim` of `name` is sharded, None if it is whole."""
        return None

    def replicate(self, x: torch.Tensor) -> torch.Tensor:
        """Add the ranks' shares of a sum."""
        return x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Take the largest of what ranks have."""
        return x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Make what all ranks have alike a share of a sum."""
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Add what each process counts in the rows that it reads."""
        return x

    def storage(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a tensor, sharing its storage."""
        return x

    def around(self, p: torch.Tensor) -> Callable:
        """Return what applies a function to whole matrices of a tensor placed as `p`; see `optimizers.alone`."""
        return alone

    def squares(self, squares: list[torch.Tensor], params: list[torch.Tensor]) -> torch.Tensor:
        """Return the sums of squares (n,) of whole tensors placed as `params`, given those of this rank's parts."""
        return torch.stack(squares)

    def full(self, x: torch.Tensor) -> torch.Tensor:
        """Gather one parameter whole."""
        return x

    def collect(self, x: torch.Tensor) -> torch.Tensor | None:
        """Bring one parameter whole into the host memory of rank 0, part by part; None on the others."""
        return x.detach().cpu()

    def init_leaf(self, path: str, shape: tuple[int, ...], make: Callable[[Part], torch.Tensor]) -> torch.Tensor:
        """Place one parameter, of which `make` draws or reads the part that this process keeps."""
        return make(tuple(slice(0, size) for size in shape))

    def put_batch(self, batch: Batch) -> Batch:
        """Return this rank's part of rows that it read."""
        return batch

    def micro(self, batch: Batch, parts: int) -> list[Batch]:
        """Split a batch into `parts` micro-batches, each of consecutive rows of every rank."""
        rows = next(iter(batch.values())).shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows per device cannot be split into {parts} equal micro-batches")
        return [{k: v.unflatten(0, (parts, -1))[i] for k, v in batch.items()} for i in range(parts)]


ONE_DEVICE = OneDevice()
