"""The loop around the step: batches, evaluation, metrics, checkpoints, resuming, stopping."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from functional_trainer import backend, checkpoint, config, flops, tree
from functional_trainer.data.loader import Loader
from functional_trainer.losses import Loss
from functional_trainer.metrics import Metrics
from functional_trainer.state import TrainState
from functional_trainer.step import evaluate
from functional_trainer.types import ONE_DEVICE, Batch

MAY_DIFFER = {"out", "resume", "keep", "save_every", "eval_every", "device", "max_skipped", "answers"}
MAY_DIFFER |= {"mesh", "micro_batch", "compile", "remat"}
"""Options that do not change what a run computes, but for rounding: they may differ when it is resumed."""


def claim(options: Any, *, main: bool = True) -> Path | None:
    """Make the run folder, write its config.yaml and return the checkpoint to resume from, if any.

    ValueError if the folder holds another run, or if `resume` names no checkpoint.
    """
    folder, source = Path(options.out), None
    if options.resume not in ("auto", "never"):
        source = Path(options.resume)
        source = source if source.name.startswith("step-") else checkpoint.latest(source)
        if source is None or not source.is_dir():
            raise ValueError(
                f"--resume {options.resume}: no checkpoint there; wanted .../checkpoints/step-N or a run folder"
            )
    if (folder / "metrics.jsonl").exists():
        if options.resume == "never" or source and not source.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder} already holds a run; choose another --out, or --resume auto to continue it")
        odd = _differences(config.load(type(options), folder / "config.yaml"), options)
        if odd:
            raise ValueError(
                f"{folder} holds another run ({'; '.join(odd)}); choose another --out, or the same options"
            )
        source = source or checkpoint.latest(folder)
    if main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.dump(options, folder / "config.yaml")
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from None
    return source


def _differences(old: Any, new: Any) -> list[str]:
    was, now = (tree.flatten(asdict(x)) for x in (old, new))
    return [
        f"{key.replace('/', '.')} was {was.get(key)}, is {now.get(key)}"
        for key in {**was, **now}
        if was.get(key) != now.get(key) and key.split("/")[0] not in MAY_DIFFER
    ]


def eval_loss(model: Any, loss: Loss, params: tree.Tree, loader: Loader, buffers: tree.Tree, shard, device) -> float:
    """Return the mean of the loss's first term over a counted loader, uncompiled and without gradients."""
    total: torch.Tensor | float = 0.0
    weight: torch.Tensor | float = 0.0
    loader.reset()
    for batch in loader:
        placed = shard.put_batch({k: v.to(device) for k, v in batch.items()})
        with torch.no_grad():
            sums, _ = evaluate(model, loss, params, placed, buffers, shard)
        term = next(iter(sums))
        total, weight = total + sums[term], weight + shard.replicate(loss.weights(placed)[term])
    return float(total / weight)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or SIGTERM has come; a second one stops at once."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def train(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    state: TrainState,
    loader: Loader,
    *,
    model: Any,
    loss: Loss,
    options: Any,
    total_steps: int,
    resume: Path | None = None,
    eval_loader: Loader | None = None,
    shard=ONE_DEVICE,
    device: torch.device,
) -> tuple[TrainState, bool]:
    """Run `step` until `total_steps`; return the state and whether it got there.

    `options` has the fields of `RunOptions`. Metrics and checkpoints go to `options.out`. Ctrl-C finishes the step,
    saves and returns. RuntimeError after `options.max_skipped` non-finite gradients in a row.
    """
    main = shard.rank == 0
    if resume is not None:
        _, extra = checkpoint.load(resume, tree.flatten(state))
        loader.restore(extra["loader"])
    start = int(state.step)
    if start > total_steps:
        raise ValueError(f"{resume} is at step {start}, the run would end at {total_steps}: raise --steps or --epochs")
    peak = backend.peak_flops(device, getattr(torch, options.dtype))
    top_k = getattr(model.config, "top_k", 0)

    def counts(batch: Batch, stop: bool) -> torch.Tensor:
        lengths = flops.lengths(batch["segment_ids"])
        cost = flops.train_flops(model.specs, lengths, top_k, model.config.windows)
        row = [float(lengths.sum()), float((batch["weights"] != 0).sum()), cost, float(stop)]
        return shard.total(torch.tensor(row, dtype=torch.float64, device=device))

    def save(done: int) -> None:
        checkpoint.save(options.out, done, tree.flatten(state), {"loader": loader.state(), "step": done}, options.keep)

    with Metrics(options.out, total_steps=total_steps, start_step=start, main=main) as metrics, stoppable() as asked:
        if resume is not None:
            left = "nothing is left to train" if start == total_steps else f"{total_steps - start} are left"
            metrics.print(f"resumed from {resume} at step {start} of {total_steps}; {left}")
        stopped, saved, clock = False, start if resume else None, time.perf_counter()
        for done in range(start + 1, total_steps + 1):
            begun = time.perf_counter()
            batch = next(loader)
            placed = shard.put_batch({k: v.to(device, non_blocking=True) for k, v in batch.items()})
            sums = counts(batch, asked())
            data_at = time.perf_counter()
            state, values = step(state, placed)
            tokens, trained, cost, stop = sums.tolist()  # waits for the device
            row = {k: v.tolist() for k, v in values.items()}
            step_at = time.perf_counter()
            row |= {"tokens": int(tokens), "trained_tokens": int(trained), "tokens_per_s": tokens / (step_at - clock)}
            row["mfu"] = flops.mfu(cost, step_at - clock, peak and peak * shard.world)
            row["memory_bytes"] = backend.peak_memory(device)
            row["time"] = {"data": data_at - begun, "step": step_at - data_at, "other": begun - clock}
            clock = step_at
            if eval_loader and (done == total_steps or options.eval_every and done % options.eval_every == 0):
                row["eval_loss"] = eval_loss(model, loss, state.params, eval_loader, state.buffers, shard, device)
            metrics.log(done, row)
            stopped = stop > 0
            if row["skipped"] > 0:
                metrics.print(
                    f"step {done}: the gradient is not finite, nothing was changed ({row['skipped']} in a row)"
                )
            if row["skipped"] >= options.max_skipped:
                last = checkpoint.latest(options.out)
                raise RuntimeError(
                    f"the gradients of {row['skipped']} steps in a row, up to {done}, are not finite; the run stops. "
                    f"Lower --optim.lr or look at the data there; the last checkpoint is {last}"
                )
            if stopped or options.save_every and done % options.save_every == 0:
                save(done)
                saved = done
            if stopped:
                metrics.print(f"stopped after step {done} of {total_steps}; the same command continues from there")
                break
        else:
            if saved != total_steps:
                save(total_steps)
    return state, not stopped
