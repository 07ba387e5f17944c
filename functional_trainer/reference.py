"""The frozen reference of preference losses: log-probabilities of targets by the weights that a run starts with.

Live, it runs before each step on the step's own batch. Kept, it runs once over all of the data before training, and its
numbers stay in the token cache under a key of the data, of how it is cut, and of the weights.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

import kernels
from functional_trainer import backend, tree
from functional_trainer.data.cache import home, writing
from functional_trainer.data.loader import Loader
from functional_trainer.data.packing import Cursor
from functional_trainer.data.stream import Stream
from functional_trainer.losses import Loss, logprobs
from functional_trainer.remat import wrap_layer
from functional_trainer.step import settings
from functional_trainer.types import ONE_DEVICE, Batch


@dataclass(frozen=True)
class Reference:
    """A model with weights that do not change, each rank's part of them, in the type that is computed in."""

    model: Any
    params: tree.Tree
    shard: Any
    compiled: bool
    micro_batches: int
    rows: int | None
    temperature: float

    @classmethod
    def of(
        cls, model: Any, params: tree.Tree, shard: Any = ONE_DEVICE, compile: str = "off", micro_batches: int = 1,
        rows: int | None = None, temperature: float = 1.0,
    ) -> "Reference":  # fmt: skip
        """Copy the weights; layers are compiled unless `compile` is "off". A batch is run in `micro_batches`, or in
        passes of `rows` at most on each device. Logits are divided by `temperature`."""
        frozen = tree.map(lambda p: shard.storage(p).detach().to(model.dtype or p.dtype, copy=True), params)
        wrapped = wrap_layer(model, compile=compile != "off", remat="none")
        return cls(wrapped, frozen, shard, compile != "off", micro_batches, rows, temperature)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Return the batch, placed as in a step, with ref_logprobs: (B, S), 0 where nothing is trained.

        A routing that is to be replayed is the policy's: the reference chooses its own.
        """
        own = {name: column for name, column in batch.items() if name != "routed_experts"}
        parts = self.shard.micro(own, -(-batch["tokens"].shape[0] // self.rows) if self.rows else self.micro_batches)
        if not self.compiled:  # importing the compiler takes seconds
            return batch | {"ref_logprobs": torch.cat([self._logprobs(part) for part in parts])}
        with settings(False), kernels.kept_on_disk():
            return batch | {"ref_logprobs": torch.cat([self._logprobs(part) for part in parts])}

    def _logprobs(self, batch: Batch) -> torch.Tensor:
        output, mask = self.model.apply(self.params, batch, self.shard, {}), batch["weights"] != 0
        unembed = self.model.unembed(self.params, self.shard)
        return logprobs(output, unembed, batch, self.shard, self.temperature, mask=mask)[0]

    def before(self, step: Callable) -> Callable:
        """Return a step that runs the reference first."""
        return lambda state, batch: step(state, self(batch))

    def within(self, loss: Loss) -> Loss:
        """Return the loss that runs the reference first, for evaluations."""
        return replace(
            loss,
            terms=lambda output, unembed, batch, shard: loss.terms(output, unembed, self(batch), shard),
            weights=lambda batch: loss.weights(batch | {"ref_logprobs": batch["weights"]}),  # whose values count not
        )

    def keep(
        self, masters: tree.Tree, loaders: Iterable[Loader], folder: str | Path | None, device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """Let batches of loaders bring ref_logprobs, from the token cache `folder` or through it.

        What is not there yet is computed on all ranks together. `masters` are the weights that were copied, as they are
        at rest. OSError says why it cannot be written.
        """
        root, weights = home(folder), checksum(masters, self.shard)
        for loader in loaders:
            stream = loader.stream
            cut = [stream.settings[name] for name in ("seq_len", "overlong")]
            what = [stream.documents.content, *cut, weights, str(self.model.dtype), repr(self.shard.fp8)]
            path = root / f"reference-{hashlib.blake2b(json.dumps(what).encode(), digest_size=12).hexdigest()}.npy"
            there = all(backend.everyone(path.exists()))
            if not there:
                found = self._all(stream, device)
                with FileLock(f"{path}.lock"), writing(root):
                    partial = path.with_suffix(".tmp.npy")
                    np.save(partial, found)
                    partial.replace(path)
            count = f"{len(stream.documents):,} documents"
            say(f"log-probabilities of {count} by the reference: {'found' if there else 'kept'} in {path}")
            stream.refer(path)

    def _all(self, stream: Stream, device: torch.device) -> np.ndarray:
        """Return the log-probability of each trained token of a stream's documents, 0 for others."""
        how = stream.settings | {"shuffle": False} | {name: stream.rebuild[name] for name in ("rank", "world")}
        once, cursor, done = Stream(stream.documents, epochs=1, **how), Cursor(), 0
        found = np.zeros(len(stream.documents.tokens), np.float64 if self.model.dtype == torch.float64 else np.float32)
        console = Console(stderr=True)
        hidden = self.shard.rank != 0 or not console.is_terminal
        with Progress(console=console, disable=hidden, transient=True) as bar:
            line = bar.add_task("reference", total=once.pieces.stats["tokens"])
            while cursor.held or cursor.next < once.end:
                table, cursor = once.plan(cursor)
                columns = once.columns(table)
                columns["target_ids"] = once.target_ids(table, columns)
                placed = self(self.shard.put_batch({k: torch.from_numpy(v).to(device) for k, v in columns.items()}))
                trained = placed["weights"] != 0
                here = [placed[name][trained].numpy(force=True) for name in ("target_ids", "ref_logprobs")]
                for places, values in backend.everyone(here):
                    found[places] = values
                done += sum(int(once.pieces.length[piece]) for row in table for piece in row)
                bar.update(line, completed=done)
        return found


def checksum(params: tree.Tree, shard: Any) -> str:
    """Return a hash of the whole weights, the same on every mesh."""
    digest = hashlib.blake2b(digest_size=12)
    for path, p in tree.flatten(params).items():
        whole = shard.collect(p)
        if whole is not None:
            digest.update(f"{path} {tuple(whole.shape)} {whole.dtype}".encode())
            digest.update(whole.contiguous().view(-1).view(torch.uint8).numpy())
    return backend.everyone(digest.hexdigest())[0]
